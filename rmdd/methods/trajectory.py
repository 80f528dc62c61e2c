"""Base class of trajectory-matching methods: a student trained on the set should end where an expert ended."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rmdd import config
from rmdd.config.distill import OF_REACH
from rmdd.config.recipes import Family
from rmdd.config.runfile import Clash
from rmdd.core.files import write_json
from rmdd.distill import phases
from rmdd.distill.phases import Draw
from rmdd.distill.sets import load_set, save_set
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.trajectory.stepping import distill_phase
from rmdd.distill.unroll import MetaGradient, StudentLoss
from rmdd.experts import shortcut
from rmdd.experts.store import Store
from rmdd.methods.base import BaseMethod, Curves
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.prepared import PreparedSplit

if TYPE_CHECKING:
    import torch

    from rmdd.execution.parts import WorkerParts

START = "start.safetensors"


class Method(BaseMethod):
    """A method that runs in the trajectory-matching loop.

    Most methods only set `defaults`. Other methods override one of the functions `records`, `initial`, `path`,
    `ranges`, `draw`, `student_loss` and `corrected`.
    """

    family: ClassVar[Family] = "trajectory"
    unrolls: ClassVar[bool] = True
    learns_rates: ClassVar[bool] = True
    phase_fields: ClassVar[tuple[str, ...]] = tuple(config.Phase.model_fields)
    grows: ClassVar[bool] = False
    """Whether the range of start epochs grows from iteration to iteration."""

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def real_starts(cls, rule: config.Distill) -> bool:
        return rule.plan.kind == "adaptive"

    @classmethod
    def starts_apart(cls, rule: config.Distill) -> bool:
        """Return whether the start epochs of the two towers are drawn independently."""
        return False

    @classmethod
    def states_ranges(cls, rule: config.Distill) -> bool:
        """Return whether start epochs are drawn from the ranges in `distill.phases`."""
        return True

    @classmethod
    def endpoint_of(cls, rule: config.Distill, epochs: int, phase: int) -> int:
        plan = rule.phases[phase]
        if rule.trajectory == "convexified":
            return epochs
        if rule.trajectory == "shortcut":
            return plan.endpoint - (rule.endpoint_rule == "exclusive")
        return rule.reach(plan)

    @classmethod
    def clashes_of_family(cls, rule: config.Distill, experts: config.Experts, runtime: config.Runtime) -> list[Clash]:
        mistakes = _of_rule(cls, rule) + _of_phases(cls, rule)
        if rule.path_start == "student" and (rule.trajectory != "shortcut" or rule.plan.kind == "adaptive"):
            text = (
                "distill.path_start: student replaces the start of a shortcut to a fixed endpoint; set "
                "distill.trajectory: shortcut and do not set distill.phases: adaptive"
            )
            mistakes.append(Clash(text, "distill.path_start", "distill.trajectory", "distill.phases", "plan.kind"))
        chained = rule.path_start == "student" or rule.plans_chain
        if chained and "path_start" not in inspect.signature(cls.path).parameters:
            text = (
                f"distill.method {rule.method} cannot chain phases, because its `path` has no argument `path_start`; "
                "set distill.path_start: theta_0 and, for planned phases, distill.plan.chain: false"
            )
            mistakes.append(Clash(text, "distill.method", "distill.path_start", "distill.phases", "plan.chain"))
        if rule.inner_dropout == "fresh_mask" and runtime.keep_parameters == "recompute":
            text = (
                "runtime.keep_parameters: recompute repeats steps of the first pass, but distill.inner_dropout: "
                "fresh_mask would draw different masks; change one of them"
            )
            mistakes.append(Clash(text, "runtime.keep_parameters", "distill.inner_dropout"))
        for p, phase in enumerate(rule.phases):
            last = rule.reach(phase)
            if rule.trajectory == "convexified" and last > experts.epochs:
                stop = phase.stop - last + experts.epochs
                text = (
                    f"distill.phases.{p} needs epoch {last}, but the path ends at experts.epochs {experts.epochs}; "
                    f"set distill.phases.{p}.stop to {stop} or train longer"
                )
                mistakes.append(Clash(text, "distill.trajectory", "experts.epochs", *OF_REACH))
        if rule.trajectory == "original" and experts.keep == "endpoints":
            text = "distill.trajectory 'original' reads the experts at every epoch; set experts.keep: all"
            mistakes.append(Clash(text, "distill.trajectory", "experts.keep"))
        return mistakes

    # -- the loop over outer iterations --------------------------------------------------------------------------------

    def begin(self, phase: int, train: Callable[[], PreparedSplit], folder: Path) -> None:
        if (folder / START).is_file():
            return
        pairs = train()
        records = self.records(phase, pairs)
        write_json(folder / "records.json", records)
        save_set(self.initial(phase, pairs, records), folder / START)

    def distil(
        self,
        phase: int,
        store: Store,
        model: DualEncoder,
        train: Callable[[], PreparedSplit],
        folder: Path,
        device: torch.device,
        key: str,
        on_step: Callable[[dict[str, Any]], None] = lambda metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: WorkerParts | None = None,
        until: int | None = None,
    ) -> bool:
        initial = load_set(folder / START)
        return distill_phase(self, phase, store, model, initial, folder, device, key, on_step, should_stop, until)

    def curves(self, logged: Iterable[str]) -> list[Curves]:
        merged = self.rule.branches == "merged"
        miss = {"loss": "both towers"} if merged else {"miss_image": "image tower", "miss_text": "text tower"}
        return [
            ("matching loss", miss, (1.0, "student before its first step")),
            ("student loss, first inner step", {"student_loss": ""}, None),
            ("learned rates", {"lr_image": "image tower", "lr_text": "text tower"}, None),
        ]

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        return self.rule.batch * self.rule.steps

    # -- functions that a method may override --------------------------------------------------------------------------

    def path(self, store: Store, expert: int, phase: int, path_start: Params | None = None) -> shortcut.Path:
        """Return the path along an expert's checkpoints; the start and the target of a student are points on it.

        The path of a chained phase begins at `path_start` instead of the expert's first checkpoint.
        """
        return shortcut.open_path(store, expert, self.rule, self.run.endpoint_of(phase), path_start)

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]:
        """Return, for each tower, the half-open range of start epochs; called once at the start of each phase."""
        return self.rule.phases[phase].ranges

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw:
        """Draw all random choices of one outer iteration."""
        real, apart = self.real_starts(self.rule), self.starts_apart(self.rule)
        return phases.draw(self.rule, phase, iteration, experts, self.seed, ranges, real=real, apart=apart)

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss:
        """Return the student loss of one inner step, as a function of the student's parameters."""
        return student_loss(model, self.rule, drawn.dropout_seeds, self.run.data.image_size)

    def corrected(self, result: MetaGradient, start: Params, target: Params) -> MetaGradient:
        """Return the meta-gradient of one draw after method-specific changes; the base class makes none.

        The student of the draw started at `start` and should have reached `target`.
        """
        return result


def _of_rule(method: type[Method], rule: config.Distill) -> list[Clash]:
    """Return one message per combination of values in `distill` that does not work."""
    mistakes = []
    if rule.plan.plans:
        mistakes += _cannot_plan(method, rule)
    elif not rule.phases:
        mistakes.append(Clash("distill.phases is empty; list a phase, or set auto", "distill.phases", "plan.kind"))
    if rule.reuse_graphs and rule.inner_dropout == "fresh_mask":
        text = (
            "distill.reuse_graphs keeps the dropout masks of the first pass, but distill.inner_dropout: fresh_mask "
            "draws new ones in the second; change one of them"
        )
        mistakes.append(Clash(text, "distill.reuse_graphs", "distill.inner_dropout"))
    return mistakes


def _of_phases(method: type[Method], rule: config.Distill) -> list[Clash]:
    """Return one message per mistake in `distill.phases`."""
    mistakes = []
    for p, phase in enumerate(rule.phases):
        this = f"distill.phases.{p}"
        limit = phase.endpoint - (rule.endpoint_rule == "exclusive")
        for tower, (start, stop) in phase.ranges.items():
            if start >= stop + (rule.start_rule == "inclusive"):
                text = f"{this}: {tower} start range [{start}, {stop}) is empty; raise stop"
                mistakes.append(Clash(text, "distill.phases.start", "stop", "start_text", "stop_text", "start_rule"))
        if not method.starts_apart(rule) and (phase.start_text is not None or phase.stop_text is not None):
            text = (
                f"{this}: start_text and stop_text have an effect only if each tower draws its own start epoch; remove "
                "them, or set distill.method: amd and distill.options.starts: independent"
            )
            mistakes.append(Clash(text, "distill.phases.start_text", "stop_text", "distill.options.starts"))
        if not method.grows and phase.grow_from is not None:
            text = f"{this}: grow_from and grow_until need a growing start range; set distill.method: datm"
            mistakes.append(Clash(text, "distill.phases.grow_from", "grow_until", "distill.method"))
        if rule.trajectory == "shortcut" and method.states_ranges(rule) and rule.reach(phase) > limit:
            stop = limit - rule.reach(phase) + max(stop for _, stop in phase.ranges.values())
            last = rule.reach(phase) - rule.match_epochs
            text = (
                f"{this}: the target of a start at epoch {last} lies {rule.match_epochs} epoch(s) later, past the "
                f"endpoint {limit}; set {this}.stop to {stop} or raise its endpoint"
            )
            mistakes.append(Clash(text, "distill.trajectory", "endpoint", "endpoint_rule", *OF_REACH))
        if rule.batch > phase.pairs >= 2 and rule.batches == "cycle":
            text = (
                f"distill.batch {rule.batch} is larger than the {phase.pairs} pairs of {this}; set batch to at most "
                f"{phase.pairs}"
            )
            mistakes.append(Clash(text, "distill.batch", "distill.batches", "distill.phases.pairs"))
        if rule.similarity.kind == "low_rank" and 2 * rule.similarity.rank > phase.pairs:
            text = (
                f"{this}: rank {rule.similarity.rank} stores more numbers than the full {phase.pairs} x {phase.pairs} "
                f"matrix; use at most {phase.pairs // 2} or distill.similarity.kind: full"
            )
            mistakes.append(Clash(text, "distill.similarity.kind", "rank", "distill.phases.pairs"))
    return mistakes


def _cannot_plan(method: type[Method], rule: config.Distill) -> list[Clash]:
    """Return one message per reason why the phases of a run cannot be planned automatically."""
    setting = f"distill.phases: {rule.plan.kind}"
    mistakes, fields = [], ("distill.phases", "plan.kind")
    if rule.trajectory == "convexified":
        text = f"{setting} chooses endpoints, but a convexified path has none; set distill.trajectory: shortcut"
        mistakes.append(Clash(text, *fields, "distill.trajectory"))
    if method.starts_apart(rule) or not method.states_ranges(rule):
        text = f"{setting} plans one range for both towers; set distill.options to {{starts: together, ranges: stated}}"
        mistakes.append(Clash(text, *fields, "options.starts", "options.ranges"))
    if rule.plan.kind == "adaptive" and (rule.trajectory, rule.endpoint_rule) != ("shortcut", "inclusive"):
        text = f"{setting} needs a straight path; set distill.trajectory: shortcut and distill.endpoint_rule: inclusive"
        mistakes.append(Clash(text, *fields, "trajectory", "endpoint_rule"))
    return mistakes
