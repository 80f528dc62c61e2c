"""EVLF's fused latents of all caption records of the train split, computed in blocks by workers.

Shapes: n caption records of a block, D numbers of a latent.
"""

import functools
from pathlib import Path

import numpy as np
import torch

from rmdd.core.arrays import in_chunks, write_array
from rmdd.core.storage import open_storage
from rmdd.core.threads import torch_threads
from rmdd.coresets.rows import RowBlock, Rows
from rmdd.data.splits import squashed
from rmdd.execution.tasks import Values
from rmdd.generate.diffusion import as_signed
from rmdd.generate.evlf_tuning import FusionRule, fusion_of
from rmdd.generate.stable_diffusion import diffusion_of
from rmdd.generate.studio import Studio
from rmdd.generate.tuning import read_tuned, use_tuned
from rmdd.models.prepared import SplitSource

BLOCK = 512
"""Number of caption records in a block; the fused latents of a block form one file."""
BATCH = 16


class FusionEncoder:
    """A worker that fuses one block of caption records per call, and saves the scaled latents (n, D) as float16."""

    def __init__(
        self,
        splits: SplitSource,
        threads: int,
        generator: Path,
        rule: FusionRule,
        size: int,
        seed: int,
        tuned: Path | None,
        folder: Path,
    ):
        self.split, self.folder, self.threads = splits.open("train").split, folder, threads
        self.data = splits.data.model_copy(update={"image_size": size})
        self.diffusion = diffusion_of(generator, splits.device)
        self.fusion, _ = fusion_of(rule, self.diffusion, size, seed)
        self.fusion.eval()
        if tuned is not None:
            read = read_tuned(tuned)
            use_tuned(self.fusion, {n.removeprefix("fusion."): t for n, t in read.items() if n.startswith("fusion.")})

    def __call__(self, values: Values) -> Values:
        first = values["block"] * BLOCK
        records = np.arange(first, min(first + BLOCK, len(self.split.captions)))
        with torch_threads(self.threads):
            rows = in_chunks(self.fused, records, BATCH)
        if not np.isfinite(rows).all():
            raise ValueError("fused latents are not finite; lower the learning rates in distill.options.fusion")
        write_array(_file(self.folder, values["block"]), rows)
        return {"pairs": len(records)}

    @torch.inference_mode()
    def fused(self, records: np.ndarray) -> np.ndarray:
        """Return the fused latents of caption records as rows; each image is encoded once."""
        images, positions = np.unique(self.split.image_of[records], return_inverse=True)
        pictures = np.stack([squashed(self.split.encoded(int(i)), self.data) for i in images])
        latents = self.diffusion.latents(as_signed(torch.from_numpy(pictures).to(self.diffusion.device)))
        texts = self.diffusion.texts([self.split.captions[r] for r in records])
        fused = self.fusion(latents[torch.from_numpy(positions).to(latents.device)], texts.tokens, texts.padding)
        return (fused * self.diffusion.scale).flatten(1).cpu().numpy().astype(np.float16)


def fused_rows(studio: Studio, generator: Path, rule: FusionRule, size: int, tuned: Path | None, folder: Path) -> Rows:
    """Return the fused latents of all caption records of the train split; files that `folder` lacks are computed."""
    storage, count = open_storage(studio.run.runtime), len(studio.train.split.captions)
    storage.fetch(folder)
    blocks = range(-(-count // BLOCK))
    todo: list[Values] = [{"block": b} for b in blocks if not _file(folder, b).is_file()]
    splits, threads = studio.feature_source.splits, studio.run.runtime.threads
    make = functools.partial(FusionEncoder, splits, threads, generator, rule, size, studio.seed, tuned, folder)
    for _ in studio.stream("fused latents", "pairs")(make, todo):
        pass
    storage.fetch(folder)
    parts: list[RowBlock] = []
    for block in blocks:
        rows = np.load(_file(folder, block), mmap_mode="r")
        parts.append((np.arange(block * BLOCK, block * BLOCK + len(rows)), rows))
    return Rows(tuple(parts), parts[0][1].shape[1])


def _file(folder: Path, block: int) -> Path:
    return folder / f"{block:06d}.npy"
