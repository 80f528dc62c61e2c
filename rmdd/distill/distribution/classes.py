"""Clusters of pairs in the place of classes: k-means of joint features, evened out, and the pairs each begins with.

R caption records, D joint features, C clusters, ipc pairs of each. Sizes are counted in distinct images, for a cluster
may hold one image with all its captions.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from rmdd.core.seeding import derive, generator
from rmdd.coresets.clusters import MINI_BATCH, SAMPLE, fit

Labels = Int64[np.ndarray, " R"]
Pick = Literal["nearest", "random"]


def clusters_of(
    points: Float32[np.ndarray, "R D"], image_of: Int64[np.ndarray, " R"], clusters: int, ipc: int, seed: int
) -> Labels:
    """The cluster of each record; every one has at least `ipc` images. Raises `ValueError` for too few images."""
    images = len(np.unique(image_of))
    if images < (least := (2 * ipc * clusters if clusters > 1 else ipc)):
        raise ValueError(
            f"{clusters} clusters of {ipc} pairs each need {least} images to be evened out, the train split has "
            f"{images}; lower distill.options.clusters or the pairs"
        )
    if clusters == 1:
        return np.zeros(len(points), dtype=np.int64)
    draw = np.random.default_rng(derive(seed, "cluster sample"))
    some = np.sort(draw.choice(len(points), SAMPLE, replace=False)) if len(points) > SAMPLE else slice(None)
    centres = fit(points[some], clusters, seed)
    return evened(points, image_of, assigned(points, centres), clusters, ipc)


def assigned(points: Float32[np.ndarray, "R D"], centres: Float32[np.ndarray, "C D"]) -> Labels:
    """The nearest centre of each point."""
    blocks = np.array_split(points, max(1, len(points) // MINI_BATCH))
    half = (centres**2).sum(axis=1) / 2
    return np.concatenate([(block @ centres.T - half).argmax(axis=1) for block in blocks]).astype(np.int64)


def evened(
    points: Float32[np.ndarray, "R D"], image_of: Int64[np.ndarray, " R"], labels: Labels, clusters: int, ipc: int
) -> Labels:
    """While a cluster has fewer than `ipc` images, it joins the nearest one, and the largest is split in its place."""
    labels = labels.copy()
    sizes = np.array([len(np.unique(image_of[labels == c])) for c in range(clusters)])
    while sizes.min() < ipc:
        small, members = int(sizes.argmin()), labels == sizes.argmin()
        if members.any():
            centres = np.stack([_centre(points[labels == c]) for c in range(clusters)])
            far = ((centres - centres[small]) ** 2).sum(axis=1)
            far[small], far[sizes == 0] = np.inf, np.inf
            joined = int(far.argmin())
            labels[members] = joined
            sizes[joined] = len(np.unique(image_of[labels == joined]))
        sizes[small] = 0
        largest = int(sizes.argmax())
        own = np.flatnonzero(labels == largest)
        labels[own[_half(points[own], image_of[own])]] = small
        for c in (small, largest):
            sizes[c] = len(np.unique(image_of[labels == c]))
    return labels


def _centre(points: np.ndarray) -> np.ndarray:
    return points.mean(axis=0) if len(points) else np.zeros(points.shape[1], points.dtype)


def _half(points: np.ndarray, image_of: np.ndarray) -> np.ndarray:
    """Which members go: those of half the images, the farther ones along the line of greatest spread."""
    away = points - points.mean(axis=0)
    line = away[(away**2).sum(axis=1).argmax()]
    for _ in range(8):  # power iterations
        line = away.T @ (away @ line)
        line = line / max(float(np.linalg.norm(line)), 1e-30)
    images, where = np.unique(image_of, return_inverse=True)
    place = np.bincount(where, weights=away @ line) / np.bincount(where)
    going = np.zeros(len(images), dtype=bool)
    going[np.argsort(place, kind="stable")[: len(images) // 2]] = True
    return going[where]


def chosen(
    points: Float32[np.ndarray, "R D"],
    image_of: Int64[np.ndarray, " R"],
    labels: Labels,
    clusters: int,
    ipc: int,
    pick: Pick,
    seed: int,
) -> list[int]:
    """`ipc` records of every cluster, of distinct images, those of cluster 0 first: nearest to its centre, or drawn."""
    records: list[int] = []
    for c in range(clusters):
        own = np.flatnonzero(labels == c)
        if pick == "nearest":
            centre = points[own].mean(axis=0)
            order = np.argsort(((points[own] - centre) ** 2).sum(axis=1), kind="stable")
        else:
            import torch

            order = torch.randperm(len(own), generator=generator(seed, "cluster pairs", c)).numpy()
        _, first = np.unique(image_of[own[order]], return_index=True)
        records += own[order[np.sort(first)[:ipc]]].tolist()
    return records
