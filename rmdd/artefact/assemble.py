"""Assemble the distilled set of a run from the results of its phases.

M synthetic texts, T real captions, text features of width F.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd import config
from rmdd.artefact.distilled import DistilledSet, Subset
from rmdd.core.files import read_json
from rmdd.distill.sets import load_set
from rmdd.distill.similarity import per_pair
from rmdd.models.prepared import PreparedSplit
from rmdd.models.text import encoder_identity

CHUNK = 8192
CAPTIONS, PARTS, FACTS = "captions.json", "parts.json", "facts.json"
"""Files of a phase with generated pairs: captions, pretrained models used, and how the pairs were generated."""


def assemble(
    run: config.Run,
    train: PreparedSplit,
    sets: Sequence[Path],
    *,
    experts: str,
    iterations: Sequence[int],
    metrics: dict[str, Any],
    version: str,
) -> DistilledSet:
    """Assemble the distilled set of a run, with its captions, provenance and metrics.

    `sets` is the file of the chosen snapshot of each phase, `iterations` the number of updates of each phase,
    `experts` the hash of the expert store, `version` the version of rmdd. Pairs of a phase that started from noise have
    no real pair as origin.
    """
    seeds = {
        "experts": run.seed_of("experts"),
        "distill": run.seed_of("distill"),
        "evaluate": run.seed_of("evaluate"),
    }
    return DistilledSet(
        subsets=tuple(_subset(path, train, real=run.distill.init != "noise") for path in sets),
        mean=train.mean,
        std=train.std,
        model=run.model.model_dump(mode="json")
        | {"text_encoder": encoder_identity(run.model.text), "temperature": run.student_temperature},
        method=run.distill.method_name,
        loss=run.distill.loss,
        config=portable(run),
        image_size=run.data.image_size,
        provenance=_provenance(seeds, train, sets, experts, iterations, version),
        metrics=metrics,
        order=run.evaluate.order,
        between=run.evaluate.between,
    )


def portable(run: config.Run) -> dict[str, Any]:
    """Return the resolved run file without machine-specific fields: `runtime`, `data.root` and `evaluate.probes`."""
    return run.model_dump(mode="json", exclude={"runtime": True, "data": {"root"}, "evaluate": {"probes"}})


def nearest(queries: Float[Tensor, "M F"], captions: Float[np.ndarray, "T F"], chunk: int = CHUNK) -> Int[Tensor, " M"]:
    """Return for each query the index of the caption with the highest cosine (of several equal ones, the first).

    Reads `chunk` captions at a time.
    """
    unit = torch.nn.functional.normalize(queries.detach().cpu().float(), dim=1)
    best, positions = torch.full((len(unit),), -torch.inf), torch.zeros(len(unit), dtype=torch.int64)
    for begin in range(0, len(captions), chunk):
        rows = torch.nn.functional.normalize(torch.tensor(captions[begin : begin + chunk]).float(), dim=1)
        score, index = (unit @ rows.T).max(1)
        better = score > best
        best = torch.where(better, score, best)
        positions = torch.where(better, index + begin, positions)
    return positions


def _subset(path: Path, train: PreparedSplit, real: bool) -> Subset:
    synthetic, split = load_set(path), train.split
    records: list[int] = read_json(path.parent / "records.json")
    caption_file = path.parent / CAPTIONS
    if caption_file.is_file():  # the distillation method wrote captions of its own
        captions = read_json(caption_file)
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


def _provenance(
    seeds: dict[str, int],
    train: PreparedSplit,
    sets: Sequence[Path],
    experts: str,
    iterations: Sequence[int],
    version: str,
) -> dict[str, Any]:
    data, part_files = train.split.dataset, [path.parent / PARTS for path in sets]
    parts = {part["role"]: part for path in part_files if path.is_file() for part in read_json(path)}
    fact_files = [path.with_name(FACTS) for path in part_files if path.with_name(FACTS).is_file()]
    return {
        "rmdd": version,
        "torch": torch.__version__,
        "data": {
            "hash": data.hash,
            "counts": data.counts,
            "bytes": sum(shard["bytes"] for shard in data.manifest["shards"]),
        },
        "experts": experts,
        "phases": sets[0].parent.parent.name,
        "iterations": list(iterations),
        **({"parts": list(parts.values())} if parts else {}),
        **({"generated": {path.parent.name: read_json(path) for path in fact_files}} if fact_files else {}),
        "seeds": seeds,
    }
