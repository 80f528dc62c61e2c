"""The rows of `rmdd runs`: what is in a storage, how far it is, its scores, its disk use and its age."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rmdd.distill.trajectory.planning import PLAN
from rmdd.inventory.contents import Contents
from rmdd.inventory.work import ERRORS, StoredWork, finished_trainings, works_in
from rmdd.runs.needs import paths_in, planned
from rmdd.runs.paths import RunPaths
from rmdd.searches.space import Space

SHARED = ("data", "experts", "phases", "baselines", "tuned")
"""Folders of a storage whose subfolders several runs can share."""


@dataclass
class Listed:
    """A run, sweep, search, comparison or coreset, as `rmdd runs` shows it."""

    folder: str
    """Name of the folder, relative to the storage."""
    kind: str
    method: str = ""
    budget: int | None = None
    """Pairs of the budget."""
    val: float | None = None
    """R@mean on val in percent: of the set of a run, or the best of a sweep or search."""
    test: float | None = None
    stage: str = "unknown"
    running: bool = False
    """Whether a process works in the folder."""
    bytes: int = 0
    """Bytes in the folder itself."""
    shared_bytes: int = 0
    """Bytes of the datasets, experts, phases and baselines that it needs; others may need them too."""
    changed: float = 0.0
    """Time of the last change of a file in the folder, in seconds since 1970."""
    problem: str = ""
    """Why the run file cannot be loaded; empty if it can."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def listed(contents: Contents) -> list[Listed]:
    """Return a row for each run, sweep, search, comparison, coreset and model, the last changed first.

    The trials of a search and its base run have no rows, except those that were evaluated as a run. The folder in which
    a finished model was trained has none either.
    """
    works, held = works_in(contents), contents.held()
    rows, trials = [], set[str]()
    for work in works:
        usage = contents.usage(work.folder)
        row = Listed(work.folder, work.kind, bytes=usage.bytes, changed=usage.changed)
        row.running = any(h == work.folder or h.startswith(f"{work.folder}/") for h in held)
        try:
            _describe(row, work)
            needs = work.needs()
            row.shared_bytes = sum(contents.usage(n).bytes for n in needs if n.split("/")[0] in SHARED)
            trials |= {work.run.folder_name, *work.members} if work.kind == "search" else set()
        except ERRORS as error:
            row.problem = str(error) or type(error).__name__
        rows.append(row)
    hidden = {name for name in trials if f"{name}/evaluation.json" not in contents.files}
    hidden |= finished_trainings(works)
    return sorted((row for row in rows if row.folder not in hidden), key=lambda row: -row.changed)


def _describe(row: Listed, work: StoredWork) -> None:
    """Fill in the method, budget, scores and stage of a row. Raises one of `ERRORS` if the run file cannot be read."""
    if work.kind == "coreset":
        subset = work.results("subset.json")
        row.method, row.budget, row.stage = subset.get("method", ""), len(subset.get("records", ())), "finished"
    elif work.kind == "model":
        model = work.results("model.json")
        trained_on, scores = model.get("trained_on", {}), model.get("scores", {})
        row.method, row.budget = trained_on.get("method", trained_on.get("kind", "")), trained_on.get("pairs")
        row.val, row.stage = scores.get("val", {}).get("R@mean"), "finished"
    elif work.kind == "training":
        row.method, row.budget, row.stage = work.run.distill.method_name, work.run.distill.budget, "started"
    elif work.kind == "comparison":
        rows = work.results("results.json").get("rows")
        row.method, row.stage = work.results("comparison.json").get("verb", ""), "finished" if rows else "started"
        row.budget = work.run.distill.budget
    elif work.kind == "run":
        if f"{work.folder}/run.yaml" not in work.contents.files:
            row.method, row.stage = "probes", "finished" if work.results("probes.json") else "started"
            return
        row.method, row.budget = work.run.distill.method_name, work.run.distill.budget
        row.val, row.test = _scores(work)
        row.stage = _stage(work)
    else:
        _describe_many(row, work)


def _describe_many(row: Listed, work: StoredWork) -> None:
    """Fill in the row of a sweep or a search; its scores are those of the run or trial that is best on val."""
    runs = [work.run] if work.kind == "search" else list(work.members.values())
    names = list(dict.fromkeys(run.distill.method_name for run in runs))
    row.method = names[0] if len(names) == 1 else f"{len(names)} methods"
    budgets = {run.distill.budget for run in runs}
    row.budget = budgets.pop() if len(budgets) == 1 else None
    if work.kind == "sweep":
        done = [r for r in work.results("results.json").get("runs", ()) if "val" in r]
        row.stage = f"{len(done)} of {len(runs)} runs"
        for best in sorted(done, key=lambda r: -r["val"]["mean"])[:1]:
            row.val, row.test = best["val"]["mean"], best["test_last"]["mean"]
    else:
        trials = work.results("results.json").get("trials", ())
        ended = [t for t in trials if t["state"] in ("complete", "pruned", "failed")]
        row.stage = f"{len(ended)} of {Space(work.run.search).trials} trials"
        row.val = max((t["val"] for t in ended if t["state"] == "complete"), default=None)


def _scores(work: StoredWork) -> tuple[float | None, float | None]:
    """Return R@mean of a run's set on val and test; None if it is not evaluated."""
    scores = work.results("evaluation.json").get("table", {}).get(work.run.distill.method_name, {})
    val, test = (scores.get(split, {}).get("R@mean", {}).get("mean") for split in ("val", "test_last"))
    return val, test


def _stage(work: StoredWork) -> str:
    """Return how far a run is: started, ingested, experts, distilling, distilled, evaluated or finished."""
    files = work.contents.files
    if {f"{work.folder}/set/set.json", f"{work.folder}/report.html"} <= files.keys():
        return "finished"
    if f"{work.folder}/evaluation.json" in files:
        return "evaluated"
    if f"{work.folder}/data.json" not in files:
        return "started"
    run, paths = planned(work.run, work.path), paths_in(work.run, work.path)
    assert paths is not None
    ends = [work.contents.name(paths.set(p, phase.iterations)) for p, phase in enumerate(run.distill.phases)]
    if ends and set(ends) <= files.keys() and not (run.distill.plan.plans and not (work.path / PLAN).is_file()):
        return "distilled"
    done, total = sum(_updates(work.contents, paths, len(ends))), sum(p.iterations for p in run.distill.phases)
    if done:
        return f"distilling {done} of {total}"
    trained = len(work.contents.find(f"{work.contents.name(paths.store)}/expert-*/expert.json"))
    if trained:
        return "experts" if trained >= run.experts.num else f"experts {trained} of {run.experts.num}"
    return "ingested"


def _updates(contents: Contents, paths: RunPaths, phases: int) -> Iterator[int]:
    """Yield how many updates each phase of a run has made, by the last complete line of its log."""
    for p in range(phases):
        log = paths.phase(p) / "metrics.jsonl"
        if contents.name(log) in contents.files:
            contents.storage.fetch(log)
            *lines, _ = log.read_bytes().split(b"\n")
            yield from (json.loads(line)["iteration"] for line in lines[-1:])
