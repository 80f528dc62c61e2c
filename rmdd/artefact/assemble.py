"""From the phases of a run to its distilled set.

M synthetic texts, T real captions, F text feature width.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import rmdd
from rmdd import config
from rmdd.artefact.distilled import DistilledSet, Subset
from rmdd.core.files import read_json
from rmdd.data.shards import Dataset
from rmdd.distill.similarity import per_pair
from rmdd.distill.trajectory.matching import load_set
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import encoder_identity
from rmdd.runs.tasks import Item

CHUNK = 8192
CAPTIONS, PARTS, FACTS = "captions.json", "parts.json", "facts.json"
"""In the folder of a generated phase: the strings of its pairs, the pretrained parts that made it, and how it went."""


def assemble(item: Item, train: PreparedSplit, evaluation: dict[str, Any]) -> DistilledSet:
    """The set that `evaluation` chose, with its captions, its origin and its numbers.

    `item.iterations` names the snapshot of each phase. A phase that began from noise has no source pairs.
    """
    run = item.run
    return DistilledSet(
        subsets=tuple(_subset(item, train, p) for p in range(len(run.distill.phases))),
        mean=train.mean,
        std=train.std,
        model=run.model.model_dump(mode="json")
        | {"text_encoder": encoder_identity(run.model.text), "temperature": run.student_temperature},
        method=run.distill.method_name,
        loss=run.distill.loss,
        config=portable(run),
        image_size=run.data.image_size,
        provenance=_provenance(item),
        metrics=evaluation["table"],
    )


def portable(run: config.Run) -> dict[str, Any]:
    """The resolved run without the fields that name places: `runtime`, `data.root` and `evaluate.probes`."""
    return run.model_dump(mode="json", exclude={"runtime": True, "data": {"root"}, "evaluate": {"probes"}})


def nearest(queries: Float[Tensor, "M F"], captions: Float[np.ndarray, "T F"], chunk: int = CHUNK) -> Int[Tensor, " M"]:
    """For each query the caption with the highest cosine, the first of equals; reads `chunk` captions at a time."""
    unit = torch.nn.functional.normalize(queries.detach().cpu().float(), dim=1)
    best, where = torch.full((len(unit),), -torch.inf), torch.zeros(len(unit), dtype=torch.int64)
    for begin in range(0, len(captions), chunk):
        rows = torch.nn.functional.normalize(torch.tensor(captions[begin : begin + chunk]).float(), dim=1)
        score, index = (unit @ rows.T).max(1)
        better = score > best
        best = torch.where(better, score, best)
        where = torch.where(better, index + begin, where)
    return where


def _subset(item: Item, train: PreparedSplit, phase: int) -> Subset:
    synthetic = load_set(item.places.set(phase, item.iterations[phase]))
    records: list[int] = read_json(item.places.phase(phase) / "records.json")
    split, real = train.split, item.run.distill.init != "noise"
    written = item.places.phase(phase) / CAPTIONS
    if written.is_file():  # pairs that carry their own strings
        captions = read_json(written)
    else:
        captions = [split.captions[i] for i in nearest(synthetic.texts, train.texts).tolist()]
    return Subset(
        images=synthetic.images,
        texts=synthetic.texts,
        similarity=per_pair(synthetic.similarity),
        alpha=synthetic.alpha,
        lr_image=float(synthetic.lr_image),
        lr_text=float(synthetic.lr_text),
        captions=captions,
        source_ids=[split.pair_ids[split.image_of[r]] if real else "" for r in records],
        captions_before=[split.captions[r] for r in records] if real else (),
    )


def _provenance(item: Item) -> dict[str, Any]:
    run, data = item.run, Dataset.open(item.places.data)
    asked = [item.places.phase(p) / PARTS for p in range(len(run.distill.phases))]
    parts = {part["role"]: part for path in asked if path.is_file() for part in read_json(path)}
    told = [path.with_name(FACTS) for path in asked if path.with_name(FACTS).is_file()]
    return {
        "rmdd": rmdd.__version__,
        "torch": torch.__version__,
        "data": {
            "hash": data.hash,
            "counts": data.counts,
            "bytes": sum(shard["bytes"] for shard in data.manifest["shards"]),
        },
        "experts": item.places.store.name,
        "phases": item.places.phases.name,
        "iterations": list(item.iterations),
        **({"parts": list(parts.values())} if parts else {}),
        **({"generated": {path.parent.name: read_json(path) for path in told}} if told else {}),
        "seeds": {
            "experts": run.seed_of("experts"),
            "distill": run.seed_of("distill"),
            "evaluate": run.seed_of("evaluate"),
        },
    }
