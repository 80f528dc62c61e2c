"""Base class of distillation methods: defaults for the run file, and the functions that the stages of a run call."""

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
from rmdd.distill.starts import choose_images, choose_records, prototypes
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

TRAJECTORY_FIELDS = (
    *("trajectory", "endpoint_rule", "start_rule", "estimator", "reuse_graphs", "steps", "match_epochs"),
    *("batch", "batches", "branches", "inner_dropout", "lr_similarity", "lr_lr"),
)
"""Fields of `distill` that only trajectory-matching methods read."""

Curves = tuple[str, dict[str, str], tuple[float, str] | None]
"""One plot of the HTML report: title, label of each logged number, and an optional reference level (value, label)."""


class BaseMethod:
    """A distillation method. New methods derive from the class of their family: `rmdd.methods.Method` (trajectory
    matching), `rmdd.methods.distribution.DistributionMethod` or `rmdd.methods.generative.GenerativeMethod`.

    Every result must depend only on the run, the phase and the iteration. Take random draws from
    `rmdd.core.seeding.generator`; a resumed run then gives the same bits as an uninterrupted one.
    """

    family: ClassVar[Family]
    """Family of the method. It is shown to users; no code depends on it."""
    needs: ClassVar[tuple[Need, ...]] = ("experts",)
    """Inputs that must exist before distillation with the method starts."""
    card: ClassVar[str] = ""
    """Where the method was published: an arXiv number or a venue."""
    verified: ClassVar[str] = ""
    """Text that says what tests verify, and what is not verified because it needs a GPU and pretrained weights."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """The method's own defaults, by section of the run file; they apply to fields that the run file does not set."""
    reference: ClassVar[str | None] = None
    """Name of the evaluation protocol of the method's paper, as in `rmdd.evaluate.references`."""
    version: ClassVar[int] = 1
    """Version of the method, part of the hash of every phase. Increase it when a code change alters distilled sets."""

    iterates: ClassVar[bool] = True
    """True if a phase is a loop of updates that can stop after any update; False if it consists of separate tasks."""
    unrolls: ClassVar[bool] = False
    """Whether gradients go through the training steps of students; if so, a trainable tower needs double backward."""
    learns_rates: ClassVar[bool] = False
    """Whether the learning rates of students are learned with the set; if False, they stay at the configured values."""
    plain_options: ClassVar[Mapping[str, Any]] = {}
    """Values of `distill.options` that turn off the method's own start ranges and path. With them, the method draws
    integer start epochs from the ranges in `distill.phases` and follows the path named in `distill.trajectory`."""
    phase_fields: ClassVar[tuple[str, ...]] = ("pairs", "iterations")
    """Fields of `distill.phases` that the method reads."""

    class Options(Section):
        """Options that only this method has, read from `distill.options`."""

    def __init__(self, run: config.Run):
        self.run, self.rule = run, run.distill
        self.options = self.Options(**run.distill.options)
        self.seed = run.seed_of("distill")

    def on(self: M, run: config.Run) -> M:
        """Return the same distillation method configured for `run`."""
        return type(self)(run)

    # -- checks of the run file --------------------------------------------------------------------------------------

    @classmethod
    def mistakes(cls, run: config.Run) -> list[str]:
        """Return one message per mistake in the run file: invalid options of the method and messages of `clashes`."""
        listed_by = f"`rmdd methods {run.distill.method}` lists them"
        options, invalid = validate(cls.Options, dict(run.distill.options), listed_by)
        return [f"distill.options.{line}" for line in invalid] + ([] if options is None else cls.clashes(run))

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        """Return one message per setting that does not work with this method; each message says what to set."""
        return []

    @classmethod
    def clashes_of_family(cls, rule: config.Distill, experts: config.Experts, runtime: config.Runtime) -> list[Clash]:
        """Return one message per combination of run-file fields that no method of the family supports. This version
        is for families without trajectory matching."""
        mistakes = []
        if rule.plan.plans or not rule.phases:
            text = f"distill.method {rule.method} cannot plan phases automatically; list distill.phases"
            mistakes.append(Clash(text, "distill.method", "distill.phases", "plan.kind"))
        if rule.similarity.kind != "identity":
            text = f"distill.method {rule.method} learns no similarity; set distill.similarity.kind: identity"
            mistakes.append(Clash(text, "distill.method", "distill.similarity.kind"))
        if rule.path_start != "theta_0":
            text = f"distill.method {rule.method} matches no paths of experts; set distill.path_start: theta_0"
            mistakes.append(Clash(text, "distill.method", "distill.path_start"))
        return mistakes

    @classmethod
    def idle_fields(cls) -> tuple[str, ...]:
        """Return the names of the fields of `distill` that the method does not read."""
        return TRAJECTORY_FIELDS

    @classmethod
    def real_starts(cls, rule: config.Distill) -> bool:
        """Return whether start epochs of students are real numbers; False means integers."""
        return False

    @classmethod
    def endpoint_of(cls, rule: config.Distill, epochs: int, phase: int) -> int:
        """Return the last expert epoch that phase number `phase` reads; the experts are trained for `epochs` epochs."""
        return epochs

    def idle(self) -> list[str]:
        """Return the names of the fields of `distill` that the run file changes although the method ignores them."""
        fields = config.Distill.model_fields
        return [name for name in self.idle_fields() if getattr(self.rule, name) != fields[name].default]

    # -- prerequisites and reports -----------------------------------------------------------------------------------

    def parts(self) -> list[PretrainedModel]:
        """Return the pretrained models that the method needs."""
        return []

    def faults(self) -> list[str]:
        """Check the pretrained models without downloading them; return one message per problem."""
        return []

    def uncounted(self) -> list[str]:
        """Return messages that tell the user which work the cost estimate does not include."""
        return []

    def curves(self, logged: Iterable[str]) -> list[Curves]:
        """Return the plots of one phase for the HTML report; `logged` holds the names of the logged numbers."""
        return []

    # -- distillation of a phase -------------------------------------------------------------------------------------

    def records(self, phase: int, train: PreparedSplit) -> list[int]:
        """Return the indices of the caption records whose pairs become the initial set of a phase."""
        pairs = self.rule.phases[phase].pairs
        if self.rule.init == "prototypes":
            run, device, width = self.run, local_device(self.run.runtime), train.texts.shape[1]
            model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, width)
            return prototypes(model.to(device), device, self.seed, phase, pairs, train)
        if self.rule.init == "mean_captions":
            return choose_images(phase, [p.pairs for p in self.rule.phases], train, self.seed)
        return choose_records(phase, pairs, train, self.seed)

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
        """Return the initial set of a phase, made from the pairs of the caption records `records`."""
        return phases.initial(self.run, phase, train, records)

    def begin(self, phase: int, train: Callable[[], PreparedSplit], folder: Path) -> None:
        """Write the initial set of a phase into `folder`. Only methods whose workers read this file override this."""

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
        """Run one phase from its last checkpoint, or from the start; return whether the phase finished.

        This function is called only if `iterates` is True. `ranks` are the workers that share the draws of a step; each
        holds an object made by `part_of_step`. If `ranks` is None, this process computes every step alone.
        """
        raise NotImplementedError(f"{type(self).__name__} sets `iterates` but does not define `distil`; define it")

    def is_finished(self, phase: int, folder: Path) -> bool:
        """Return whether the phase in `folder` has finished."""
        return finished(folder, self.rule.phases[phase].iterations)

    @property
    def draws(self) -> int:
        """Number of random draws per step. Workers can compute them in parallel; their gradients are averaged."""
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
        """Return the object with which worker `rank` of `size` workers computes its draws of every step."""
        raise NotImplementedError(f"{type(self).__name__} has several `draws` but no `part_of_step`; define it")

    def pairs_of_step(self, phase: int, train: Callable[[], PreparedSplit]) -> int:
        """Return the number of pairs that one update passes through the towers. Displays of pairs per second use it."""
        return self.rule.phases[phase].pairs
