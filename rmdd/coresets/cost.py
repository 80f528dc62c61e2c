"""The size of real pairs in bytes (encoded image and caption) and in parameters (pixels and text-embedding values).

An image chosen with two captions counts once in bytes and twice in parameters, as in the papers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from rmdd.config.budget import pair_parameters
from rmdd.core.arrays import write_array
from rmdd.data.splits import Split


@dataclass(frozen=True)
class ByteCosts:
    """Sizes in bytes of every encoded image and of every caption (in UTF-8) of a split."""

    images: Int64[np.ndarray, " N"]
    captions: Int64[np.ndarray, " T"]
    image_of: Int64[np.ndarray, " T"]

    @classmethod
    def of(cls, split: Split, cache: Path) -> "ByteCosts":
        """Return the sizes for a split; image sizes are read from the shards once and kept in the folder `cache`."""
        file = cache / f"image-bytes-{split.dataset.hash[:16]}-{split.name}.npy"
        if not file.is_file():
            write_array(file, _image_bytes(split))
        captions = np.array([len(c.encode()) for c in split.captions], np.int64)
        return cls(np.load(file)[split.rows], captions, split.image_of)

    def bytes_of(self, records: Sequence[int]) -> dict[str, int]:
        """Return how many bytes the images and captions of the caption records `records` take, and the `total`."""
        images = int(self.images[np.unique(self.image_of[list(records)])].sum()) if records else 0
        captions = int(self.captions[list(records)].sum()) if records else 0
        return {"images": images, "captions": captions, "total": images + captions}

    def within(self, records: Iterable[int], limit: int) -> Iterator[int]:
        """Yield caption records in order until the next one would exceed `limit` bytes of images and captions."""
        counted: set[int] = set()
        for record in records:
            image = int(self.image_of[record])
            limit -= int(self.captions[record]) + (0 if image in counted else int(self.images[image]))
            if limit < 0:
                return
            counted.add(image)
            yield record


def _image_bytes(split: Split) -> Int64[np.ndarray, " rows"]:
    """Return the size in bytes of the encoded image in every shard row of a split."""
    sizes = [np.zeros(0, np.int64)]
    for shard in split.dataset.manifest["shards"]:
        if shard["split"] == split.name:
            with pq.ParquetFile(split.dataset.path / shard["file"]) as file:
                for batch in file.iter_batches(batch_size=64, columns=["image"]):
                    sizes.append(pc.binary_length(batch.column("image")).to_numpy(zero_copy_only=False))
    return np.concatenate(sizes).astype(np.int64)


def parameters(pairs: int, image_size: int, text_width: int) -> int:
    """Return the number of parameters of `pairs` real pairs: pixel values and text-embedding values."""
    return pairs * pair_parameters(image_size, text_width)
