"""The `search` section of a run file: the search space over its fields, and how trials are drawn from it."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field

from rmdd.config.hashing import no_hash
from rmdd.config.numbers import PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section

Whole = int
"""The type `int`, under another name because `Dimension` has a field `int`."""

KINDS = ("uniform", "loguniform", "int", "logint", "choice")


class Dimension(Section):
    """The values to try for one field: exactly one of uniform, loguniform, int, logint and choice."""

    uniform: tuple[float, float] | None = Field(None, description="lowest and highest value; draws are uniform")
    loguniform: tuple[float, float] | None = Field(
        None, description="lowest and highest value; the logarithm is drawn uniformly"
    )
    logint: tuple[Whole, Whole] | None = Field(
        None, description="lowest and highest whole number; the logarithm is drawn uniformly"
    )
    choice: tuple[Any, ...] | None = Field(None, description="list of values, which may be lists themselves")
    step: PositiveFloat | None = Field(None, description="uniform and int: distance between two neighbouring values")
    when: dict[str, Any] = Field(
        {}, description="try this field only if other fields of search.space have these values (one or a list each)"
    )
    int: tuple[Whole, Whole] | None = Field(None, description="lowest and highest whole number; draws are uniform")

    @property
    def kind(self) -> str:
        """Name of the one field among `KINDS` that is set."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def ends(self) -> tuple[Any, Any]:
        """Lowest and highest value of a range. With a step, the highest value is the last one that the steps reach."""
        low, high = getattr(self, self.kind)
        if self.step is not None:
            high = low + math.floor((high - low) / self.step + 1e-9) * self.step
        return (low, round(high)) if self.kind in ("int", "logint") else (low, high)

    def holds(self, values: dict[str, Any]) -> bool:
        """Return whether the values of other fields (`values`, by field name) meet the conditions in `when`."""
        return all(
            key in values and values[key] in (allowed if isinstance(allowed, list) else [allowed])
            for key, allowed in self.when.items()
        )

    def mistakes(self) -> list[str]:
        """Return the mistakes in this dimension."""
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            return [f"needs exactly one of {', '.join(KINDS)}, found {' and '.join(kinds) or 'none'}"]
        kind, value, mistakes = kinds[0], getattr(self, kinds[0]), []
        if self.step is not None and kind not in ("uniform", "int"):
            mistakes.append(f"step works only with uniform and int, found {kind}; remove it")
        if self.step is not None and kind == "int" and self.step % 1:
            mistakes.append(f"the step of int must be a whole number, found {self.step:g}")
        if kind == "choice":
            if not value or any(a == b for i, a in enumerate(value) for b in value[:i]):
                mistakes.append(f"choice needs different values, found {list(value)}")
            return mistakes
        low, high = value
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            mistakes.append(f"{kind} needs two finite numbers, the lower one first, found {list(value)}")
        elif kind.startswith("log") and low <= 0:
            mistakes.append(f"{kind} needs two numbers above 0, found {list(value)}")
        elif self.step is not None and self.step > high - low:
            mistakes.append(f"the step {self.step:g} is larger than the range of {kind} {list(value)}")
        return mistakes


class Search(Section):
    """Settings of `rmdd search`: trials are this run with some values changed, compared by R@mean on val."""

    space: dict[str, Dimension] = Field(
        {},
        description="fields of model, experts and distill to try, such as distill.lr_image: {loguniform: [10, 10000]}; "
        "also uniform, int, logint (with step: N), choice: [a, b], and when: {other.field: value}",
    )
    trials: PositiveInt = Field(24, description="number of trials; can be increased later", json_schema_extra=no_hash())
    base: bool = Field(
        True, description="the first trial uses the values of the run file, if the space contains them; not for grid"
    )
    sampler: Literal["tpe", "random", "cmaes", "grid", "nsgaii"] = Field(
        "tpe", description="algorithm that chooses the values of a trial"
    )
    pruner: Literal["none", "asha", "median"] = Field(
        "none",
        description="algorithm that stops poor trials early, by their score on val at each snapshot "
        "(distill.snapshots)",
    )
    cost: Literal["none", "seconds", "iterations"] = Field(
        "none", description="second objective to minimise: seconds or iterations that the distillation takes"
    )
    startup: PositiveInt = Field(
        10, description="number of trials before tpe and median use results; also the population size of nsgaii"
    )
    reduction: Whole = Field(3, ge=2, description="asha: the best of this many trials continues to the next snapshot")
    concurrency: PositiveInt | None = Field(
        None,
        description="number of trials that run in parallel; null: as many as the cluster has room for",
        json_schema_extra=no_hash(),
    )
    seed: Whole | None = Field(None, description="random seed of the sampler; null: the run's seed")
    storage: str | None = Field(
        None,
        description="URL of a database that several processes can share; ${VARIABLES} are read from the environment; "
        "null: a file in the folder of the search",
        json_schema_extra=no_hash(),
    )
    warm_start: tuple[str, ...] = Field((), description="folders of earlier searches whose results the sampler uses")

    def clashes(self) -> list[Clash]:
        mistakes = [
            Clash(f"search.space.{field}: {m}", "search.space", field, "step", *KINDS)
            for field, each in self.space.items()
            for m in each.mistakes()
        ]
        for field, each in self.space.items():
            mistakes += [
                Clash(
                    f"search.space.{field}.when: '{other}' is not in the space; add it or remove the condition",
                    *("search.space", "when", field, other),
                )
                for other in each.when
                if other not in self.space
            ]
        if not mistakes and (circle := self._circle()):
            text = f"search.space: the conditions of {circle} depend on each other; remove one of them"
            mistakes.append(Clash(text, "search.space", "when", *self.space))
        if self.sampler == "grid" and not mistakes:
            mistakes += [
                Clash(
                    f"search.space.{field}: a grid needs choice, int, or uniform with a step, found {each.kind}",
                    *("search.sampler", "search.space", field, "step", *KINDS),
                )
                for field, each in self.space.items()
                if each.kind in ("loguniform", "logint") or (each.kind == "uniform" and each.step is None)
            ]
        if self.cost != "none" and self.pruner != "none":
            text = f"search.pruner: {self.pruner} ignores search.cost; set search.cost or search.pruner to none"
            mistakes.append(Clash(text, "search.cost", "search.pruner"))
        if self.cost != "none" and self.sampler == "cmaes":
            text = (
                "search.sampler: cmaes supports only one objective; set search.cost to none, or the sampler to tpe or "
                "nsgaii"
            )
            mistakes.append(Clash(text, "search.cost", "search.sampler"))
        if self.storage is not None and re.search(r"://[^/@]*:(?!\$\{)[^/@]+@", self.storage):
            text = (
                "search.storage contains a password, which would be written to files; put it into an environment "
                "variable and write ${NAME} in its place"
            )
            mistakes.append(Clash(text, "search.storage"))
        return mistakes

    def ordered(self) -> list[str]:
        """Return the fields of the search space; each follows the fields that its conditions (`when`) name."""
        ordered: list[str] = []
        remaining = list(self.space)
        while ready := [field for field in remaining if all(other in ordered for other in self.space[field].when)]:
            ordered.append(ready[0])
            remaining.remove(ready[0])
        return ordered

    def _circle(self) -> str:
        return ", ".join(field for field in self.space if field not in self.ordered())
