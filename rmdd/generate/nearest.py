"""Find the captions of the dataset that are nearest to generated images, by the cosine of CLIP features.

Shapes: P images, n captions found for each, D features.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image

from rmdd.core.arrays import write_array
from rmdd.core.threads import torch_threads
from rmdd.coresets.rows import Rows
from rmdd.execution.tasks import Values
from rmdd.generate.studio import Studio
from rmdd.models.clip import Clip

BLOCK = 32
"""Number of images that a worker encodes per call."""


class PictureEncoder:
    """A worker that loads a CLIP model once; each call encodes a block of image files and saves the features."""

    def __init__(self, folder: Path, device: torch.device, threads: int):
        self.clip, self.threads = Clip(folder, device), threads

    def __call__(self, item: Values) -> Values:
        with torch_threads(self.threads):
            images = []
            for path in item["pictures"]:
                with Image.open(path) as opened:
                    images.append(opened.convert("RGB"))
            features = self.clip.images(images).cpu().numpy()
        write_array(Path(item["out"]), features)
        return {"pictures": len(images)}


def nearest_captions(
    studio: Studio, clip: Path, pictures: Sequence[Path], texts: Rows, count: int
) -> Int64[np.ndarray, "P n"]:
    """Return the caption records with the highest cosines to each image, highest first.

    For each image, `16 * (count + 1)` records are returned, so that `count` of them usually have different captions.
    """
    starts = range(0, len(pictures), BLOCK)
    items: list[Values] = [
        {
            "pictures": [str(p) for p in pictures[start : start + BLOCK]],
            "out": str(studio.folder / "pairs" / f"clip-{start:06d}.npy"),
        }
        for start in starts
    ]
    make = functools.partial(PictureEncoder, clip, studio.device, studio.run.runtime.threads)
    for _ in studio.stream(f"features of images of phase {studio.phase}", "pictures")(make, items):
        pass
    features = np.concatenate([np.load(item["out"]) for item in items])
    return nearest_rows(features, texts, min(len(texts), 16 * count + 16))


def nearest_rows(queries: Float32[np.ndarray, "P D"], rows: Rows, count: int) -> Int64[np.ndarray, "P n"]:
    """For each query, return the ids of the `count` rows with the highest cosines, by descending cosine, then by id."""
    queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    best = np.zeros((len(queries), 0), np.float32)
    ids = np.zeros((len(queries), 0), np.int64)
    for where, block in rows.chunks():
        block = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
        block_ids = np.broadcast_to(rows.ids[where], (len(queries), len(block)))
        best = np.concatenate([best, queries @ block.T], axis=1)
        ids = np.concatenate([ids, block_ids], axis=1)
        order = np.lexsort((ids, -best), axis=1)[:, :count]
        best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    return ids
