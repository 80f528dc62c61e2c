"""The matching loop: phases, similarity, and the switches that methods set."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from rmdd.config import recipes
from rmdd.config.hashing import Purpose, no_hash
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.plan import Plan
from rmdd.config.recipes import Recipe
from rmdd.config.runfile import Clash, Section, validate

S = TypeVar("S", bound=Section)


class Phase(Section):
    """One sub-problem: `pairs` synthetic pairs matched to starts in [start, stop) of a path that ends at `endpoint`."""

    pairs: PositiveInt = Field(description="synthetic pairs M of this phase")
    start: Annotated[int, Field(ge=0)] = Field(0, description="first epoch at which a student may start")
    stop: PositiveInt = Field(2, description="exclusive upper bound of the start epoch")
    start_text: Annotated[int, Field(ge=0)] | None = Field(
        None, description="method amd; the text side's; null: as start"
    )
    stop_text: PositiveInt | None = Field(None, description="method amd; the text side's; null: as stop")
    grow_from: PositiveInt | None = Field(
        None, description="method datm; upper bound at the first iteration; null: stop throughout"
    )
    grow_until: PositiveInt | None = Field(
        None, description="method datm; iteration at which a growing upper bound reaches stop"
    )
    endpoint: PositiveInt = Field(6, description="epoch t_p at which the path ends, inclusive")
    iterations: PositiveInt = Field(2000, description="outer updates")

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The half-open range of start epochs, per side."""
        text = (
            self.start if self.start_text is None else self.start_text,
            self.stop if self.stop_text is None else self.stop_text,
        )
        return {"image": (self.start, self.stop), "text": text}

    def clashes(self) -> list[Clash]:
        if (self.grow_from is None) != (self.grow_until is None):
            return [Clash("grow_from and grow_until go together; give both or neither", "grow_from", "grow_until")]
        if self.grow_from is not None and not self.start < self.grow_from <= self.stop:
            text = f"grow_from {self.grow_from} must lie above start {self.start} and at most at stop {self.stop}"
            return [Clash(text, "grow_from", "start", "stop")]
        if self.grow_from is not None and self.start_text is not None and self.start_text >= self.grow_from:
            text = f"grow_from {self.grow_from} must lie above start_text {self.start_text}"
            return [Clash(text, "grow_from", "start_text")]
        return []


class Similarity(Section):
    kind: Literal["full", "low_rank", "identity"] = Field(
        "full", description="target similarity of a subset: an M x M matrix, its factors, or fixed at the identity"
    )
    rank: PositiveInt = Field(10, description="low_rank: columns R of each factor")
    alpha: PositiveFloat = Field(1.0, description="low_rank: S = diag(omega) + alpha/R L R^T")
    diagonal: Literal["vector", "scalar"] = Field(
        "vector", description="low_rank: omega per pair, as coded, or one number, as LoRS prints it"
    )
    clamp: tuple[float, float] | None = Field(None, description="full: bounds of every entry after a step; null: none")

    def clashes(self) -> list[Clash]:
        found = []
        if self.clamp is not None and self.kind != "full":
            text = "distill.similarity.clamp bounds the entries of a matrix; set distill.similarity.kind: full"
            found.append(Clash(text, "distill.similarity.clamp", "distill.similarity.kind"))
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            text = f"distill.similarity.clamp must be (low, high), found {self.clamp}"
            found.append(Clash(text, "distill.similarity.clamp"))
        return found


class Guard(Section):
    """What is taken for a derailed phase: it goes back to its last good state and on with halved outer rates."""

    retries: Annotated[int, Field(ge=0)] = Field(
        3, description="rollbacks of a phase before it fails; in no hash", json_schema_extra=no_hash()
    )
    every: PositiveInt = Field(50, description="iterations between the states to go back to")
    max_rate_growth: Annotated[float, Field(gt=1)] = Field(
        100.0, description="an inner rate this many times its start, or this small a share of it, has derailed"
    )
    dead_similarity: bool = Field(
        True, description="wbce: no learned diagonal entry above 0.5, so that no pair is a positive, has derailed"
    )


WORDS = ("auto", "adaptive")
"""What `phases` may say in place of a list."""

OF_REACH = ("distill.phases.stop", "stop_text", "start_rule", "match_epochs", "options", "plan.kind")
"""The fields that `Distill.reach` depends on, for the clashes that use it."""


class Distill(Section):
    method: str = Field(
        "ptm_st", description="the recipe: a name of `rmdd methods`, or module:Class; its values hold unless set here"
    )
    options: dict[str, Any] = Field({}, description="fields of the method's own; `rmdd methods NAME` tells them")
    budget: PositiveInt = Field(100, description="pairs, counted memory-fair: the similarity is paid for in pairs")
    phases: tuple[Phase, ...] = Field(
        (Phase(pairs=99),),
        description="sub-problems, in the order in which students learn from them; or auto, found from the experts "
        "before distilling, or adaptive, which also move while distilling",
        json_schema_extra=no_hash("plan"),
    )
    plan: Plan = Plan()
    budget_check: Literal["error", "warn"] = Field(
        "error", description="what happens when the phases cost more than the budget", json_schema_extra=no_hash()
    )
    trajectory: Literal["original", "shortcut", "convexified"] = Field(
        "shortcut",
        description="path of targets: the epochs as trained, the shortcut to the endpoint, or to the last epoch",
    )
    endpoint_rule: Literal["inclusive", "exclusive"] = Field(
        "inclusive", description="exclusive reproduces the released buffers, which end one epoch early"
    )
    start_rule: Literal["exclusive", "inclusive"] = Field("exclusive", description="whether `stop` itself may be drawn")
    estimator: Literal["exact", "first_order"] = Field(
        "exact", description="meta-gradient; first_order, as published, leaves out how a step moves the next"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the student's matrix products; bfloat16 turns the gradient of pictures a little (cosine 0.99), "
        "and a frozen tower stays float32",
    )
    reuse_graphs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="last inner steps whose first pass keeps its graph for the second: up to two ninths less work "
        "for each, and a graph more to hold; moves the rounding; at most sqrt(steps) with keep_parameters: recompute",
    )
    loss: Literal["wbce", "infonce", "bce", "cwcl", "kl", "mse"] = Field(
        "wbce", description="loss of the student's steps, here and in evaluation"
    )
    temperature: PositiveFloat | None = Field(None, description="of the student's cosines; null: model.temperature")
    similarity: Similarity = Similarity()
    steps: PositiveInt = Field(8, description="inner student steps K")
    match_epochs: PositiveInt = Field(1, description="expert epochs dT between start and target")
    batch: Annotated[int, Field(ge=2)] = Field(20, description="inner mini-batch B")
    batches: Literal["cycle", "independent"] = Field(
        "cycle", description="cut from permutations of all pairs, or a fresh draw each step (MTT-VL)"
    )
    branches: Literal["separate", "merged"] = Field(
        "separate", description="separate: one ratio per tower, summed; merged: one ratio over all parameters"
    )
    skip_above: PositiveFloat | None = Field(
        None, description="make no step where the miss is larger, and count it (DATM's threshold); null: never skip"
    )
    inner_dropout: Literal["same_mask", "fresh_mask", "off"] = Field(
        "same_mask", description="fresh_mask is what the released code does"
    )
    optimiser: Literal["sgd", "normalised"] = Field(
        "sgd",
        description="outer steps; normalised divides each gradient by its size, so that a rate is a step per entry",
    )
    lr_image: NonNegativeFloat = Field(1000.0, description="outer rate of the pictures; 0 keeps them as they start")
    lr_text: NonNegativeFloat = Field(1000.0, description="outer rate of the text embeddings")
    lr_similarity: NonNegativeFloat = Field(10.0, description="outer rate of the similarity")
    lr_lr: NonNegativeFloat = Field(1e-2, description="rate of the learnable inner rates")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="of the outer steps")
    inner_lr: PositiveFloat = Field(0.1, description="both inner rates at the start")
    inner_lr_text: PositiveFloat | None = Field(None, description="the text side's at the start; null: as inner_lr")
    min_inner_lr: NonNegativeFloat | None = Field(None, description="lower clamp of the inner rates; null: none")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="decay of the exported average; 0 exports the raw set"
    )
    init: Literal["real", "prototypes", "noise"] = Field(
        "real", description="what the set starts from: random pairs, the pairs nearest to k-means centres, or noise"
    )
    stored_size: PositiveInt | None = Field(
        None,
        description="side of the pictures as stored and paid for; towers see them enlarged; null: data.image_size",
    )
    init_augment: bool = Field(False, description="start from augmented pictures, as LoRS does")
    guard: Guard = Field(Guard(), json_schema_extra=no_hash("plan"))
    checkpoint_every: PositiveInt = Field(50, description="iterations between checkpoints", json_schema_extra=no_hash())
    snapshots: Annotated[int, Field(ge=1)] = Field(
        1, description="how many sets to keep, evenly spaced over the iterations; the last is always one of them"
    )
    seed: int | None = Field(None, description="null: the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _word_for_phases(cls, value: Any) -> Any:
        """`phases: auto` is an empty list and `plan.kind: auto`."""
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
            raise ValueError(f"give a list of phases, or one of {' and '.join(WORDS)}")
        return value

    @property
    def method_name(self) -> str:
        """What results are filed under: the name of the method, or of the class where an import path is given."""
        return self.method.rpartition(":")[2]

    @property
    def recipe(self) -> Recipe | None:
        """The method; None where it cannot be found."""
        try:
            return recipes.find(self.method)
        except ValueError:
            return None

    def options_as(self, kind: type[S]) -> S | None:
        """The options as fields of `kind`, its defaults where they say nothing; None where they cannot be read."""
        return validate(kind, copy.deepcopy(self.options))[0]

    @property
    def real_starts(self) -> bool:
        """Whether students start at real-valued epochs; else at whole ones."""
        recipe = self.recipe
        return recipe is not None and recipe.real_starts(self)

    def reach(self, phase: Phase) -> int:
        """The last epoch that a start of `phase` and its target may need."""
        stop = max(stop for _, stop in phase.ranges.values())
        beyond = self.start_rule == "inclusive" or self.real_starts
        return stop - (not beyond) + self.match_epochs

    def clashes(self) -> list[Clash]:
        mistakes = []
        if self.method_name in ("random", "full"):
            text = f"distill.method is {self.method}, but '{self.method_name}' is a row of every result table"
            mistakes.append(Clash(text, "distill.method"))
        for p, phase in enumerate(self.phases):
            if phase.pairs < 2:
                text = f"distill.phases.{p}.pairs is {phase.pairs}: one pair has no negatives; give at least 2"
                mistakes.append(Clash(text, "distill.phases.pairs"))
        return mistakes

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """A run is what its phases are, or what they are found by; a phase is the same however it was found."""
        if purpose == "run":
            return ("phases",) if self.plan.plans else ("plan",)
        return ("plan",) if purpose == "phases" and self.plan.kind != "adaptive" else ()
