"""Proposition 1 of PTM-ST in numbers: on a straight path the matching gradient changes linearly with the start.

    ratio = |grad L(start + distance) - grad L(start)| / distance   tends to a constant as the distance goes to 0

In float64, with the same batches and masks. `joined` is the original trajectory with straight lines between its epochs:
straight around t as well, but with a bend at every epoch, which a target on the far side of it feels.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rmdd import config, methods
from rmdd.analyse.setting import Setting, chosen, endpoint_of
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
    "ratio: norm of the change of the matching gradient from start to start + distance, over the distance (epochs); "
    "Proposition 1 says that it levels off as the distance goes to 0. joined: the original trajectory, straight "
    "between its epochs"
)


class DoubleStore(Store):
    """A store whose checkpoints come in float64."""

    def read(self, expert: int, epoch: int) -> Params:
        return {n: p.double() for n, p in super().read(expert, epoch).items()}


def joined(store: Store, expert: int) -> Path:
    """The trajectory as trained, with straight lines between its epochs."""
    return AnchoredPath({t: store.read(expert, t) for t in range(store.epochs + 1)}, store.norms(expert))


def changes(
    matcher: Matcher, synthetic: Synthetic, expert: int, start: int | float, steps: list[float]
) -> list[Tensor]:
    """By how much the gradient by pictures and texts changes from `start` to `start + d`, for each d of `steps`."""

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
    """The ratio for a distance of 0.1 epochs and its halves, on the first expert; one student step, as in the paper.

    Writes linearity.csv and linearity.svg to the run's folder `analyse`.
    """
    steps = [0.1 / 2**i for i in range(halvings + 1)]
    reach = pipeline.run.distill.match_epochs
    last = endpoint_of(reach, pipeline.run.experts.epochs, endpoint) - reach
    if not 0 <= start <= last - steps[0]:
        mistake = (
            f"a start at {start} and {steps[0]} beyond it must lie in 0-{last}; give another --start or --endpoint"
        )
        raise config.ConfigError([mistake], "analyse")
    setting = Setting(pipeline, chosen(shortcut_only), endpoint=endpoint, experts=1)
    store = DoubleStore.open(setting.store.path)
    run = probing(setting.run, setting.endpoint, "shortcut", setting.pairs, 1)
    once: dict[str, Any] = {"steps": inner_steps, "inner_dropout": "off", "estimator": "exact"}
    once |= {"precision": "float32", "reuse_graphs": 0}  # float32: no rounding to bfloat16 on the way
    run = run.model_copy(update={"distill": run.distill.model_copy(update=once)})
    synthetic = setting.initial(methods.matching_method(run)).map(Tensor.double)
    ratios: dict[str, list[float]] = {}
    for name in ("shortcut",) if shortcut_only else ("shortcut", "joined"):
        model = expert_model(
            run.model, run.data.image_size, run.seed_of("experts"), 0, setting.train.texts.shape[1]
        ).double()
        matcher = Matcher(methods.matching_method(run), 0, store, model, setting.device)
        if name == "joined":
            matcher.use_path(matcher.experts[0], joined(store, matcher.experts[0]))
        lengths = changes(matcher, synthetic, 0, start, steps)
        ratios[name] = [float(length) / d for length, d in zip(lengths, steps, strict=True)]
    rows = [
        {"trajectory": name, "start": start, "distance": d, "ratio": ratio}
        for name, of_one in ratios.items()
        for d, ratio in zip(steps, of_one, strict=True)
    ]
    sheet = Sheet(1, width=4.4)
    xlabel, ylabel = "distance, epochs between the starts", "ratio: change of the gradient / distance"
    ax = sheet.lines(0, f"linear in the start? start {start:g}", steps, ratios, xlabel, ylabel)
    ax.set_xscale("log")
    ax.set_yscale("log")
    files = [setting.folder / "linearity.csv", setting.folder / "linearity.svg"]
    write_csv(files[0], rows)
    sheet.save(files[1])
    return {"rows": rows, "note": NOTE, "files": [str(f) for f in files]}
