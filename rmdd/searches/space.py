"""The values that the trials of a search try, and whether the run file can take them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rmdd import config

SECTIONS = ("model", "experts", "distill")
"""What a trial may change; data and evaluation are the same for all, or their scores could not be compared."""

DRAWS = 48
"""Tries to find values of the other fields that suit an end of a range."""


def overrides(values: Mapping[str, Any]) -> list[str]:
    """As `--set` takes them; every number is read back as it was."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000_000)
    return text.strip().removesuffix("\n...")


class Space:
    """The dimensions of a search, each after those that it depends on."""

    def __init__(self, search: config.Search):
        self.search = search
        self.dimensions = {field: search.space[field] for field in search.ordered()}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Draw the fields whose conditions hold, define-by-run, from an Optuna trial; returns their values."""
        values: dict[str, Any] = {}
        for field, each in self.dimensions.items():
            if not each.holds(values):
                continue
            if each.kind == "choice":
                values[field] = decoded(each, trial.suggest_categorical(field, _categories(each)))
                continue
            (low, high), log = each.ends, each.kind.startswith("log")
            if each.kind in ("int", "logint"):
                values[field] = trial.suggest_int(field, low, high, step=round(each.step or 1), log=log)
            else:
                values[field] = trial.suggest_float(field, low, high, step=each.step, log=log)
        return values

    def active(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values that a resolved run has of the fields whose conditions hold; None when it lies outside."""
        values: dict[str, Any] = {}
        for field, each in self.dimensions.items():
            if each.holds(values):
                value = looked_up(run, field)
                if not _inside(each, value):
                    return None
                values[field] = value
        return values

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` as Optuna keeps them."""
        return {field: encoded(self.dimensions[field], value) for field, value in values.items()}

    def distributions(self, values: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        return {field: distribution(self.dimensions[field]) for field in values}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, with conditions followed; values as Optuna keeps them."""
        rows: list[dict[str, Any]] = [{}]
        for field, each in self.dimensions.items():
            points = _points(each)
            rows = [
                drawn
                for row in rows
                for drawn in ([{**row, field: p} for p in points] if each.holds(self._decoded(row)) else [row])
            ]
        return rows

    @property
    def trials(self) -> int:
        """How many there are to be: those asked for, of a grid no more than it has points."""
        return min(self.search.trials, len(self.grid())) if self.search.sampler == "grid" else self.search.trials

    def _decoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {field: decoded(self.dimensions[field], value) for field, value in row.items()}

    # -- validation --------------------------------------------------------------------------------------------------

    def mistakes(self, mistakes_of: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
        """What the run file cannot take, naming the field; empty when every end of every range can be had.

        `mistakes_of(values)` says what is wrong with the run of a trial. What clashes with other fields of the space
        at every one of many draws is a mistake too; what clashes at some is not.
        """
        if not self.dimensions:
            return ["search.space is empty; give fields to try, such as distill.lr_image: {loguniform: [10, 10000]}"]
        mistakes = [
            f"search.space.{field}: trials may differ in {', '.join(SECTIONS)}, or their scores could not be compared"
            for field in self.dimensions
            if field.split(".")[0] not in SECTIONS
        ]
        mistakes += self._never() + [
            f"search.space.{field}: lies within {other}, which is in the space too and would overwrite it; keep one"
            for field in self.dimensions
            for other in self.dimensions
            if field.startswith(f"{other}.")
        ]
        if mistakes:
            return mistakes
        doubtful = []
        for field, each in self.dimensions.items():
            for value in _probes(each):
                pinned = {**self._conditions(field), field: value}
                wrong = mistakes_of(pinned)
                about = [m for m in wrong if m.startswith((f"{field}:", f"{field}.", "--set"))]
                if about:
                    mistakes.append(f"search.space.{field}: at {_yaml(value)}: {about[0]}")
                    break
                if wrong:
                    doubtful.append((field, value, pinned, wrong))
        if mistakes:
            return mistakes
        for field, value, pinned, wrong in doubtful:
            if all(mistakes_of(drawn) for drawn in self._draws(pinned)):
                mistakes.append(f"search.space.{field}: at {_yaml(value)}: {wrong[0]}")
        return mistakes

    def _never(self) -> list[str]:
        return [
            f"search.space.{field}.when: {other} is never {_yaml(value)} in this space; add that value or correct it"
            for field, each in self.dimensions.items()
            for other, wanted in each.when.items()
            for value in (wanted if isinstance(wanted, list) else [wanted])
            if not _inside(self.dimensions[other], value)
        ]

    def _conditions(self, field: str) -> dict[str, Any]:
        """Values with which the conditions of `field` hold."""
        values: dict[str, Any] = {}
        for other, wanted in self.dimensions[field].when.items():
            values |= self._conditions(other) | {other: wanted[0] if isinstance(wanted, list) else wanted}
        return values

    def _draws(self, pinned: Mapping[str, Any]) -> list[dict[str, Any]]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(DRAWS):
            study.enqueue_trial(self.parameters(pinned))
        return [{**self.suggest(study.ask()), **pinned} for _ in range(DRAWS)]


def distribution(each: config.Dimension) -> BaseDistribution:
    if each.kind == "choice":
        return CategoricalDistribution(_categories(each))
    (low, high), log = each.ends, each.kind.startswith("log")
    if each.kind in ("int", "logint"):
        return IntDistribution(low, high, log=log, step=round(each.step or 1))
    return FloatDistribution(low, high, log=log, step=each.step)


def encoded(each: config.Dimension, value: Any) -> Any:
    """A value as Optuna keeps it: lists and mappings as JSON."""
    return json.dumps(value) if each.kind == "choice" and isinstance(value, list | tuple | dict) else value


def decoded(each: config.Dimension, value: Any) -> Any:
    assert each.choice is None or value in _categories(each)
    return value if each.choice is None else each.choice[_categories(each).index(value)]


def _inside(each: config.Dimension, value: Any) -> bool:
    if each.kind == "choice":
        return encoded(each, value) in _categories(each)
    low, high = each.ends
    if not isinstance(value, int | float) or not low <= value <= high:
        return False
    off = (value - low) / each.step if each.step is not None else 0.0
    return bool(abs(off - round(off)) < 1e-9)


def _categories(each: config.Dimension) -> list[Any]:
    return [encoded(each, value) for value in each.choice or ()]


def _points(each: config.Dimension) -> list[Any]:
    """All values of a dimension with finitely many."""
    if each.kind == "choice":
        return _categories(each)
    (low, high), step = each.ends, each.step or 1
    points = [low + i * step for i in range(round((high - low) / step) + 1)]
    return [round(p) for p in points] if each.kind == "int" else points


def _probes(each: config.Dimension) -> list[Any]:
    """Every choice, or the ends of a range and a number between that is not whole where the range is not."""
    if each.kind == "choice":
        return list(each.choice or ())
    low, high = each.ends
    between = low + each.step if each.step is not None else low + 0.381966 * (high - low)
    return [low, high] if each.kind in ("int", "logint") else [low, high, between]


def looked_up(run: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field of a resolved run; None where there is none."""
    node: Any = run
    for part in field.split("."):
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node
