"""The `distill` section of a run file: the method, its phases, the similarity, and the matching loop."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from rmdd.config import recipes
from rmdd.config.hashing import Purpose, no_hash
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.order import Order
from rmdd.config.plan import Plan
from rmdd.config.recipes import Recipe
from rmdd.config.runfile import Clash, Section, validate

S = TypeVar("S", bound=Section)


class Phase(Section):
    """A phase: one group of synthetic pairs. Each iteration draws a start epoch in [start, stop) and trains a student
    from the expert at that epoch. The student is then matched to a later point of the expert trajectory, which ends at
    `endpoint`."""

    pairs: PositiveInt = Field(description="number of synthetic pairs (M) of this phase")
    start: Annotated[int, Field(ge=0)] = Field(0, description="first expert epoch at which a student may start")
    stop: PositiveInt = Field(2, description="exclusive end of the range of start epochs")
    start_text: Annotated[int, Field(ge=0)] | None = Field(
        None, description="method amd: `start` of the text side; null: same as `start`"
    )
    stop_text: PositiveInt | None = Field(None, description="method amd: `stop` of the text side; null: as `stop`")
    grow_from: PositiveInt | None = Field(
        None, description="method datm: exclusive end of the start epochs at the first iteration; null: always `stop`"
    )
    grow_until: PositiveInt | None = Field(
        None, description="method datm: iteration at which the growing end of the start epochs reaches `stop`"
    )
    endpoint: PositiveInt = Field(6, description="last expert epoch (t_p) of the trajectory, inclusive")
    iterations: PositiveInt = Field(2000, description="number of iterations (updates of the synthetic pairs)")

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The half-open range of start epochs of the image side and of the text side."""
        text = (
            self.start if self.start_text is None else self.start_text,
            self.stop if self.stop_text is None else self.stop_text,
        )
        return {"image": (self.start, self.stop), "text": text}

    def clashes(self) -> list[Clash]:
        if (self.grow_from is None) != (self.grow_until is None):
            return [Clash("grow_from needs grow_until and vice versa; set both or neither", "grow_from", "grow_until")]
        if self.grow_from is not None and not self.start < self.grow_from <= self.stop:
            text = f"grow_from {self.grow_from} must be above start {self.start} and at most stop {self.stop}"
            return [Clash(text, "grow_from", "start", "stop")]
        if self.grow_from is not None and self.start_text is not None and self.start_text >= self.grow_from:
            text = f"grow_from {self.grow_from} must be above start_text {self.start_text}"
            return [Clash(text, "grow_from", "start_text")]
        return []


class Similarity(Section):
    """The target similarity S between the M images and M texts of a subset."""

    kind: Literal["full", "low_rank", "identity"] = Field(
        "full", description="full (a learned M x M matrix), low_rank (learned factors of it), or identity (not learned)"
    )
    rank: PositiveInt = Field(10, description="low_rank: rank R, the number of columns of each factor")
    alpha: PositiveFloat = Field(1.0, description="low_rank: factor alpha in S = diag(omega) + alpha/R L R^T")
    diagonal: Literal["vector", "scalar"] = Field(
        "vector", description="low_rank: one omega per pair (vector, LoRS's code) or one for all (scalar, LoRS's paper)"
    )
    clamp: tuple[float, float] | None = Field(
        None, description="full: lowest and highest entry of S, enforced after every update; null: no bounds"
    )

    def clashes(self) -> list[Clash]:
        mistakes = []
        if self.clamp is not None and self.kind != "full":
            text = "distill.similarity.clamp needs a full similarity matrix; set distill.similarity.kind: full"
            mistakes.append(Clash(text, "distill.similarity.clamp", "distill.similarity.kind"))
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            text = f"distill.similarity.clamp must be (low, high), found {self.clamp}"
            mistakes.append(Clash(text, "distill.similarity.clamp"))
        return mistakes


class Guard(Section):
    """Conditions under which a phase counts as diverged. It then returns to its last good state and
    continues with halved outer learning rates."""

    retries: Annotated[int, Field(ge=0)] = Field(
        3, description="number of rollbacks after which a phase fails; not hashed", json_schema_extra=no_hash()
    )
    every: PositiveInt = Field(50, description="iterations between two states that a rollback can return to")
    max_rate_growth: Annotated[float, Field(gt=1)] = Field(
        100.0, description="a phase has diverged if an inner learning rate grew or shrank by more than this factor"
    )
    dead_similarity: bool = Field(
        True, description="loss wbce: a phase has diverged if no diagonal entry of its similarity is above 0.5"
    )


WORDS = ("auto", "adaptive")
"""Words that `distill.phases` accepts instead of a list."""

OF_CHAIN = ("path_start", "path_lag", "path_epochs", "path_order")
"""Fields of `Distill` that have an effect only if several phases are chained."""

RATES = ("lr_image", "lr_text", "lr_similarity", "lr_lr")
"""Outer learning rates."""

LARGEST_STEP = 1.0
"""Largest outer learning rate with `optimiser: normalised`. Normalised pixels have a standard deviation of about 1, so
an update with a larger step per entry would replace the picture."""

OF_REACH = ("distill.phases.stop", "stop_text", "start_rule", "match_epochs", "options", "plan.kind")
"""Fields on which `Distill.reach` depends. If one is invalid, the last epoch that a phase needs is not checked."""


class Distill(Section):
    """The distillation: a method, its phases, and the settings of the matching loop."""

    method: str = Field(
        "ptm_st",
        description="a method that `rmdd methods` lists, or module:Class; it sets the defaults of other fields",
    )
    options: dict[str, Any] = Field({}, description="options of the method; `rmdd methods NAME` lists them")
    budget: PositiveInt = Field(
        100, description="size of the set in pairs; a learned similarity costs some of them (rmdd.config.budget)"
    )
    phases: tuple[Phase, ...] = Field(
        (Phase(pairs=99),),
        description="list of phases, in the order in which students train on them; auto: planned from the experts "
        "before distillation; adaptive: planned, and adjusted during distillation",
        json_schema_extra=no_hash("plan"),
    )
    plan: Plan = Plan()
    budget_check: Literal["error", "warn"] = Field(
        "error", description="whether phases above the budget cause an error or a warning", json_schema_extra=no_hash()
    )
    trajectory: Literal["original", "shortcut", "convexified"] = Field(
        "shortcut",
        description="trajectory that students are matched to: original (the expert's epochs), shortcut (the "
        "expert trajectory straightened to the endpoint), or convexified (straightened to the last epoch)",
    )
    path_start: Literal["theta_0", "student"] = Field(
        "theta_0",
        description="trajectory shortcut: where the paths of the second and later phases start. theta_0: at the expert "
        "before training; student: at a student that learned the earlier phases from theta_0, as evaluate says",
    )
    path_lag: PositiveInt | None = Field(
        None,
        description="path_start student: number of updates after which the next phase starts, and after which paths "
        "start at new students of the sets made so far; null: a phase starts when the one before it is finished",
    )
    path_epochs: PositiveInt | None = Field(
        None,
        description="path_start student: number of training epochs of these students on each subset; null: "
        "evaluate.epochs",
    )
    path_order: Order | None = Field(
        None,
        description="path_start student: order in which these students learn several subsets; null: evaluate.order",
    )
    endpoint_rule: Literal["inclusive", "exclusive"] = Field(
        "inclusive",
        description="exclusive: the trajectory ends one epoch before the endpoint, as in the released expert buffers",
    )
    start_rule: Literal["exclusive", "inclusive"] = Field(
        "exclusive", description="inclusive: a student may also start at the epoch `stop`, not only before it"
    )
    estimator: Literal["exact", "first_order"] = Field(
        "first_order",
        description="meta-gradient through the inner steps: first_order, which ignores how each step changes the "
        "gradients of later steps, as most published code does; or exact, the true gradient, which costs 1.17 times as "
        "much and distilled no better",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number format of the student's matrix products; bfloat16 changes the image gradient a little "
        "(cosine 0.99 to float32); a frozen tower stays float32",
    )
    reuse_graphs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="keep the autograd graphs of the last N inner steps from the first pass for the second; this saves "
        "up to 2/9 of the work of each of these steps, needs more memory, and changes rounding; N is at most "
        "sqrt(steps) with keep_parameters: recompute",
    )
    loss: Literal["wbce", "infonce", "bce", "cwcl", "kl", "mse"] = Field(
        "wbce", description="training loss of the students, in distillation and in evaluation"
    )
    temperature: PositiveFloat | None = Field(
        None, description="temperature by which the student's cosines are divided; null: model.temperature"
    )
    similarity: Similarity = Similarity()
    steps: PositiveInt = Field(8, description="number of inner steps (K) of a student")
    match_epochs: PositiveInt = Field(1, description="expert epochs (dT) between a student's start and its target")
    batch: Annotated[int, Field(ge=2)] = Field(20, description="number of pairs per inner step (B)")
    batches: Literal["cycle", "independent"] = Field(
        "cycle", description="cycle: batches from permutations of all pairs; independent: a new draw each step (MTT-VL)"
    )
    branches: Literal["separate", "merged"] = Field(
        "separate",
        description="matching loss: separate sums one normalised distance per tower, merged has one for all parameters",
    )
    skip_above: PositiveFloat | None = Field(
        None, description="matching loss above which the update is skipped (DATM's threshold); null: never skip"
    )
    inner_dropout: Literal["same_mask", "fresh_mask", "off"] = Field(
        "same_mask", description="dropout masks in the second pass through the inner steps; released code: fresh_mask"
    )
    optimiser: Literal["sgd", "normalised"] = Field(
        "sgd",
        description="optimiser of the synthetic pairs; normalised divides each gradient by its root mean square",
    )
    lr_image: NonNegativeFloat = Field(
        1000.0, description="outer learning rate of the images; 0 keeps the initial images"
    )
    lr_text: NonNegativeFloat = Field(1000.0, description="outer learning rate of the text embeddings")
    lr_similarity: NonNegativeFloat = Field(10.0, description="outer learning rate of the learned similarity")
    lr_lr: NonNegativeFloat = Field(1e-2, description="outer learning rate of the learned inner learning rates")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="momentum of the outer optimiser")
    inner_lr: PositiveFloat = Field(
        0.1, description="initial inner learning rate of the image side and of the text side"
    )
    inner_lr_text: PositiveFloat | None = Field(
        None, description="initial inner learning rate of the text side; null: same as inner_lr"
    )
    min_inner_lr: NonNegativeFloat | None = Field(
        None, description="lower bound of the inner learning rates; null: none"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="decay per update of the moving average of the set; the average is exported; 0: no average"
    )
    init: Literal["real", "mean_captions", "prototypes", "noise"] = Field(
        "real",
        description="initial pairs: random training pairs (real), random training images of which none is used twice, "
        "each with the mean embedding of its captions (mean_captions), training pairs nearest to k-means centres "
        "(prototypes), or noise",
    )
    stored_size: PositiveInt | None = Field(
        None,
        description="side in pixels of the stored images, which counts in the budget; towers get them enlarged to "
        "data.image_size; null: data.image_size",
    )
    init_augment: bool = Field(False, description="augment the images of the initial pairs, as LoRS does")
    guard: Guard = Field(Guard(), json_schema_extra=no_hash("plan"))
    checkpoint_every: PositiveInt = Field(50, description="iterations between checkpoints", json_schema_extra=no_hash())
    snapshots: Annotated[int, Field(ge=1)] = Field(
        1, description="number of intermediate sets to keep, evenly spaced over the iterations, including the last one"
    )
    seed: int | None = Field(None, description="random seed of the distillation; null: the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _word_for_phases(cls, value: Any) -> Any:
        """Turn `phases: auto` (or `adaptive`) into an empty list of phases and `plan.kind: auto` (or `adaptive`)."""
        if isinstance(value, dict) and value.get("phases") in WORDS:
            plan = {} if value.get("plan") is None else value["plan"]
            plan = plan.model_dump() if isinstance(plan, Plan) else plan
            if isinstance(plan, dict):
                return {**value, "phases": (), "plan": {**plan, "kind": value["phases"]}}
        return value

    @field_validator("phases", mode="before")
    @classmethod
    def _list_of_phases(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"must be a list of phases, or one of {' and '.join(WORDS)}")
        return value

    @property
    def method_name(self) -> str:
        """The method's name in results; for an import path, the name of the class."""
        return self.method.rpartition(":")[2]

    @property
    def recipe(self) -> Recipe | None:
        """The class of the distillation method (its recipe), or None if no method has the name `method`."""
        try:
            return recipes.find(self.method)
        except ValueError:
            return None

    def options_as(self, kind: type[S]) -> S | None:
        """Return `options` as a section of the class `kind`, filled with its defaults; None if an option is invalid."""
        return validate(kind, copy.deepcopy(self.options))[0]

    @property
    def plans_chain(self) -> bool:
        """Whether the phases are planned and chained; a plan of a single phase has no chain."""
        return self.plan.kind == "auto" and self.plan.chain and self.trajectory == "shortcut"

    @property
    def real_starts(self) -> bool:
        """Whether students may start between two epochs, such as at epoch 1.5."""
        recipe = self.recipe
        return recipe is not None and recipe.real_starts(self)

    def reach(self, phase: Phase) -> int:
        """Return the last expert epoch that a student of `phase` can be matched to."""
        stop = max(stop for _, stop in phase.ranges.values())
        beyond = self.start_rule == "inclusive" or self.real_starts
        return stop - (not beyond) + self.match_epochs

    def clashes(self) -> list[Clash]:
        mistakes = []
        if self.path_lag is not None and self.plans_chain:
            text = (
                "distill.path_lag starts phases before the val score of the earlier ones is known, and planned phases "
                "wait for it; remove distill.path_lag, or set distill.plan.chain: false"
            )
            mistakes.append(Clash(text, "distill.path_lag", "distill.phases", "plan.kind", "plan.chain"))
        if self.path_order is not None and self.plans_chain and not self.phases:
            text = (
                "distill.path_order has no effect on planned phases, whose plan chooses it; remove distill.path_order, "
                "or set distill.plan.chain: false"
            )
            mistakes.append(Clash(text, "distill.path_order", "distill.phases", "plan.kind", "plan.chain"))
        for name in OF_CHAIN[1:]:
            if getattr(self, name) is not None and self.path_start == "theta_0" and not self.plans_chain:
                text = f"distill.{name} needs paths that start at students; set distill.path_start: student"
                mistakes.append(Clash(text, f"distill.{name}", "distill.path_start"))
        if self.optimiser == "normalised" and (recipe := self.recipe) is not None:
            idle = {*recipe.idle_fields(), *(["lr_similarity"] if self.similarity.kind == "identity" else [])}
            rates = {name: getattr(self, name) for name in RATES if not {name, "optimiser"} & idle}
            large = {name: f"distill.{name} {rate:g}" for name, rate in rates.items() if rate > LARGEST_STEP}
            text = (
                f"distill.optimiser: normalised makes each rate the size of a step per entry, and normalised pixels "
                f"differ by about 1, so an update with {', '.join(large.values())} would replace every value; set "
                f"{' and '.join(f'distill.{name}' for name in large)} to 0.001 to 0.1, or set distill.optimiser: sgd, "
                "for which papers publish rates such as 100"
            )
            mistakes += [Clash(text, "distill.method", "optimiser", "similarity.kind", *large)] if large else []
        if self.method_name in ("random", "full"):
            text = (
                f"distill.method is {self.method}, but '{self.method_name}' is the name of a baseline in all result "
                "tables; rename the class"
            )
            mistakes.append(Clash(text, "distill.method"))
        for p, phase in enumerate(self.phases):
            if phase.pairs < 2:
                text = (
                    f"distill.phases.{p}.pairs is {phase.pairs}: a single pair has no negatives; set it to at least 2"
                )
                mistakes.append(Clash(text, "distill.phases.pairs"))
        return mistakes

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Leave `phases` out of a run's hash if the phases are planned, and `plan` if the phases are listed.

        The hash of a phase contains `plan` only for adaptive phases, because their plan changes them while they run.
        """
        single = len(self.phases) == 1 and (purpose == "phases" or not self.plan.plans)
        # without a chain, hashes stay as they were before these fields existed
        unused = OF_CHAIN if single or self.path_start == "theta_0" else ()
        if purpose == "phases":  # this hash contains the passes and the order of the students, however they are set
            unused = (*unused, "path_epochs", "path_order")
        elif self.path_order is None:
            unused = (*unused, "path_order")
        if purpose == "run":
            return (*unused, "phases") if self.plan.plans else (*unused, "plan")
        return (*unused, "plan") if purpose == "phases" and self.plan.kind != "adaptive" else unused
