"""`Space`: the fields and values that a search tries. It checks that run files with these values are valid."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rmdd import config

SECTIONS = ("model", "experts", "distill")
"""Sections of the run file that trials may change; equal data and evaluation keep their scores comparable."""

DRAWS = 48
"""If a value makes an invalid run, at most this many random draws of the other fields are tried with the value."""


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `values` (by dotted field) as arguments of `--set`; numbers keep their exact value."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000_000)
    return text.strip().removesuffix("\n...")


class Space:
    """The search space: the values to try for each field. A field comes after the fields on which it depends."""

    def __init__(self, search: config.Search):
        self.search = search
        self.dimensions = {field: search.space[field] for field in search.ordered()}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Let an Optuna trial draw a value for every field whose condition `when` holds; return the values by field."""
        values: dict[str, Any] = {}
        for field, dimension in self.dimensions.items():
            if not dimension.holds(values):
                continue
            if dimension.kind == "choice":
                values[field] = decoded(dimension, trial.suggest_categorical(field, _categories(dimension)))
                continue
            (low, high), log = dimension.ends, dimension.kind.startswith("log")
            if dimension.kind in ("int", "logint"):
                values[field] = trial.suggest_int(field, low, high, step=round(dimension.step or 1), log=log)
            else:
                values[field] = trial.suggest_float(field, low, high, step=dimension.step, log=log)
        return values

    def active(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a run's values of all fields whose condition `when` holds; None if one value is outside the space."""
        values: dict[str, Any] = {}
        for field, dimension in self.dimensions.items():
            if dimension.holds(values):
                value = field_value(run, field)
                if not _inside(dimension, value):
                    return None
                values[field] = value
        return values

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return `values` in the form in which Optuna stores the parameters of a trial."""
        return {field: encoded(self.dimensions[field], value) for field, value in values.items()}

    def distributions(self, values: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        return {field: distribution(self.dimensions[field]) for field in values}

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of values, each as a mapping by field, without fields whose `when` does not hold."""
        rows: list[dict[str, Any]] = [{}]
        for field, dimension in self.dimensions.items():
            points = _points(dimension)
            rows = [
                drawn
                for row in rows
                for drawn in ([{**row, field: p} for p in points] if dimension.holds(self._decoded(row)) else [row])
            ]
        return rows

    @property
    def trials(self) -> int:
        """Number of trials to run: `search.trials`, but for a grid at most the number of combinations of its values."""
        return min(self.search.trials, len(self.grid())) if self.search.sampler == "grid" else self.search.trials

    def _decoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {field: decoded(self.dimensions[field], value) for field, value in row.items()}

    # -- mistakes ----------------------------------------------------------------------------------------------------

    def mistakes(self, mistakes_of: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
        """Return a message for every field of the search space with a value that a run file does not allow.

        `mistakes_of(values)` returns the mistakes in the run of a trial. It is called for each choice and both ends of
        each range. A value that clashes with other fields is reported only if it clashes with all their random draws.
        """
        if not self.dimensions:
            return ["search.space is empty; give fields to try, such as distill.lr_image: {loguniform: [10, 10000]}"]
        mistakes = [
            f"search.space.{field}: trials may differ only in {', '.join(SECTIONS)}, so that scores can be compared"
            for field in self.dimensions
            if field.split(".")[0] not in SECTIONS
        ]
        mistakes += self._impossible_conditions() + [
            f"search.space.{field}: this is a part of {other}, which the space also varies; remove one of the two"
            for field in self.dimensions
            for other in self.dimensions
            if field.startswith(f"{other}.")
        ]
        if mistakes:
            return mistakes
        doubtful = []
        for field, dimension in self.dimensions.items():
            for value in _probes(dimension):
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

    def _impossible_conditions(self) -> list[str]:
        """Return a message for every condition `when` that never holds, because it needs a value outside the space."""
        return [
            f"search.space.{field}.when: {other} is never {_yaml(value)} in this space; add that value or change `when`"
            for field, dimension in self.dimensions.items()
            for other, required in dimension.when.items()
            for value in (required if isinstance(required, list) else [required])
            if not _inside(self.dimensions[other], value)
        ]

    def _conditions(self, field: str) -> dict[str, Any]:
        """Return values of other fields for which the condition `when` of `field` holds."""
        values: dict[str, Any] = {}
        for other, required in self.dimensions[field].when.items():
            values |= self._conditions(other) | {other: required[0] if isinstance(required, list) else required}
        return values

    def _draws(self, pinned: Mapping[str, Any]) -> list[dict[str, Any]]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(DRAWS):
            study.enqueue_trial(self.parameters(pinned))
        return [{**self.suggest(study.ask()), **pinned} for _ in range(DRAWS)]


def distribution(dimension: config.Dimension) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(_categories(dimension))
    (low, high), log = dimension.ends, dimension.kind.startswith("log")
    if dimension.kind in ("int", "logint"):
        return IntDistribution(low, high, log=log, step=round(dimension.step or 1))
    return FloatDistribution(low, high, log=log, step=dimension.step)


def encoded(dimension: config.Dimension, value: Any) -> Any:
    """Return a value as Optuna stores it: a list or mapping becomes JSON text."""
    return json.dumps(value) if dimension.kind == "choice" and isinstance(value, list | tuple | dict) else value


def decoded(dimension: config.Dimension, value: Any) -> Any:
    assert dimension.choice is None or value in _categories(dimension)
    return value if dimension.choice is None else dimension.choice[_categories(dimension).index(value)]


def _inside(dimension: config.Dimension, value: Any) -> bool:
    if dimension.kind == "choice":
        return encoded(dimension, value) in _categories(dimension)
    low, high = dimension.ends
    if not isinstance(value, int | float) or not low <= value <= high:
        return False
    off = (value - low) / dimension.step if dimension.step is not None else 0.0
    return bool(abs(off - round(off)) < 1e-9)


def _categories(dimension: config.Dimension) -> list[Any]:
    return [encoded(dimension, value) for value in dimension.choice or ()]


def _points(dimension: config.Dimension) -> list[Any]:
    """Return all values of one field of a grid: its choices, or all values of its range with a step."""
    if dimension.kind == "choice":
        return _categories(dimension)
    (low, high), step = dimension.ends, dimension.step or 1
    points = [low + i * step for i in range(round((high - low) / step) + 1)]
    return [round(p) for p in points] if dimension.kind == "int" else points


def _probes(dimension: config.Dimension) -> list[Any]:
    """Return the values to check: every choice, or both ends of a range and, for real numbers, a value between."""
    if dimension.kind == "choice":
        return list(dimension.choice or ())
    low, high = dimension.ends
    between = low + dimension.step if dimension.step is not None else low + 0.381966 * (high - low)
    return [low, high] if dimension.kind in ("int", "logint") else [low, high, between]


def field_value(run: Mapping[str, Any], field: str) -> Any:
    """Return the value of a dotted field, such as `distill.lr_image`, in a run; None if the field does not exist."""
    node: Any = run
    for part in field.split("."):
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node
