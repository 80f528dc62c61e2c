"""Numerical check of PTM-ST's Proposition 1: on a straight path, the matching gradient changes linearly with the start.

    ratio = |grad L(start + distance) - grad L(start)| / distance   tends to a constant as the distance goes to 0

All gradients are computed in float64 with the same batches and dropout masks. The path `joined` is the original
trajectory with straight lines between its epochs. This path is straight around the start, but it bends at every epoch,
and there is a bend between start and target.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rmdd import config, methods
from rmdd.analyse.setting import Setting, endpoint_of, trajectories_of
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.trajectory.statistics import probing
from rmdd.experts.shortcut import AnchoredPath, Path
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.models.dual import Params
from rmdd.pipeline import Pipeline
from rmdd.report.sheets import Sheet, write_csv

NOTE = (
    "ratio: norm of the difference between the matching gradients at start + distance and at start, divided by the "
    "distance in epochs; by Proposition 1 it tends to a constant as the distance goes to 0. joined: the original "
    "trajectory with straight lines between its epochs"
)


class DoubleStore(Store):
    """A store that returns checkpoints in float64."""

    def read(self, expert: int, epoch: int) -> Params:
        return {n: p.double() for n, p in super().read(expert, epoch).items()}


def joined_path(store: Store, expert: int) -> Path:
    """Return the original trajectory of an expert with straight lines between its epochs."""
    return AnchoredPath({t: store.read(expert, t) for t in range(store.epochs + 1)}, store.norms(expert))


def gradient_changes(
    matcher: Matcher, synthetic: Synthetic, expert: int, start: int | float, steps: list[float]
) -> list[Tensor]:
    """Return, for each `d` in `steps`, how far the matching gradient moves between `start` and `start + d`.

    The distance is the norm of the difference; the gradients of images and texts form one vector.
    """

    def gradient(at: int | float) -> Tensor:
        drawn = dataclasses.replace(matcher.draw(0), expert=expert, start=at, start_text=at)
        both = matcher.gradient(synthetic, drawn).gradient
        return torch.cat([both.images.flatten(), both.texts.flatten()])

    origin = gradient(start)
    return [(gradient(start + d) - origin).norm() for d in steps]


def linearity(
    pipeline: Pipeline,
    *,
    endpoint: int | None = None,
    start: int | float = 0.5,
    halvings: int = 5,
    inner_steps: int = 1,
    shortcut_only: bool = False,
) -> dict[str, Any]:
    """Compute |change of the gradient| / distance for distances of 0.1, 0.05, 0.025, ... epochs, on the first expert.

    `inner_steps` is the number of student steps, 1 in the paper. Write linearity.csv and linearity.svg to the run's
    folder `analyse`; return the rows.
    """
    steps = [0.1 / 2**i for i in range(halvings + 1)]
    reach = pipeline.run.distill.match_epochs
    last = endpoint_of(reach, pipeline.run.experts.epochs, endpoint) - reach
    if not 0 <= start <= last - steps[0]:
        mistake = f"--start {start} and --start + {steps[0]} must lie in 0-{last}; give another --start or --endpoint"
        raise config.ConfigError([mistake], "analyse")
    setting = Setting(pipeline, trajectories_of(shortcut_only), endpoint=endpoint, experts=1)
    store = DoubleStore.open(setting.store.path)
    run = probing(setting.run, setting.endpoint, "shortcut", setting.pairs, 1)
    changes: dict[str, Any] = {"steps": inner_steps, "inner_dropout": "off", "estimator": "exact"}
    changes |= {"precision": "float32", "reuse_graphs": 0}  # "float32" means that nothing is rounded to bfloat16
    run = run.model_copy(update={"distill": run.distill.model_copy(update=changes)})
    synthetic = setting.initial(methods.matching_method(run)).map(Tensor.double)
    ratios: dict[str, list[float]] = {}
    for name in ("shortcut",) if shortcut_only else ("shortcut", "joined"):
        model = expert_model(
            run.model, run.data.image_size, run.seed_of("experts"), 0, setting.train.texts.shape[1]
        ).double()
        matcher = Matcher(methods.matching_method(run), 0, store, model, setting.device)
        if name == "joined":
            matcher.use_path(matcher.experts[0], joined_path(store, matcher.experts[0]))
        lengths = gradient_changes(matcher, synthetic, 0, start, steps)
        ratios[name] = [float(length) / d for length, d in zip(lengths, steps, strict=True)]
    rows = [
        {"trajectory": name, "start": start, "distance": d, "ratio": ratio}
        for name, values in ratios.items()
        for d, ratio in zip(steps, values, strict=True)
    ]
    sheet = Sheet(1, width=4.4)
    xlabel, ylabel = "distance between the starts, in epochs", "ratio: change of the gradient / distance"
    ax = sheet.lines(0, f"linearity at start {start:g}", steps, ratios, xlabel, ylabel)
    ax.set_xscale("log")
    ax.set_yscale("log")
    files = [setting.folder / "linearity.csv", setting.folder / "linearity.svg"]
    write_csv(files[0], rows)
    sheet.save(files[1])
    return {"rows": rows, "note": NOTE, "files": [str(f) for f in files]}
