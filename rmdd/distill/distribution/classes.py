"""Divide pairs into clusters, which replace the classes of NCFM, and choose the initial pairs of each cluster.

Symbols: R caption records, D joint features, C clusters, ipc pairs per cluster. The size of a cluster is the number of
its distinct images. Caption records are not counted, because the captions of a single image could fill a cluster.
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
    """Return the cluster number of each caption record; each cluster has at least `ipc` different images.

    Raises `ValueError` when the train split has too few images.
    """
    images = len(np.unique(image_of))
    if images < (needed := (2 * ipc * clusters if clusters > 1 else ipc)):
        raise ValueError(
            f"{clusters} clusters of {ipc} pairs each need at least {needed} images, but the train split has {images}; "
            "lower distill.options.clusters or the number of pairs"
        )
    if clusters == 1:
        return np.zeros(len(points), dtype=np.int64)
    draw = np.random.default_rng(derive(seed, "cluster sample"))
    sample = np.sort(draw.choice(len(points), SAMPLE, replace=False)) if len(points) > SAMPLE else slice(None)
    centres = fit(points[sample], clusters, seed)
    return balanced(points, image_of, assigned(points, centres), clusters, ipc)


def assigned(points: Float32[np.ndarray, "R D"], centres: Float32[np.ndarray, "C D"]) -> Labels:
    """Return, for each point, the index of the nearest centre."""
    blocks = np.array_split(points, max(1, len(points) // MINI_BATCH))
    half = (centres**2).sum(axis=1) / 2
    return np.concatenate([(block @ centres.T - half).argmax(axis=1) for block in blocks]).astype(np.int64)


def balanced(
    points: Float32[np.ndarray, "R D"], image_of: Int64[np.ndarray, " R"], labels: Labels, clusters: int, ipc: int
) -> Labels:
    """Return balanced cluster numbers: each cluster has at least `ipc` images.

    A cluster with fewer images is merged into the nearest cluster, and the largest cluster is split into two.
    """
    labels = labels.copy()
    sizes = np.array([len(np.unique(image_of[labels == c])) for c in range(clusters)])
    while sizes.min() < ipc:
        small, members = int(sizes.argmin()), labels == sizes.argmin()
        if members.any():
            centres = np.stack([_centre(points[labels == c]) for c in range(clusters)])
            far = ((centres - centres[small]) ** 2).sum(axis=1)
            far[small], far[sizes == 0] = np.inf, np.inf
            nearest = int(far.argmin())
            labels[members] = nearest
            sizes[nearest] = len(np.unique(image_of[labels == nearest]))
        sizes[small] = 0
        largest = int(sizes.argmax())
        rows = np.flatnonzero(labels == largest)
        labels[rows[_half(points[rows], image_of[rows])]] = small
        for c in (small, largest):
            sizes[c] = len(np.unique(image_of[labels == c]))
    return labels


def _centre(points: np.ndarray) -> np.ndarray:
    return points.mean(axis=0) if len(points) else np.zeros(points.shape[1], points.dtype)


def _half(points: np.ndarray, image_of: np.ndarray) -> np.ndarray:
    """Halve the images along the first principal axis of their points; return a mask of the points of one half."""
    centred = points - points.mean(axis=0)
    axis = centred[(centred**2).sum(axis=1).argmax()]
    for _ in range(8):  # power iterations converge to the first principal axis
        axis = centred.T @ (centred @ axis)
        axis = axis / max(float(np.linalg.norm(axis)), 1e-30)
    images, image_index = np.unique(image_of, return_inverse=True)
    position = np.bincount(image_index, weights=centred @ axis) / np.bincount(image_index)
    selected = np.zeros(len(images), dtype=bool)
    selected[np.argsort(position, kind="stable")[: len(images) // 2]] = True
    return selected[image_index]


def initial_pairs(
    points: Float32[np.ndarray, "R D"],
    image_of: Int64[np.ndarray, " R"],
    labels: Labels,
    clusters: int,
    ipc: int,
    pick: Pick,
    seed: int,
) -> list[int]:
    """Return `ipc` caption records per cluster, cluster by cluster; the records of one cluster have different images.

    `pick` is `nearest` (the records nearest to the cluster centre) or `random`.
    """
    records: list[int] = []
    for c in range(clusters):
        members = np.flatnonzero(labels == c)
        if pick == "nearest":
            centre = points[members].mean(axis=0)
            order = np.argsort(((points[members] - centre) ** 2).sum(axis=1), kind="stable")
        else:
            import torch

            order = torch.randperm(len(members), generator=generator(seed, "cluster pairs", c)).numpy()
        _, first = np.unique(image_of[members[order]], return_index=True)
        records += members[order[np.sort(first)[:ipc]]].tolist()
    return records
