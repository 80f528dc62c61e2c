"""`rmdd sweep`: many runs (seeds, methods or settings) in parallel over one executor.

Runs share all results whose settings are equal. First all datasets are ingested and all experts are trained. Then each
run continues in its own thread. Only one thread computes at a time; the others wait until the executor has finished
their phases or students. If two runs need the same result, the second run waits until the first run has computed it.
"""

import contextlib
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rmdd import config
from rmdd.config.runfile import parse
from rmdd.core.failures import may_pass
from rmdd.core.files import read_json, write_json
from rmdd.core.layout import locate_file
from rmdd.core.progress import Progress, Stage
from rmdd.core.storage import address_of, root_of, run_folder
from rmdd.execution.backend import Backend, hold_folders, open_backend
from rmdd.execution.scheduler import SweepScheduler, collect_errors
from rmdd.pipeline import Pipeline
from rmdd.report.sheets import write_csv

SCORES = ("val", "test_last")

Load = Callable[..., config.Run]
"""Function that loads a run; its last argument is a list of overrides."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep, with an optional name. `settings` holds its values of the fields that vary in the sweep."""

    settings: dict[str, Any]
    run: config.Run
    name: str | None = None

    @property
    def label(self) -> str:
        """Name of the run in messages: `name` or the settings, such as `distill.method=lors distill.seed=0`."""
        return self.name or " ".join(f"{key}={_word(value)}" for key, value in self.settings.items()) or self.run.name


@dataclass(frozen=True, repr=False)
class SweepResult:
    """Scores of all runs of a sweep."""

    folder: Path
    runs: list[dict[str, Any]]
    """A row per run: its settings, distillation method and folder, and its scores or its error message. With an error,
    `may_pass` is false if the same run would fail again."""
    groups: list[dict[str, Any]]
    """One row per group of runs that differ only in seeds. A row has the mean and standard deviation of the scores."""

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.runs if "error" in row]

    def __repr__(self) -> str:
        return f"SweepResult({self.folder}: {len(self.runs)} runs, {len(self.failed)} failed)"


def members(
    load: Load,
    over: Mapping[str, Sequence[Any]],
    settings: Iterable[Mapping[str, Any]] = (),
) -> list[Member]:
    """Return a sweep's runs: each mapping in `settings` with each combination of the values in `over`.

    Keys are dotted fields. `load(overrides)` loads a run. Raises `ConfigError` with the mistakes of all runs.
    """
    by_hash: dict[str, Member] = {}
    mistakes = [f"{key} has no values to try; give at least one" for key, values in over.items() if not values]
    for fixed, values in itertools.product(list(settings) or [{}], itertools.product(*over.values())):
        chosen = {**fixed, **dict(zip(over, values, strict=True))}
        if shared := [key for key in chosen if key.split(".")[0] in ("runtime", "name")]:
            raise config.ConfigError([f"{shared[0]} must be equal for all runs of a sweep; set it by --set"], "sweep")
        try:
            run = load([f"{key}={json.dumps(value)}" for key, value in chosen.items()])
        except config.ConfigError as error:
            mistakes += [f"{chosen}: {m}" for m in error.mistakes]
            continue
        if (value := run.hash_of()) in by_hash:
            mistakes.append(f"{chosen} and {by_hash[value].settings} are the same run; remove one of them")
        by_hash[value] = Member(chosen, run)
    if mistakes:
        raise config.ConfigError(mistakes, "sweep")
    return list(by_hash.values())


def members_of_files(
    sources: Sequence[str | Path],
    load: Load,
    overrides: Sequence[str],
    over: Mapping[str, Sequence[Any]],
    settings: Iterable[Mapping[str, Any]] = (),
) -> list[Member]:
    """Return the runs that `members` returns for each run file; `load(source, overrides)` loads one.

    Raises `ConfigError` if a run occurs twice, or if the files have different values in the section `runtime`.
    """
    if not sources:
        raise config.ConfigError(["there is no run file; give at least one"], "sweep")
    runs: list[Member] = []
    mistakes: list[str] = []
    for source in dict.fromkeys(map(str, sources)):
        of_file = members(lambda chosen, name=source: load(name, [*overrides, *chosen]), over, settings)
        runs += [replace(m, settings={"config": source, **m.settings}) if len(sources) > 1 else m for m in of_file]
    first, labels = runs[0], dict[str, str]()
    for member in runs:
        if (label := labels.setdefault(member.run.hash_of(), member.label)) != member.label:
            mistakes.append(f"{member.label} and {label} are the same run; remove one of them")
        differing = [name for name, value in member.run.runtime if value != getattr(first.run.runtime, name)]
        if differing:
            mistakes.append(f"{member.label} and {first.label} differ in runtime.{differing[0]}; set it by --set")
    if mistakes:
        raise config.ConfigError(mistakes, "sweep")
    return runs


def read_over(words: Iterable[str]) -> dict[str, list[Any]]:
    """Parse arguments of `--over`, such as `a.b=1,2` or `a.b=[1, 2]`; return the values to try, by dotted field."""
    over = {}
    for word in words:
        key, equals, text = word.partition("=")
        try:
            values = parse(f"[{text}]")
        except yaml.YAMLError:
            values = None
        if not key or not equals or not values:
            raise config.ConfigError([f"--over {word}: write it as section.field=value,value"], "sweep")
        over[key] = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return over


def read_settings(file: Path) -> list[dict[str, Any]]:
    """Read the YAML file of `--settings`: a list of mappings from dotted fields to values."""
    if not file.is_file():
        raise config.ConfigError(["this file does not exist; give a YAML file with a list of mappings"], str(file))
    settings = parse(file.read_text(encoding="utf-8"))
    if not isinstance(settings, list) or not settings or not all(isinstance(entry, dict) for entry in settings):
        raise config.ConfigError(["write a list, each entry a mapping such as {distill.method: lors}"], str(file))
    return settings


def sweep_folder(runs: Sequence[Member]) -> Path:
    """Return the folder of a sweep; its name ends in a hash of its runs."""
    first = runs[0].run
    value = config.hash_value(sorted(m.run.hash_of() for m in runs))[:8]
    return root_of(first.runtime) / "sweeps" / f"{first.name}-{value}"


def write_members(runs: Sequence[Member]) -> Path:
    """Write the runs of a sweep to `sweep.json` in its folder, so that the sweep can be resumed; return the folder."""
    folder = sweep_folder(runs)
    plain = [{"settings": m.settings, "run": m.run.model_dump(mode="json"), "name": m.name} for m in runs]
    write_json(folder / "sweep.json", {"schema_version": 1, "members": plain})
    return folder


def members_in(folder: Path | str) -> list[Member]:
    """Return the runs of the sweep in `folder` (path or URI); empty if that folder holds no sweep."""
    storage, file = locate_file(str(folder), "sweep.json", depth=2)
    listed = read_json(file)["members"] if file.is_file() else []
    moved = {"storage": storage}
    return [
        Member(m["settings"], config.load({**m["run"], "runtime": {**m["run"]["runtime"], **moved}}), m.get("name"))
        for m in listed
    ]


def sweep(
    source: config.Source | Sequence[str | Path],
    over: Mapping[str, Sequence[Any]],
    overrides: Iterable[str] = (),
    settings: Iterable[Mapping[str, Any]] = (),
    progress: Progress | None = None,
) -> SweepResult:
    """Run `source`, or each run file in the list `source`, with each mapping in `settings` and each combination of the
    values in `over`.

    `rmdd.load_config` explains `source` and `overrides`.

    >>> rmdd.sweep("demo", {"distill.seed": [0, 1], "distill.loss": ["infonce", "wbce"]})  # doctest: +SKIP

    A second call resumes the sweep. A failed run does not stop the others; `SweepResult.failed` lists the failures.
    """
    fixed = list(overrides)
    if isinstance(source, str | Path | Mapping | config.Run):
        return run_all(members(lambda chosen: config.load(source, [*fixed, *chosen]), over, settings), progress)
    return run_all(members_of_files(source, config.load, fixed, over, list(settings)), progress)


def run_all(runs: Sequence[Member], progress: Progress | None = None) -> SweepResult:
    """Start or resume all runs of a sweep; write `results.json` and `runs.csv` to the folder of the sweep."""
    progress = progress or Progress()
    runtime, folder = runs[0].run.runtime, sweep_folder(runs)
    with (
        hold_folders(runtime, folder, *(run_folder(m.run) for m in runs)),
        open_backend(runtime, folder / "events.jsonl", progress) as backend,
    ):
        write_members(runs)
        pipelines = {m.label: Pipeline(m.run, backend, progress) for m in runs}
        return _collect(folder, runs, run_side_by_side(pipelines, Pipeline.all, backend, progress))


def run_side_by_side(
    pipelines: Mapping[str, Pipeline], step: Callable[[Pipeline], Any], backend: Backend, progress: Progress
) -> dict[str, Exception]:
    """Train the experts of all runs, then execute `step` of each run in its own thread; return the errors by label."""
    errors: dict[str, Exception] = {}
    said: set[str] = set()
    for label, pipeline in pipelines.items():
        pipeline.use_backend(backend, _Named(progress, label))
        with collect_errors(errors, label):
            pipeline.check_budget()
            pipeline.use_backend(backend, _Shared(progress, label, said))
            pipeline.experts()
    with progress.stage("sweep", {}) as stage:
        scheduler = SweepScheduler(backend.executor)
        for label, pipeline in pipelines.items():
            if label not in errors:
                of_run = replace(backend, executor=scheduler.executor_of(label))
                pipeline.use_backend(of_run, _Named(progress, label, stage))
                scheduler.add(label, functools.partial(step, pipeline))
        return errors | scheduler.run_all()


class _Named(Progress):
    """Progress display of one run of a sweep: its lines start with the run's label; all runs share one table."""

    def __init__(self, progress: Progress, label: str, table: Stage | None = None):
        super().__init__(progress.quiet, progress.console, progress.clock)
        self.label, self.table = label, table

    def say(self, text: str) -> None:
        super().say(f"{self.label}: {text}")

    @contextlib.contextmanager
    def stage(self, title: str, totals: Mapping[str, int]) -> Iterator[Any]:
        if self.table is None:
            with super().stage(title, totals) as update:
                yield update
            return
        names = {name: f"{self.label}: {name}" for name in totals}
        table = self.table
        table.add({names[name]: total for name, total in totals.items()})
        yield lambda name, metrics: table(names[name], metrics)


class _Shared(_Named):
    """Progress display of steps that runs of a sweep may share: a line in `said`, which an earlier run printed, is not
    printed again. Lines have no label."""

    def __init__(self, progress: Progress, label: str, said: set[str]):
        super().__init__(progress, label)
        self.said = said

    def say(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            Progress.say(self, text)

    @contextlib.contextmanager
    def stage(self, title: str, totals: Mapping[str, int]) -> Iterator[Any]:
        with _Named(self, self.label).stage(title, totals) as update:
            yield update


# -- results -------------------------------------------------------------------------------------------------------


def _collect(folder: Path, runs: Sequence[Member], errors: Mapping[str, Exception]) -> SweepResult:
    rows = [_row(m, errors.get(m.label)) for m in runs]
    result = SweepResult(folder, rows, _groups(rows))
    write_json(folder / "results.json", {"schema_version": 1, "runs": rows, "groups": result.groups})
    keys = list(dict.fromkeys(key for m in runs for key in m.settings))
    columns = [
        *keys,
        "method",
        *(f"{split}_{part}" for split in SCORES for part in ("mean", "std", "n")),
        "folder",
        "error",
    ]
    flat = [
        {key: _word(value) for key, value in row["settings"].items()}
        | {f"{split}_{part}": value for split in SCORES for part, value in row.get(split, {}).items()}
        | {key: row[key] for key in ("method", "folder", "error") if key in row}
        for row in rows
    ]
    write_csv(folder / "runs.csv", flat, columns)
    return result


def _row(member: Member, error: Exception | None) -> dict[str, Any]:
    """Return the row of one run: mean and standard deviation of R@mean over students, or the error message."""
    folder, name = run_folder(member.run), member.run.distill.method_name
    address = address_of(member.run.runtime, folder)
    row: dict[str, Any] = {"settings": member.settings, "method": name, "folder": address}
    if error is not None:
        return row | {"error": message_of(error), "may_pass": may_pass(error)}
    table = read_json(folder / "evaluation.json")["table"]
    return row | {split: table[name][split]["R@mean"] for split in SCORES}


def message_of(error: Exception) -> str:
    """Return the message of an error and its notes."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])


def _groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group runs that differ only in seeds; return the mean and the standard deviation of the runs' mean scores."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(_seedless(row["settings"]), sort_keys=True), []).append(row)
    table = []
    for group_rows in groups.values():
        done = [row for row in group_rows if "error" not in row]
        group: dict[str, Any] = {
            "settings": _seedless(group_rows[0]["settings"]),
            "method": group_rows[0]["method"],
            "n": len(done),
        }
        for split in SCORES if done else ():
            means = [row[split]["mean"] for row in done]
            spread = statistics.stdev(means) if len(means) > 1 else None
            group[split] = {"mean": statistics.fmean(means), "std": spread, "n": len(means)}
        table.append(group)
    return table


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _seedless(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.split(".")[-1] != "seed"}
