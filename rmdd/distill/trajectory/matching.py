"""Meta-gradients of one phase: draw a start, unroll a student, and differentiate its distance to the target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rmdd import config
from rmdd.distill.chain import iterations_of_earlier_phases, path_start_file, read_path_start
from rmdd.distill.phases import Draw, Ranges, Window
from rmdd.distill.synthetic import Synthetic, enlarged
from rmdd.distill.trajectory.frozen import features_of, to_pixels
from rmdd.distill.unroll import Engine, MetaGradient, StudentLoss, forward_suits, meta_gradient
from rmdd.experts import shortcut
from rmdd.experts.store import Store
from rmdd.models.dual import TOWERS, DualEncoder, Params, tower_of
from rmdd.models.image import matching_context
from rmdd.models.prepared import PreparedSplit

PATH_BYTES = 4 * 2**30
"""Memory limit in bytes for expert paths; above it, the oldest path is dropped, and read again when needed."""


@runtime_checkable
class Matched(Protocol):
    """Interface that a trajectory-matching method implements; see `rmdd.methods.trajectory.Method`."""

    run: config.Run

    def on(self, run: config.Run) -> "Matched":
        """Return a copy of this distillation method that uses the settings of `run`."""
        ...

    def records(self, phase: int, train: PreparedSplit) -> list[int]: ...

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic: ...

    def path(self, store: Store, expert: int, phase: int, path_start: Params | None = None) -> shortcut.Path: ...

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]: ...

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw: ...

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss: ...

    def corrected(self, matched: MetaGradient, start: Params, target: Params) -> MetaGradient: ...


class Matcher:
    """Computes the meta-gradients of one phase; holds the student model and the experts' paths.

    `folder` is the folder of the phase; only chained phases (`rmdd.distill.chain`) read it, to get the starts of paths.
    """

    def __init__(
        self,
        method: Matched,
        phase: int,
        store: Store,
        model: DualEncoder,
        device: torch.device,
        folder: Path = Path(),
    ):
        self.method, self.run = method, method.run
        self.phase, self.store, self.device, run = phase, store, device, method.run
        self.experts = [e for e in store.complete() if e < run.experts.num]
        if len(self.experts) < run.experts.num:
            raise ValueError(
                f"the run asks for {run.experts.num} experts but the store at {store.path} holds {len(self.experts)} "
                "finished ones; train the rest with `rmdd experts`"
            )
        self.model = model.to(device).train()  # `train()` leaves a frozen tower in eval mode
        self.frozen_tower = None if run.model.image.trainable else self._features
        self.student = self.model if self.frozen_tower is None else self.model.on_features()
        self._engine: Engine | None = None
        self.ranges: Ranges = dict(self.method.ranges(store, self.experts, phase))
        self._paths: dict[int, shortcut.Path] = {}
        self._endpoint: int | None = None
        self.folder, self._earlier = folder, iterations_of_earlier_phases(run.distill, phase, 0)

    def _features_of_pairs(self, synthetic: Synthetic, drawn: Draw) -> Synthetic:
        assert self.frozen_tower is not None
        return features_of(self.frozen_tower, synthetic, drawn.batches)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.image_tower(enlarged(images, self.run.data.image_size))
        return features

    def engine(self, synthetic: Synthetic) -> Engine:
        """Return the engine options; forward or reverse mode is chosen once per phase.

        The choice depends only on the first draw and the initial set, so a resumed phase makes the same choice. With
        `fresh_mask` dropout, the mode is reverse: the check of forward mode needs equal masks in two evaluations.
        """
        if self._engine is None:
            rule = self.run.distill
            engine = Engine(
                precision=rule.precision, trajectory=self.run.runtime.keep_parameters, reuse=rule.reuse_graphs
            )
            drawn = self.draw(0)
            start, _ = self.segment(drawn)
            with matching_context(self.model):
                inputs = synthetic if self.frozen_tower is None else self._features_of_pairs(synthetic, drawn)
                suits = rule.inner_dropout != "fresh_mask" and forward_suits(
                    self.method.student_loss(self.student, drawn),
                    start,
                    inputs,
                    drawn.batches[0].to(self.device),
                    estimator=rule.estimator,
                    precision=rule.precision,
                )
            self._engine = replace(engine, second_pass="forward" if suits else "reverse")
        return self._engine

    def draw(self, iteration: int) -> Draw:
        return self.method.draw(self.phase, iteration, len(self.experts), self.ranges)

    def path(self, expert: int) -> shortcut.Path:
        if expert not in self._paths:
            if self._endpoint is None:
                files = [path_start_file(self.folder, expert, self._earlier)] if self._earlier else []
                self._paths[expert] = self.method.path(self.store, expert, self.phase, *map(read_path_start, files))
            else:
                self._paths[expert] = shortcut.open_path(self.store, expert, self.run.distill, self._endpoint)
            checkpoint = 4 * sum(math.prod(shape) for shape in self.store.shapes.values())  # size in bytes
            while len(self._paths) > 1 and checkpoint * sum(p.vectors for p in self._paths.values()) > PATH_BYTES:
                self._paths.pop(next(iter(self._paths)))
        return self._paths[expert]

    def set_window(self, window: Window) -> None:
        """Use `window` from now on: start epochs are drawn from its range, and paths lead to its endpoint."""
        self.ranges = {tower: (window.low, window.stop) for tower in TOWERS}
        if window.endpoint != self._endpoint:
            self._endpoint = window.endpoint
            self._paths.clear()

    def use_path_starts(self, iteration: int) -> None:
        """Use the path starts that the schedule sets for the update after `iteration`."""
        now = iterations_of_earlier_phases(self.run.distill, self.phase, iteration)
        if now != self._earlier:
            self._earlier = now
            self._paths.clear()

    def use_path(self, expert: int, path: shortcut.Path) -> None:
        """Match expert `expert` along `path` instead of the path that the method opens."""
        self._paths[expert] = path

    def segment(self, drawn: Draw) -> tuple[Params, Params]:
        """Return the start and target parameters of the student; the two towers may be at different epochs."""
        path, ahead = self.path(self.experts[drawn.expert]), self.run.distill.match_epochs
        ends = []
        for image, text in ((drawn.start, drawn.start_text), (drawn.start + ahead, drawn.start_text + ahead)):
            point = path.at(image)
            if text != image:
                point = point | {n: p for n, p in path.at(text).items() if tower_of(n) == "text"}
            ends.append({n: p.to(self.device, non_blocking=True) for n, p in point.items()})
        return ends[0], ends[1]

    def gradient(
        self, synthetic: Synthetic, drawn: Draw, estimator: Literal["exact", "first_order"] | None = None
    ) -> MetaGradient:
        """Compute the meta-gradient of one draw; `estimator` defaults to the estimator of the run."""
        rule, engine = self.run.distill, self.engine(synthetic)
        start, target = self.segment(drawn)
        batches = drawn.batches.to(self.device, non_blocking=True)
        with matching_context(self.model):
            inputs = synthetic if self.frozen_tower is None else self._features_of_pairs(synthetic, drawn)
            matched = meta_gradient(
                self.method.student_loss(self.student, drawn),
                start,
                target,
                inputs,
                batches,
                estimator=estimator or rule.estimator,
                branches=rule.branches,
                engine=engine,
            )
            if self.frozen_tower is not None:
                matched = to_pixels(self.frozen_tower, synthetic, drawn.batches, matched)
        return self.method.corrected(matched, start, target)
