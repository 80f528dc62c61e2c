"""Commands of one run: `rmdd demo`, `run`, `ingest`, `experts`, `distill`, `evaluate`, `report`, `health`."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, command
from rmdd.cli.console import health_table, results
from rmdd.cli.loading import load

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline


@command
def demo(
    call: Call,
    set_: Sets = None,
    storage: Annotated[str | None, typer.Option(help="Folder for all files of rmdd; default: runs.")] = None,
) -> Output:
    """Distil drawn scenes (a small synthetic dataset) in a few minutes and print the scores."""
    sets = [*(set_ or []), *([f"runtime.storage={storage}"] if storage else [])]
    with call.pipeline(load("demo", sets)) as pipeline:
        return run_all_steps(pipeline)


@command
def ingest(call: Call, run: config.Run) -> Output:
    """Read the raw dataset and write it as shards, with a manifest and a list of rejected rows."""
    with call.pipeline(run, check=False) as pipeline:
        dataset = pipeline.ingest()
        remarks = dataset.remarks(run.data)
    facts = {"dataset": str(dataset.path), "counts": dataset.counts, "quarantine": dataset.manifest["quarantine"]}
    return Output(facts | {"remarks": remarks}, [f"dataset: {dataset.path}", *remarks])


@command
def experts(call: Call, run: config.Run) -> Output:
    """Train the experts that the run needs and that the storage lacks."""
    with call.pipeline(run) as pipeline:
        store = pipeline.experts()
        facts = {"store": str(store.path), "complete": store.complete(), "bytes": store.size()}
    return Output(facts, [f"experts: {store.path}"])


@command
def distill(call: Call, run: config.Run) -> Output:
    """Distil all phases of the run that are not finished yet."""
    with call.pipeline(run) as pipeline:
        folders = [str(folder) for folder in pipeline.distill()]
    return Output({"phases": folders}, [f"phase {p}: {folder}" for p, folder in enumerate(folders)])


@command
def evaluate(call: Call, run: config.Run) -> Output:
    """Train students on the distilled set, choose the snapshot on val, and report scores on test."""
    with call.pipeline(run) as pipeline:
        evaluation, path = pipeline.evaluate(), str(pipeline.folder / "evaluation.json")
    facts = {"evaluation": path, "table": evaluation["table"]}
    return Output(facts, [results(evaluation), f"evaluation: {path}"])


@command
def report(call: Call, run: config.Run) -> Output:
    """Run the missing steps, then write the distilled set and an HTML report of the run."""
    with call.pipeline(run) as pipeline:
        page, set_ = str(pipeline.report()), str(pipeline.folder / "set")
    return Output({"set": set_, "page": page}, [f"distilled set: {set_}", f"page: {page}"])


@command
def health(call: Call, run: config.Run) -> Output:
    """Distil the run if that is not done yet, then report how far the embeddings of the pairs have collapsed."""
    with call.pipeline(run) as pipeline:
        from rmdd.report.health import write_health

        measured = pipeline.health()
        files = [str(file) for file in write_health(measured, pipeline.folder)]
    lines = [health_table(measured["rows"]), *(f"wrote {file}" for file in files)]
    return Output({**measured, "files": files}, lines)


@command
def run_(call: Call, run: config.Run) -> Output:
    """Run all steps from ingest to report; steps that are finished already are not repeated."""
    with call.pipeline(run) as pipeline:
        return run_all_steps(pipeline)


def run_all_steps(pipeline: "Pipeline") -> Output:
    """Run all steps of a run; return its scores and the paths of its results."""
    began = time.perf_counter()
    result = pipeline.all()
    seconds = {"this_sitting": round(time.perf_counter() - began, 2), "steps": result.seconds}
    steps = ", ".join(f"{step} {value:.0f}" for step, value in result.seconds.items())
    lines = [
        result.headline,
        results(result.evaluation),
        f"distilled set: {result.set}",
        f"page: {result.report}",
        f"run folder: {pipeline.folder}",
        f"seconds: {seconds['this_sitting']:.0f} in this call; per step, summed over all calls: {steps}",
    ]
    facts = {"set": str(result.set), "page": str(result.report), "table": result.evaluation["table"]}
    facts |= {"headline": result.headline}
    return Output(facts | {"seconds": seconds}, lines)
