"""Health of a run over its distillation: its sets, random real pairs and val through one fixed encoder."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.distill import similarity
from rmdd.distill.phases import real_images
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.evaluate.health import collapsed, health, stripes
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

MOST = 5_000
"""Most pairs of val that are looked at."""

Batch = tuple[Tensor, Tensor]


def checkup(
    run: config.Run,
    model: DualEncoder,
    sets: Sequence[tuple[tuple[int, ...], Sequence[Synthetic]]],
    train: PreparedSplit,
    val: PreparedSplit,
    device: torch.device,
) -> dict[str, Any]:
    """Rows of health and warnings. `sets` gives, oldest first, the iteration of each phase and their sets, which are
    seen as one; random pairs are as many, the first ones that the baseline draws."""
    model = model.to(device).eval()
    rows: list[dict[str, Any]] = []
    for iterations, subsets in sets:
        row = {"set": "distilled", "iterations": list(iterations)} | _seen(run, model, _of_sets(run, subsets), device)
        learned = [similarity.dense(s.similarity, s.alpha, s.texts) for s in subsets]
        rows.append(row | {"stripes": sum(map(stripes, learned)) / len(learned)})
    pairs = int(rows[-1]["pairs"])
    records = torch.randperm(len(train.split.captions), generator=generator(run.seed_of("evaluate"), "random pairs", 0))
    real = {"set": "random pairs"} | _seen(run, model, _of_records(run, train, records[:pairs]), device)
    first = torch.from_numpy(val.split.image_of).diff(prepend=torch.tensor([-1])).nonzero().flatten()
    chosen = torch.randperm(len(first), generator=generator(run.seed_of("evaluate"), "health of val"))[:MOST]
    whole = {"set": "val"} | _seen(run, model, _of_records(run, val, first[chosen.sort().values]), device)
    told = collapsed(rows[-1], real)
    return {"schema_version": 1, "rows": [*rows, real, whole], "warnings": told}


def _seen(run: config.Run, model: DualEncoder, batches: Iterator[Batch], device: torch.device) -> dict[str, float]:
    embedded = []
    with torch.no_grad():
        for images, texts in batches:
            embedded.append((model.embed_images(images.to(device)).cpu(), model.embed_texts(texts.to(device)).cpu()))
    images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
    return health(images, texts, run.seed_of("evaluate"))


def _of_sets(run: config.Run, subsets: Sequence[Synthetic]) -> Iterator[Batch]:
    for subset in subsets:
        for i in range(0, len(subset.texts), run.evaluate.chunk):
            part = slice(i, i + run.evaluate.chunk)
            yield enlarged(subset.images[part], run.data.image_size), subset.texts[part]


def _of_records(run: config.Run, prepared: PreparedSplit, records: Int[Tensor, " N"]) -> Iterator[Batch]:
    for part in records.split(run.evaluate.chunk):
        images: Float[Tensor, "n 3 S S"] = normalise(
            real_images(run, prepared, part.tolist()), prepared.mean, prepared.std
        )
        yield images, torch.tensor(prepared.texts[part.numpy()])
