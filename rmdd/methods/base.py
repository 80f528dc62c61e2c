"""What a method is: values for the run file, and the parts of a loop that it may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rmdd import config
from rmdd.config.runfile import Section, validate

Family = Literal["trajectory", "distribution", "generative"]
Need = Literal["experts", "features", "diffusion", "captioner"]

if TYPE_CHECKING:
    from rmdd.distill.phases import Draw
    from rmdd.distill.synthetic import Synthetic
    from rmdd.distill.unroll import StudentLoss
    from rmdd.experts.shortcut import Path
    from rmdd.experts.store import Store
    from rmdd.models.dual import DualEncoder
    from rmdd.models.prepared import PreparedSplit


class Method:
    """A recipe on the trajectory-matching loop. Most only set `defaults`; a new idea replaces one of the parts below
    them. Those of the other families derive from `rmdd.methods.distribution.DistributionMethod` and
    `rmdd.methods.generative.GenerativeMethod`.

    Parts are functions of the run, the phase and the iteration alone: what they draw comes from
    `rmdd.core.seeding.generator`, so that a run that was killed goes on with the same bits.
    """

    family: ClassVar[Family] = "trajectory"
    """Which loop it is a recipe of."""
    needs: ClassVar[tuple[Need, ...]] = ("experts",)
    """What must be there before it begins."""
    card: ClassVar[str] = ""
    """Where it was published: an arXiv number or a venue."""
    verified: ClassVar[str] = ""
    """What was verified of it, and what only a GPU with weights can show."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Values of the run file that hold where it says nothing, by section."""
    reference: ClassVar[str | None] = None
    """The protocol of `rmdd.evaluate.references` by which its paper scored students."""
    version: ClassVar[int] = 1
    """Raise it when a change of the code moves the numbers; part of the hash of every phase."""

    class Options(Section):
        """Fields of the method's own, read from `distill.options`."""

    def __init__(self, run: config.Run):
        self.run, self.rule = run, run.distill
        self.options = self.Options(**run.distill.options)
        self.seed = run.seed_of("distill")

    @classmethod
    def mistakes(cls, run: config.Run) -> list[str]:
        """What is wrong with a run of this method: its options, then `clashes`."""
        options, wrong = validate(cls.Options, dict(run.distill.options))
        listed = f"`rmdd methods {run.distill.method}` lists them"
        told = [f"distill.options.{w}".replace("`rmdd init` writes every key with its meaning", listed) for w in wrong]
        return told + ([] if options is None else cls.clashes(run))

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        """What the method cannot work with, one line each that says what to set."""
        return []

    def records(self, phase: int, train: PreparedSplit) -> list[int]:
        """The caption records that a phase starts from."""
        from rmdd.distill import phases
        from rmdd.methods.amd import prototypes

        pairs = self.rule.phases[phase].pairs
        if self.rule.init == "prototypes":
            return prototypes(self.run, phase, pairs, train)
        return phases.choose_records(phase, pairs, train, self.seed)

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
        """The set that a phase starts from."""
        from rmdd.distill import phases

        return phases.initial(self.run, phase, train, records)

    def path(self, store: Store, expert: int, phase: int) -> Path:
        """What lies between a start and its target."""
        from rmdd.experts import shortcut

        return shortcut.open_path(store, expert, self.rule, self.run.endpoint_of(phase))

    def ranges(self, store: Store, experts: Sequence[int], phase: int) -> dict[str, tuple[int, int]]:
        """The half-open range of start epochs of each tower; asked once per phase."""
        plan = self.rule.phases[phase]
        if self.rule.ranges == "stated":
            return plan.ranges
        from rmdd.methods.amd import drift_ranges

        return drift_ranges(store, experts, self.run.endpoint_of(phase) - self.rule.match_epochs)

    def draw(
        self, phase: int, iteration: int, experts: int, ranges: Mapping[str, tuple[int | float, int | float]]
    ) -> Draw:
        """Everything random about one outer iteration."""
        from rmdd.distill import phases

        return phases.draw(self.rule, phase, iteration, experts, self.seed, ranges)

    def student_loss(self, model: DualEncoder, drawn: Draw) -> StudentLoss:
        """The loss of one inner step, as a function of the parameters."""
        from rmdd.distill.trajectory.inner import student_loss

        size = self.run.data.image_size
        return student_loss(model, self.rule, drawn.dropout_seeds, drawn.blends, size)
