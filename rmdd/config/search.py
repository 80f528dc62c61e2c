"""What `rmdd search` tries: a space over the fields of the run file, and who draws from it."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field

from rmdd.config.hashing import no_hash
from rmdd.config.numbers import PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section

Whole = int
"""`int` is the name of a field below."""

KINDS = ("uniform", "loguniform", "int", "logint", "choice")


class Dimension(Section):
    """The values of one field: exactly one of uniform, loguniform, int, logint and choice."""

    uniform: tuple[float, float] | None = Field(None, description="numbers between two, ends included")
    loguniform: tuple[float, float] | None = Field(None, description="the same, by their logarithm")
    logint: tuple[Whole, Whole] | None = Field(None, description="whole numbers, by their logarithm")
    choice: tuple[Any, ...] | None = Field(None, description="any values, also lists")
    step: PositiveFloat | None = Field(None, description="of uniform and int")
    when: dict[str, Any] = Field({}, description="other fields of the space, and the value, or list of values, of each")
    int: tuple[Whole, Whole] | None = Field(None, description="whole numbers")

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def ends(self) -> tuple[Any, Any]:
        """Lowest and highest value of a range; with a step, the last one that it reaches."""
        low, high = getattr(self, self.kind)
        if self.step is not None:
            high = low + math.floor((high - low) / self.step + 1e-9) * self.step
        return (low, round(high)) if self.kind in ("int", "logint") else (low, high)

    def holds(self, values: dict[str, Any]) -> bool:
        """Whether its conditions are met."""
        return all(
            key in values and values[key] in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in self.when.items()
        )

    def mistakes(self) -> list[str]:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            return [f"give one of {', '.join(KINDS)}, found {' and '.join(given) or 'none'}"]
        kind, value, found = given[0], getattr(self, given[0]), []
        if self.step is not None and kind not in ("uniform", "int"):
            found.append(f"a step belongs to uniform or int, not to {kind}")
        if self.step is not None and kind == "int" and self.step % 1:
            found.append(f"the step of int must be a whole number, found {self.step:g}")
        if kind == "choice":
            if not value or any(a == b for i, a in enumerate(value) for b in value[:i]):
                found.append(f"choice needs values that differ, found {list(value)}")
            return found
        low, high = value
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            found.append(f"{kind} needs two finite ends, the lower first, found {list(value)}")
        elif kind.startswith("log") and low <= 0:
            found.append(f"{kind} needs ends above 0, found {list(value)}")
        elif self.step is not None and self.step > high - low:
            found.append(f"the step {self.step:g} is wider than {kind} {list(value)}")
        return found


class Search(Section):
    """`rmdd search`: trials of this run with other values, compared by val R@mean. Test is never read."""

    space: dict[str, Dimension] = Field(
        {},
        description="dotted fields of model, experts and distill, such as distill.lr_image: {loguniform: [10, 10000]}; "
        "also uniform, int, logint (with step: N), choice: [a, b], and when: {other.field: value}",
    )
    trials: PositiveInt = Field(24, description="how many to make; can be raised later", json_schema_extra=no_hash())
    base: bool = Field(
        True, description="the first trial takes the run file's own values where they lie in the space; a grid does not"
    )
    sampler: Literal["tpe", "random", "cmaes", "grid", "nsgaii"] = Field("tpe", description="who chooses the values")
    pruner: Literal["none", "asha", "median"] = Field(
        "none", description="stops poor trials by their val at the snapshots of the distillation (distill.snapshots)"
    )
    cost: Literal["none", "seconds", "iterations"] = Field(
        "none", description="a second objective, to be kept low: of the distillation"
    )
    startup: PositiveInt = Field(
        10, description="trials before tpe and median rely on what they saw, and the population of nsgaii"
    )
    reduction: Whole = Field(3, ge=2, description="asha lets one in so many climb to the next rung")
    concurrency: PositiveInt | None = Field(
        None, description="trials side by side; null: as many as have room", json_schema_extra=no_hash()
    )
    seed: Whole | None = Field(None, description="null: the run's seed")
    storage: str | None = Field(
        None,
        description="URL of a database that several drivers may share, ${VARIABLES} taken from the environment; "
        "null: a file beside the search",
        json_schema_extra=no_hash(),
    )
    warm_start: tuple[str, ...] = Field((), description="folders of earlier searches to learn from")

    def clashes(self) -> list[Clash]:
        found = [
            Clash(f"search.space.{field}: {m}", "search.space", field, "step", *KINDS)
            for field, each in self.space.items()
            for m in each.mistakes()
        ]
        for field, each in self.space.items():
            found += [
                Clash(
                    f"search.space.{field}.when: '{other}' is not in the space; add it or take the condition out",
                    *("search.space", "when", field, other),
                )
                for other in each.when
                if other not in self.space
            ]
        if not found and (circle := self._circle()):
            text = f"search.space: the conditions of {circle} depend on each other; take one out"
            found.append(Clash(text, "search.space", "when", *self.space))
        if self.sampler == "grid" and not found:
            found += [
                Clash(
                    f"search.space.{field}: a grid needs choice, int, or uniform with a step, found {each.kind}",
                    *("search.sampler", "search.space", field, "step", *KINDS),
                )
                for field, each in self.space.items()
                if each.kind in ("loguniform", "logint") or (each.kind == "uniform" and each.step is None)
            ]
        if self.cost != "none" and self.pruner != "none":
            text = f"search.pruner: {self.pruner} compares by val alone; set search.cost or pruner to none"
            found.append(Clash(text, "search.cost", "search.pruner"))
        if self.cost != "none" and self.sampler == "cmaes":
            text = "search.sampler: cmaes knows one objective; set search.cost to none, or take tpe or nsgaii"
            found.append(Clash(text, "search.cost", "search.sampler"))
        if self.storage is not None and re.search(r"://[^/@]*:(?!\$\{)[^/@]+@", self.storage):
            text = (
                "search.storage holds a password, which would end up in files; put it into an environment variable and "
                "write ${NAME} in its place"
            )
            found.append(Clash(text, "search.storage"))
        return found

    def ordered(self) -> list[str]:
        """The fields of the space, each after those that its conditions name."""
        done: list[str] = []
        left = list(self.space)
        while ready := [field for field in left if all(other in done for other in self.space[field].when)]:
            done.append(ready[0])
            left.remove(ready[0])
        return done

    def _circle(self) -> str:
        return ", ".join(field for field in self.space if field not in self.ordered())
