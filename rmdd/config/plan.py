"""The section `distill.plan`: settings for `phases: auto` and `phases: adaptive`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rmdd.config.hashing import Purpose
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Section


class Plan(Section):
    """Settings of planned phases (`phases: auto` or `adaptive`); `rmdd.distill.trajectory.planning` explains the plan.
    The planned phases are written to plan.json in the run folder; listing them in a run file gives equal results."""

    kind: Literal["stated", "auto", "adaptive"] = Field(
        "stated", description="set by distill.phases: stated for a list of phases, otherwise auto or adaptive"
    )
    chain: bool = Field(
        True,
        description="auto with trajectory shortcut: plan chained phases (path_start: student), which all end at the "
        "first endpoint; a phase that does not raise the val score of students is dropped, and val also chooses "
        "evaluate.order; false: plan independent phases",
    )
    iterations: PositiveInt = Field(2000, description="number of iterations of all phases together")
    max_phases: PositiveInt = Field(3, description="largest number of phases")
    min_iterations: PositiveInt = Field(1000, description="smallest number of iterations per phase")
    min_pairs: Annotated[int, Field(ge=2)] = Field(90, description="smallest number of pairs per phase")
    reach: Annotated[float, Field(gt=0, le=1)] = Field(
        0.92, description="share of the experts' gain on val that is reached at the endpoint of the first phase"
    )
    reach_step: NonNegativeFloat = Field(
        0.04, description="independent phases: increase of `reach` from each phase to the next"
    )
    min_straightness: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="trajectory shortcut: smallest straightness (chord / path length) of an endpoint"
    )
    agreement: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.7, description="smallest cosine between the matching gradients of two start epochs in the range of one phase"
    )
    min_starts: PositiveInt = Field(2, description="smallest number of start epochs per phase, if enough are left")
    endpoints: tuple[PositiveInt, ...] | None = Field(
        None, description="epochs that may be endpoints and are stored; null: all epochs that experts.keep stores"
    )
    experts: PositiveInt = Field(2, description="number of experts from which phases are planned")
    draws: PositiveInt = Field(
        2, description="mini-batches per expert for the gradients of a plan; an adaptive adjustment uses one"
    )
    every: PositiveInt = Field(50, description="adaptive: iterations between two changes of start range and endpoint")
    pace: PositiveFloat = Field(
        0.25, description="adaptive: largest change, in epochs, of an end of the start range per adjustment"
    )

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Leave out `chain: false`, so that the hashes of independent phases stay as before this field existed."""
        return () if self.chain else ("chain",)

    @property
    def plans(self) -> bool:
        """True if rmdd plans the phases; False if the run file lists them."""
        return self.kind != "stated"
