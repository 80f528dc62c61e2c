"""Health report: whether the embeddings of a run's snapshots have collapsed, compared with those of real pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd.core.seeding import generator
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.health import collapsed, health, stripes
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

MAX_VAL_PAIRS = 5_000
"""Largest number of image-caption pairs of the val split that are embedded."""

Batch = tuple[Tensor, Tensor]


def health_report(
    model: DualEncoder,
    sets: Sequence[tuple[tuple[int, ...], Sequence[Synthetic]]],
    train: PreparedSplit,
    val: PreparedSplit,
    device: torch.device,
    seed: int,
    chunk: int,
    image_size: int,
) -> dict[str, Any]:
    """Return the content of `health.json`: warnings, and health statistics of snapshots, random pairs and val.

    `sets` lists the snapshots, oldest first. A snapshot holds the iteration of each phase and the subsets of all
    phases; its statistics are computed over all its pairs. The last snapshot is compared with an equal number of random
    pairs, the first ones in draw 0 of the random-pairs baseline. `seed` is the seed of the evaluation.
    """
    model = model.to(device).eval()

    def health_of(batches: Iterator[Batch]) -> dict[str, float]:
        images, texts = _embedded(model, batches, device)
        return health(images, texts, seed)

    rows: list[dict[str, Any]] = []
    for iterations, subsets in sets:
        row = {"set": "distilled", "iterations": list(iterations)} | health_of(_of_sets(subsets, image_size, chunk))
        learned = [similarity.dense(s.similarity, s.alpha, s.texts) for s in subsets]
        rows.append(row | {"stripes": sum(map(stripes, learned)) / len(learned)})
    pairs = int(rows[-1]["pairs"])
    records = torch.randperm(len(train.split.captions), generator=generator(seed, "random pairs", 0))
    real = {"set": "random pairs"} | health_of(_of_records(train, records[:pairs], chunk))
    first = torch.from_numpy(val.split.image_of).diff(prepend=torch.tensor([-1])).nonzero().flatten()
    chosen = torch.randperm(len(first), generator=generator(seed, "health of val"))[:MAX_VAL_PAIRS]
    val_row = {"set": "val"} | health_of(_of_records(val, first[chosen.sort().values], chunk))
    return {"schema_version": 1, "rows": [*rows, real, val_row], "warnings": collapsed(rows[-1], real)}


def _embedded(model: DualEncoder, batches: Iterator[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
    embedded = []
    with torch.no_grad():
        for images, texts in batches:
            embedded.append((model.embed_images(images.to(device)).cpu(), model.embed_texts(texts.to(device)).cpu()))
    images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
    return images, texts


def _of_sets(subsets: Sequence[Synthetic], size: int, chunk: int) -> Iterator[Batch]:
    for subset in subsets:
        for i in range(0, len(subset.texts), chunk):
            part = slice(i, i + chunk)
            yield enlarged(subset.images[part], size), subset.texts[part]


def _of_records(prepared: PreparedSplit, records: Int[Tensor, " N"], chunk: int) -> Iterator[Batch]:
    for part in records.split(chunk):
        images: Float[Tensor, "n 3 S S"] = prepared.pictures(prepared.split.image_of[part.numpy()])
        yield images, torch.tensor(prepared.texts[part.numpy()])
