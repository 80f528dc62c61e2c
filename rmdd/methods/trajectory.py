"""Methods that match trajectories: a student is unrolled on the set, and should end where an expert did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rmdd import config
from rmdd.config.recipes import Family
from rmdd.core.files import write_json
from rmdd.distill import phases
from rmdd.distill.phases import Draw
from rmdd.distill.sets import load_set, save_set
from rmdd.distill.starts import drift_ranges
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.trajectory.stepping import distill_phase
from rmdd.distill.unroll import StudentLoss
from rmdd.experts import shortcut
from rmdd.experts.store import Store
from rmdd.methods.base import BaseMethod, Curves
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit

if TYPE_CHECKING:
    import torch

    from rmdd.execution.parts import WorkerParts

START = "start.safetensors"


class Method(BaseMethod):
    """A recipe on the trajectory-matching loop. Most only set `defaults`; a new idea replaces one of the parts at the
    end: records, set to start from, path, ranges, draw, student_loss."""

    family: ClassVar[Family] = "trajectory"
    unrolls: ClassVar[bool] = True
    learns_rates: ClassVar[bool] = True
    phase_fields: ClassVar[tuple[str, ...]] = tuple(config.Phase.model_fields)

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def endpoint_of(cls, run: config.Run, phase: int) -> int:
        rule, plan = run.distill, run.distill.phases[phase]
        whole = rule.trajectory == "convexified"
        if whole or (rule.ranges == "drift" and rule.trajectory == "original"):
            return run.experts.epochs
        if rule.trajectory == "shortcut":
            return plan.endpoint - (rule.endpoint_rule == "exclusive")
        return rule.reach(plan)

    @classmethod
    def clashes_of_family(cls, run: config.Run) -> list[str]:
        mistakes = _of_rule(run.distill) + _of_phases(run.distill)
        rule, experts = run.distill, run.experts
        if rule.inner_dropout == "fresh_mask" and run.runtime.keep_parameters == "recompute":
            mistakes.append(
                "runtime.keep_parameters: recompute takes steps of the first pass again, which distill.inner_dropout: "
                "fresh_mask would draw other masks for; set one of them otherwise"
            )
        for p, phase in enumerate(rule.phases):
            last = rule.reach(phase)
            if rule.trajectory == "convexified" and last > experts.epochs:
                stop = phase.stop - last + experts.epochs
                mistakes.append(
                    f"distill.phases.{p} reaches epoch {last} of a path that ends with the experts at "
                    f"{experts.epochs}; set distill.phases.{p}.stop to {stop} or train longer"
                )
        for what, needs in (
            ("distill.trajectory 'original'", rule.trajectory == "original"),
            ("distill.ranges 'drift'", rule.ranges == "drift"),
            (
                "distill.anchors between the ends",
                rule.trajectory == "convexified" and (rule.anchors > 2 or rule.smooth_anchors),
            ),
        ):
            if needs and experts.keep == "endpoints":
                mistakes.append(f"{what} reads every epoch; set experts.keep: all")
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
        on_step: Callable[[dict], None] = lambda metrics: None,
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
        if self.rule.ranges == "stated":
            return self.rule.phases[phase].ranges
        return drift_ranges(store, experts, self.run.endpoint_of(phase) - self.rule.match_epochs)

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw:
        """Everything random about one outer iteration."""
        return phases.draw(self.rule, phase, iteration, experts, self.seed, ranges)

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss:
        """The loss of one inner step, as a function of the parameters."""
        return student_loss(model, self.rule, drawn.dropout_seeds, drawn.blends, self.run.data.image_size)


def _of_rule(rule: config.Distill) -> list[str]:
    """What is wrong between fields of `distill`."""
    mistakes = []
    if rule.plan.plans:
        mistakes += _cannot_plan(rule)
    elif not rule.phases:
        mistakes.append("distill.phases is empty; give at least one, or auto")
    if rule.start_points == "continuous" and rule.trajectory == "original":
        mistakes.append(
            "distill.start_points: continuous needs a path between the epochs; set distill.trajectory to shortcut "
            "or convexified"
        )
    if (rule.anchors > 2 or rule.smooth_anchors) and rule.trajectory != "convexified":
        mistakes.append("distill.anchors and smooth_anchors belong to distill.trajectory: convexified")
    if rule.ranges == "drift" and rule.starts == "together":
        mistakes.append("distill.ranges: drift gives each tower its own range; set distill.starts: independent")
    if rule.ranges == "drift" and (rule.start_rule == "inclusive" or rule.start_points == "continuous"):
        mistakes.append(
            "distill.ranges: drift finds whole epochs, ends included; set start_rule: exclusive and start_points: "
            "integer"
        )
    if rule.reuse_graphs and rule.inner_dropout == "fresh_mask":
        mistakes.append(
            "distill.reuse_graphs keeps the masks of the first pass, which inner_dropout: fresh_mask draws anew; "
            "set one of them otherwise"
        )
    if rule.rate_branches == "separate" and (rule.branches, rule.estimator) != ("merged", "first_order"):
        mistakes.append("distill.rate_branches: separate is for branches: merged with estimator: first_order")
    return mistakes


def _of_phases(rule: config.Distill) -> list[str]:
    """What is wrong with the phases."""
    mistakes = []
    for p, phase in enumerate(rule.phases):
        this = f"distill.phases.{p}"
        limit = phase.endpoint - (rule.endpoint_rule == "exclusive")
        for tower, (start, stop) in phase.ranges.items():
            if start >= stop + (rule.start_rule == "inclusive"):
                mistakes.append(f"{this}: {tower} start range [{start}, {stop}) is empty; raise stop")
        if rule.starts == "together" and (phase.start_text is not None or phase.stop_text is not None):
            mistakes.append(f"{this}: start_text and stop_text need distill.starts: independent")
        if rule.trajectory == "shortcut" and rule.ranges == "stated" and rule.reach(phase) > limit:
            stop = limit - rule.reach(phase) + max(stop for _, stop in phase.ranges.values())
            last = rule.reach(phase) - rule.match_epochs
            mistakes.append(
                f"{this}: a start at epoch {last} matched {rule.match_epochs} epoch(s) on ends past the endpoint "
                f"{limit}; set {this}.stop to {stop} or raise its endpoint"
            )
        if rule.batch > phase.pairs >= 2 and rule.batches == "cycle":
            mistakes.append(
                f"distill.batch {rule.batch} is larger than {this} with its {phase.pairs} pairs; set batch to at "
                f"most {phase.pairs}"
            )
        if rule.similarity.kind == "low_rank" and 2 * rule.similarity.rank > phase.pairs:
            mistakes.append(
                f"{this}: rank {rule.similarity.rank} costs more than the full {phase.pairs} x {phase.pairs} "
                f"matrix; use at most {phase.pairs // 2} or distill.similarity.kind: full"
            )
    return mistakes


def _cannot_plan(rule: config.Distill) -> list[str]:
    """Why the phases of a run cannot be planned."""
    word = f"distill.phases: {rule.plan.kind}"
    mistakes = []
    if rule.trajectory == "convexified":
        mistakes.append(f"{word} chooses endpoints, which a convexified path has not; set trajectory: shortcut")
    if rule.starts == "independent" or rule.ranges == "drift":
        mistakes.append(f"{word} plans one range for both towers; set starts: together and ranges: stated")
    if rule.plan.kind == "adaptive" and (rule.trajectory, rule.endpoint_rule) != ("shortcut", "inclusive"):
        mistakes.append(f"{word} moves along a straight path; set trajectory: shortcut, endpoint_rule: inclusive")
    return mistakes
