"""The trajectory-matching loop of one phase: draw, unroll a student, update the set (`rmdd.distill.loop`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmdd.distill.loop import State, Step, outer_step, run_phase
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.adaptive import adapted
from rmdd.distill.trajectory.matching import Matched, Matcher
from rmdd.experts.store import Store
from rmdd.models.dual import DualEncoder


class Matching:
    """Computes the updates of a trajectory-matching phase (a `Stepper` of `rmdd.distill.loop`)."""

    def __init__(self, matcher: Matcher, initial: Synthetic):
        self.matcher, self.rule = matcher, matcher.run.distill
        matcher.engine(initial)

    def step(self, state: State) -> Step:
        state = adapted(self.matcher, state) if self.rule.plan.kind == "adaptive" else state
        self.matcher.use_path_starts(state.iteration)
        drawn = self.matcher.draw(state.iteration)
        matched = self.matcher.gradient(state.raw, drawn)
        expert = self.matcher.experts[drawn.expert]
        return Step(
            before=state,
            after=outer_step(state, matched.gradient, self.rule),
            loss=matched.loss,
            numbers={**{f"miss_{tower}": m for tower, m in matched.miss.items()}, "student_loss": matched.student_loss},
            facts={"start": drawn.start, "start_text": drawn.start_text, "expert": expert},
            drawn=f"expert {expert}, start epoch {drawn.start}",
        )

    def accept(self, state: State) -> None:
        pass

    def learned(self) -> dict[str, Tensor]:
        return {}

    def restore(self, learned: dict[str, Tensor]) -> None:
        pass


def distill_phase(
    method: Matched,
    phase: int,
    store: Store,
    model: DualEncoder,
    initial: Synthetic,
    folder: Path,
    device: torch.device,
    key: str,
    on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    until: int | None = None,
) -> bool:
    """Distil one phase by matching trajectories; see `rmdd.distill.loop.run_phase`."""

    def stepper(initial: Synthetic) -> Matching:
        return Matching(Matcher(method, phase, store, model, device, folder), initial)

    rule = method.run.distill
    return run_phase(rule, phase, initial, folder, device, key, stepper, on_step, should_stop, until=until)
