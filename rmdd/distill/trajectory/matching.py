"""Meta-gradients of one phase: a draw, a student unrolled from it, its miss to the target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rmdd import config
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
"""Checkpoints of experts held in memory at most; beyond it the one opened first is read again when its turn comes."""


@runtime_checkable
class Matched(Protocol):
    """What matching asks of a method; `rmdd.methods.trajectory.Method` has it."""

    run: config.Run

    def on(self, run: config.Run) -> "Matched":
        """The same method of another run."""
        ...

    def records(self, phase: int, train: PreparedSplit) -> list[int]: ...

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic: ...

    def path(self, store: Store, expert: int, phase: int) -> shortcut.Path: ...

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]: ...

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw: ...

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss: ...

    def corrected(self, found: MetaGradient, start: Params, target: Params) -> MetaGradient: ...


class Matcher:
    """One phase's meta-gradients: the model, built once, and the experts' paths, opened once each."""

    def __init__(self, method: Matched, phase: int, store: Store, model: DualEncoder, device: torch.device):
        self.method, self.run = method, method.run
        self.phase, self.store, self.device, run = phase, store, device, method.run
        self.experts = [e for e in store.complete() if e < run.experts.num]
        if len(self.experts) < run.experts.num:
            raise ValueError(
                f"the run asks for {run.experts.num} experts but the store at {store.path} holds {len(self.experts)} "
                "finished ones; train the rest with `rmdd experts`"
            )
        self.model = model.to(device).train()  # a frozen tower stays in eval mode
        self.frozen_tower = None if run.model.image.trainable else self._features
        self.student = self.model if self.frozen_tower is None else self.model.on_features()
        self._engine: Engine | None = None
        self.ranges: Ranges = dict(self.method.ranges(store, self.experts, phase))
        self._paths: dict[int, shortcut.Path] = {}
        self._endpoint: int | None = None

    def _seen(self, synthetic: Synthetic, drawn: Draw) -> Synthetic:
        assert self.frozen_tower is not None
        return features_of(self.frozen_tower, synthetic, drawn.batches)

    def _features(self, images: Tensor) -> Tensor:
        return self.model.image_tower(enlarged(images, self.run.data.image_size))

    def engine(self, synthetic: Synthetic) -> Engine:
        """How to differentiate, settled once by the first draw of the phase and the set that it begins with.

        So a phase that goes on after a kill settles it as it did before. Fresh masks need reverse mode, for forward
        mode is tried by asking for the same loss again.
        """
        if self._engine is None:
            rule = self.run.distill
            engine = Engine(
                precision=rule.precision, trajectory=self.run.runtime.keep_parameters, reuse=rule.reuse_graphs
            )
            drawn = self.draw(0)
            start, _ = self.segment(drawn)
            with matching_context(self.model):
                seen = synthetic if self.frozen_tower is None else self._seen(synthetic, drawn)
                suits = rule.inner_dropout != "fresh_mask" and forward_suits(
                    self.method.student_loss(self.student, drawn),
                    start,
                    seen,
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
                self._paths[expert] = self.method.path(self.store, expert, self.phase)
            else:
                self._paths[expert] = shortcut.open_path(self.store, expert, self.run.distill, self._endpoint)
            one = 4 * sum(math.prod(shape) for shape in self.store.shapes.values())
            while len(self._paths) > 1 and one * sum(p.vectors for p in self._paths.values()) > PATH_BYTES:
                self._paths.pop(next(iter(self._paths)))
        return self._paths[expert]

    def look_through(self, window: Window) -> None:
        """Draw from the range of `window`, and match along paths to its endpoint."""
        self.ranges = {tower: (window.low, window.stop) for tower in TOWERS}
        if window.endpoint != self._endpoint:
            self._endpoint = window.endpoint
            self._paths.clear()

    def use_path(self, expert: int, path: shortcut.Path) -> None:
        """Match `expert` along another path than the method's."""
        self._paths[expert] = path

    def segment(self, drawn: Draw) -> tuple[Params, Params]:
        """Where the student starts and what it should reach; each tower at its own epoch."""
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
        """The meta-gradient of one draw, by the run's estimator or another."""
        rule, engine = self.run.distill, self.engine(synthetic)
        start, target = self.segment(drawn)
        batches = drawn.batches.to(self.device, non_blocking=True)
        with matching_context(self.model):
            seen = synthetic if self.frozen_tower is None else self._seen(synthetic, drawn)
            found = meta_gradient(
                self.method.student_loss(self.student, drawn),
                start,
                target,
                seen,
                batches,
                estimator=estimator or rule.estimator,
                branches=rule.branches,
                engine=engine,
            )
            if self.frozen_tower is not None:
                found = to_pixels(self.frozen_tower, synthetic, drawn.batches, found)
        return self.method.corrected(found, start, target)
