"""What every method is: values for the run file, and what the steps of a run ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from rmdd import config
from rmdd.config.recipes import Family
from rmdd.config.runfile import Clash, Section, validate
from rmdd.core.device import local_device
from rmdd.distill import phases
from rmdd.distill.loop import finished
from rmdd.distill.starts import choose_records, prototypes
from rmdd.distill.synthetic import Synthetic
from rmdd.experts.train import expert_model
from rmdd.models.prepared import PreparedSplit

if TYPE_CHECKING:
    import torch

    from rmdd.execution.parts import WorkerParts
    from rmdd.experts.store import Store
    from rmdd.models.dual import DualEncoder
    from rmdd.models.pretrained import PretrainedModel

M = TypeVar("M", bound="BaseMethod")
Need = Literal["experts", "features", "diffusion", "captioner"]

OF_PATHS = (
    *("trajectory", "endpoint_rule", "start_rule", "estimator", "reuse_graphs", "steps", "match_epochs"),
    *("batch", "batches", "branches", "inner_dropout", "lr_similarity", "lr_lr"),
)
"""Fields of `distill` that only matching of trajectories reads."""


Curves = tuple[str, dict[str, str], tuple[float, str] | None]
"""A title, the numbers drawn under it with a label each, and a level with its name."""


class BaseMethod:
    """A recipe. Those that others derive from are `rmdd.methods.Method`, which matches trajectories,
    `rmdd.methods.distribution.DistributionMethod` and `rmdd.methods.generative.GenerativeMethod`.

    Parts are functions of the run, the phase and the iteration alone: what they draw comes from
    `rmdd.core.seeding.generator`, so that a run that was killed goes on with the same bits.
    """

    family: ClassVar[Family]
    """Which loop it is a recipe of; told to people, and asked by no code."""
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

    iterates: ClassVar[bool] = True
    """Whether a phase is made by updates that one may stop between; else in one piece, by tasks of its own."""
    unrolls: ClassVar[bool] = False
    """Whether student steps are differentiated, so that a trainable tower must have a double backward."""
    learns_rates: ClassVar[bool] = False
    """Whether the inner rates of a set are learned; else they are as set."""
    plain_options: ClassVar[Mapping[str, Any]] = {}
    """Options with which students start at whole epochs of the stated range, on the path of `distill.trajectory`."""
    phase_fields: ClassVar[tuple[str, ...]] = ("pairs", "iterations")
    """Fields of `distill.phases` that it reads."""

    class Options(Section):
        """Fields of the method's own, read from `distill.options`."""

    def __init__(self, run: config.Run):
        self.run, self.rule = run, run.distill
        self.options = self.Options(**run.distill.options)
        self.seed = run.seed_of("distill")

    def on(self: M, run: config.Run) -> M:
        """The same method of another run."""
        return type(self)(run)

    # -- the run file ------------------------------------------------------------------------------------------------

    @classmethod
    def mistakes(cls, run: config.Run) -> list[str]:
        """What is wrong with a run of this method: its options, then `clashes`."""
        listed_by = f"`rmdd methods {run.distill.method}` lists them"
        options, wrong = validate(cls.Options, dict(run.distill.options), listed_by)
        return [f"distill.options.{line}" for line in wrong] + ([] if options is None else cls.clashes(run))

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        """What the method cannot work with, one line each that says what to set."""
        return []

    @classmethod
    def clashes_of_family(cls, rule: config.Distill, experts: config.Experts, runtime: config.Runtime) -> list[Clash]:
        """What is wrong between the fields of a run, whatever the options: here, without a path to match."""
        mistakes = []
        if rule.plan.plans or not rule.phases:
            text = f"distill.method {rule.method} has no path to plan phases from; list distill.phases"
            mistakes.append(Clash(text, "distill.method", "distill.phases", "plan.kind"))
        if rule.similarity.kind != "identity":
            text = f"distill.method {rule.method} learns no similarity; set distill.similarity.kind: identity"
            mistakes.append(Clash(text, "distill.method", "distill.similarity.kind"))
        return mistakes

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        """Fields of `distill` that it does not read."""
        return OF_PATHS

    @classmethod
    def real_starts(cls, rule: config.Distill) -> bool:
        """Whether students start at real-valued epochs; else at whole ones."""
        return False

    @classmethod
    def endpoint_of(cls, rule: config.Distill, epochs: int, phase: int) -> int:
        """The last expert epoch that a phase reads, of experts trained for `epochs`."""
        return epochs

    def idle(self) -> list[str]:
        """Fields of `distill` that were moved from their defaults and do nothing with it."""
        usual = config.Distill.model_fields
        return [name for name in self.idle_fields() if getattr(self.rule, name) != usual[name].default]

    # -- what must be there ------------------------------------------------------------------------------------------

    def parts(self) -> list[PretrainedModel]:
        """The pretrained parts that it asks for."""
        return []

    def faults(self) -> list[str]:
        """What can be known to keep its parts from working, a line each; downloads nothing."""
        return []

    def uncounted(self) -> list[str]:
        """Remarks on what estimates of its cost leave out."""
        return []

    def curves(self, logged: Iterable[str]) -> list[Curves]:
        """What a page draws of a phase whose log has the numbers `logged`."""
        return []

    # -- the phases --------------------------------------------------------------------------------------------------

    def records(self, phase: int, train: PreparedSplit) -> list[int]:
        """The caption records that a phase starts from."""
        pairs = self.rule.phases[phase].pairs
        if self.rule.init == "prototypes":
            run, device, width = self.run, local_device(self.run.runtime), train.texts.shape[1]
            model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, width)
            return prototypes(model.to(device), device, self.seed, phase, pairs, train)
        return choose_records(phase, pairs, train, self.seed)

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
        """The set that a phase starts from."""
        return phases.initial(self.run, phase, train, records)

    def begin(self, phase: int, train: Callable[[], PreparedSplit], folder: Path) -> None:
        """Write what a phase starts from into its folder, where that is done before phases are handed out."""

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
        """Make a phase that `iterates`, from its last checkpoint if it has one; returns whether it finished.

        `ranks` hold a `part_of_step` each; None: this process makes every step whole.
        """
        raise NotImplementedError(f"{type(self).__name__} has `iterates` set, and so needs a method `distil`")

    def is_finished(self, phase: int, folder: Path) -> bool:
        """Whether the phase in `folder` has come to its end."""
        return finished(folder, self.rule.phases[phase].iterations)

    @property
    def draws(self) -> int:
        """Draws of a step that workers can share; 1: a step is made by one."""
        return 1

    def part_of_step(
        self,
        phase: int,
        store: Store,
        model: DualEncoder,
        train: PreparedSplit,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
    ) -> Any:
        """What one of the workers that share the draws of every step holds."""
        raise NotImplementedError(f"{type(self).__name__} has several `draws`, and so needs a method `part_of_step`")

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        """Pairs that go through the towers in an update; for the pace that people see."""
        return self.rule.phases[phase].pairs
