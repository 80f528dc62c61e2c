"""How phases plan themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Section


class Plan(Section):
    """What `phases: auto` and `phases: adaptive` go by (the rule: `rmdd.distill.trajectory.planning`). The phases
    that are found go to plan.json in the run folder, and a run that lists them is the same one."""

    kind: Literal["stated", "auto", "adaptive"] = Field(
        "stated", description="what `phases` says: a list, or one of the two words"
    )
    iterations: PositiveInt = Field(2000, description="outer updates, all phases together")
    max_phases: PositiveInt = Field(3, description="most phases")
    min_iterations: PositiveInt = Field(1000, description="updates that a phase needs before another one pays")
    min_pairs: Annotated[int, Field(ge=2)] = Field(90, description="pairs that a phase needs before another one pays")
    reach: Annotated[float, Field(gt=0, le=1)] = Field(
        0.92, description="share of the teacher's gain on val that the first endpoint has reached"
    )
    reach_step: NonNegativeFloat = Field(0.04, description="how much more the endpoint of each later phase reaches")
    min_straightness: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="shortcut: endpoints whose chord is a smaller share of the path are left out"
    )
    agreement: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.7, description="cosine of matching gradients from which on a start belongs to the range of the one before it"
    )
    min_starts: PositiveInt = Field(2, description="starts of a range at least, where the path has as many")
    endpoints: tuple[PositiveInt, ...] | None = Field(
        None, description="epochs that may be endpoints, which the store keeps; null: every epoch that is kept"
    )
    experts: PositiveInt = Field(2, description="experts whose checkpoints are read for the signals")
    draws: PositiveInt = Field(2, description="mini-batch draws of each for the gradients of a plan; a move takes one")
    every: PositiveInt = Field(50, description="adaptive: updates between moves of range and endpoint")
    pace: PositiveFloat = Field(0.25, description="adaptive: most epochs that a bound moves at once")

    @property
    def plans(self) -> bool:
        """Whether phases are found and not given."""
        return self.kind != "stated"
