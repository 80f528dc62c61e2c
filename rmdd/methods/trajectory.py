"""Methods that match trajectories: a student is unrolled on the set, and should end where an expert did."""

from __future__ import annotations

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
    """A recipe on the trajectory-matching loop. Most only set `defaults`; a new idea replaces one of the parts at the
    end: records, set to start from, path, ranges, draw, student_loss, corrected."""

    family: ClassVar[Family] = "trajectory"
    unrolls: ClassVar[bool] = True
    learns_rates: ClassVar[bool] = True
    phase_fields: ClassVar[tuple[str, ...]] = tuple(config.Phase.model_fields)
    grows: ClassVar[bool] = False
    """Whether the range of starts grows while a set is distilled."""

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def real_starts(cls, rule: config.Distill) -> bool:
        return rule.plan.kind == "adaptive"

    @classmethod
    def starts_apart(cls, rule: config.Distill) -> bool:
        """Whether each tower starts at an epoch of its own."""
        return False

    @classmethod
    def states_ranges(cls, rule: config.Distill) -> bool:
        """Whether starts are drawn from the ranges of the phases."""
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
        if rule.inner_dropout == "fresh_mask" and runtime.keep_parameters == "recompute":
            text = (
                "runtime.keep_parameters: recompute takes steps of the first pass again, which distill.inner_dropout: "
                "fresh_mask would draw other masks for; set one of them otherwise"
            )
            mistakes.append(Clash(text, "runtime.keep_parameters", "distill.inner_dropout"))
        for p, phase in enumerate(rule.phases):
            last = rule.reach(phase)
            if rule.trajectory == "convexified" and last > experts.epochs:
                stop = phase.stop - last + experts.epochs
                text = (
                    f"distill.phases.{p} reaches epoch {last} of a path that ends with the experts at "
                    f"{experts.epochs}; set distill.phases.{p}.stop to {stop} or train longer"
                )
                mistakes.append(Clash(text, "distill.trajectory", "experts.epochs", *OF_REACH))
        if rule.trajectory == "original" and experts.keep == "endpoints":
            text = "distill.trajectory 'original' reads every epoch; set experts.keep: all"
            mistakes.append(Clash(text, "distill.trajectory", "experts.keep"))
        return mistakes

    # -- how the loop is run -----------------------------------------------------------------------------------------

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
    ) -> bool:
        begun = load_set(folder / START)
        return distill_phase(self, phase, store, model, begun, folder, device, key, on_step, should_stop)

    def curves(self, logged: Iterable[str]) -> list[Curves]:
        merged = self.rule.branches == "merged"
        miss = {"loss": "both towers"} if merged else {"miss_image": "image tower", "miss_text": "text tower"}
        return [
            ("matching loss", miss, (1.0, "the start itself")),
            ("student loss, first inner step", {"student_loss": ""}, None),
            ("learned rates", {"lr_image": "image tower", "lr_text": "text tower"}, None),
        ]

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        return self.rule.batch * self.rule.steps

    # -- what a method may replace -----------------------------------------------------------------------------------

    def path(self, store: Store, expert: int, phase: int) -> shortcut.Path:
        """What lies between a start and its target."""
        return shortcut.open_path(store, expert, self.rule, self.run.endpoint_of(phase))

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]:
        """The half-open range of start epochs of each tower; asked once per phase."""
        return self.rule.phases[phase].ranges

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw:
        """Everything random about one outer iteration."""
        real, apart = self.real_starts(self.rule), self.starts_apart(self.rule)
        return phases.draw(self.rule, phase, iteration, experts, self.seed, ranges, real=real, apart=apart)

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss:
        """The loss of one inner step, as a function of the parameters."""
        return student_loss(model, self.rule, drawn.dropout_seeds, self.run.data.image_size)

    def corrected(self, found: MetaGradient, start: Params, target: Params) -> MetaGradient:
        """The meta-gradient of a draw, whose student went from `start` and should have reached `target`."""
        return found


def _of_rule(method: type[Method], rule: config.Distill) -> list[Clash]:
    """What is wrong between fields of `distill`."""
    mistakes = []
    if rule.plan.plans:
        mistakes += _cannot_plan(method, rule)
    elif not rule.phases:
        mistakes.append(Clash("distill.phases is empty; give at least one, or auto", "distill.phases", "plan.kind"))
    if rule.reuse_graphs and rule.inner_dropout == "fresh_mask":
        text = (
            "distill.reuse_graphs keeps the masks of the first pass, which inner_dropout: fresh_mask draws anew; "
            "set one of them otherwise"
        )
        mistakes.append(Clash(text, "distill.reuse_graphs", "distill.inner_dropout"))
    return mistakes


def _of_phases(method: type[Method], rule: config.Distill) -> list[Clash]:
    """What is wrong with the phases."""
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
                f"{this}: start_text and stop_text need a start for each tower; set distill.method: amd, and its "
                "options.starts: independent"
            )
            mistakes.append(Clash(text, "distill.phases.start_text", "stop_text", "distill.options.starts"))
        if not method.grows and phase.grow_from is not None:
            text = f"{this}: grow_from and grow_until need a range that grows; set distill.method: datm"
            mistakes.append(Clash(text, "distill.phases.grow_from", "grow_until", "distill.method"))
        if rule.trajectory == "shortcut" and method.states_ranges(rule) and rule.reach(phase) > limit:
            stop = limit - rule.reach(phase) + max(stop for _, stop in phase.ranges.values())
            last = rule.reach(phase) - rule.match_epochs
            text = (
                f"{this}: a start at epoch {last} matched {rule.match_epochs} epoch(s) on ends past the endpoint "
                f"{limit}; set {this}.stop to {stop} or raise its endpoint"
            )
            mistakes.append(Clash(text, "distill.trajectory", "endpoint", "endpoint_rule", *OF_REACH))
        if rule.batch > phase.pairs >= 2 and rule.batches == "cycle":
            text = (
                f"distill.batch {rule.batch} is larger than {this} with its {phase.pairs} pairs; set batch to at "
                f"most {phase.pairs}"
            )
            mistakes.append(Clash(text, "distill.batch", "distill.batches", "distill.phases.pairs"))
        if rule.similarity.kind == "low_rank" and 2 * rule.similarity.rank > phase.pairs:
            text = (
                f"{this}: rank {rule.similarity.rank} costs more than the full {phase.pairs} x {phase.pairs} "
                f"matrix; use at most {phase.pairs // 2} or distill.similarity.kind: full"
            )
            mistakes.append(Clash(text, "distill.similarity.kind", "rank", "distill.phases.pairs"))
    return mistakes


def _cannot_plan(method: type[Method], rule: config.Distill) -> list[Clash]:
    """Why the phases of a run cannot be planned."""
    word = f"distill.phases: {rule.plan.kind}"
    mistakes, of_plan = [], ("distill.phases", "plan.kind")
    if rule.trajectory == "convexified":
        text = f"{word} chooses endpoints, which a convexified path has not; set trajectory: shortcut"
        mistakes.append(Clash(text, *of_plan, "distill.trajectory"))
    if method.starts_apart(rule) or not method.states_ranges(rule):
        text = f"{word} plans one range for both towers; set distill.options to {{starts: together, ranges: stated}}"
        mistakes.append(Clash(text, *of_plan, "options.starts", "options.ranges"))
    if rule.plan.kind == "adaptive" and (rule.trajectory, rule.endpoint_rule) != ("shortcut", "inclusive"):
        text = f"{word} moves along a straight path; set trajectory: shortcut, endpoint_rule: inclusive"
        mistakes.append(Clash(text, *of_plan, "trajectory", "endpoint_rule"))
    return mistakes
