"""The command line: words to functions. Heavy modules are imported by the command that needs them."""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rmdd import config
from rmdd.bench.commands import bench_ingest
from rmdd.data.place import absolute

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil image-text data into a few hundred synthetic pairs. Start with `rmdd demo`.",
    epilog="Exit codes: 0 done, 1 a run failed, 2 a run file cannot be used, 130 stopped (a resumable run says how).",
)

Source = Annotated[str, typer.Argument(metavar="CONFIG", help="A preset's name or a YAML file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a field, such as distill.phases.0.pairs=20.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Step = Callable[["Pipeline"], dict[str, Any]]


@app.command()
def demo(
    set_: Sets = None,
    storage: Annotated[str | None, typer.Option(help="Folder of all runs; default: runs.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Distil drawn scenes on this machine, in minutes, and print how well it went."""
    sets = [*(set_ or []), *([f"runtime.storage={storage}"] if storage else [])]
    _do(lambda: _load("demo", sets), _everything, json, quiet, debug)


@app.command()
def init(file: Annotated[Path, typer.Argument(help="The YAML file to write.")]) -> None:
    """Write a run file with every key, its default and its meaning."""
    with _outcome():
        from rmdd.files import atomic_path
        from rmdd.template import template

        if file.exists():
            raise config.ConfigError(["exists already and is left as it is; give another name"], str(file))
        with atomic_path(file) as temporary:
            temporary.write_text(template(str(file)), encoding="utf-8")
    typer.echo(f"wrote {file}")


@app.command()
def check(source: Source, set_: Sets = None, json: Json = False, debug: Debug = False) -> None:
    """Say what a run would do and cost; touch nothing."""
    with _outcome(debug):
        run = _load(source, set_ or [])
        from rmdd.check import examine

        try:
            facts = examine(run)
        except ValueError as error:
            raise config.ConfigError([str(error)], source) from error
        if json:
            _print_json(facts)
        else:
            from rmdd import console

            console.stdout().print(console.plan(facts), highlight=False)
        if facts["budget"]["over"] and run.distill.budget_check == "error":
            raise config.ConfigError([facts["budget"]["over"]], source)


@app.command()
def ingest(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Bring the pairs in: shards, a manifest and a quarantine."""
    _do(lambda: _load(source, set_ or []), _ingest, json, quiet, debug)


@app.command()
def experts(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Train the experts that are missing."""
    _do(lambda: _load(source, set_ or []), _experts, json, quiet, debug)


@app.command()
def distill(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Distil the phases that are not finished."""
    _do(lambda: _load(source, set_ or []), _distill, json, quiet, debug)


@app.command()
def evaluate(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Train students, choose on val, read test once."""
    _do(lambda: _load(source, set_ or []), _evaluate, json, quiet, debug)


@app.command()
def report(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write the distilled set and its page."""
    _do(lambda: _load(source, set_ or []), _report, json, quiet, debug)


@app.command("run")
def run_(source: Source, set_: Sets = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """All steps, in order; what is there already is used."""
    _do(lambda: _load(source, set_ or []), _everything, json, quiet, debug)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The folder of a run that was begun.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Go on with a run where it stopped."""
    _do(lambda: _load_folder(folder), _everything, json, quiet, debug)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset's file.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Print it with the values of what it extends.")] = False,
) -> None:
    """List the run files that come with rmdd, or print one."""
    with _outcome():
        names = config.preset_names()
        if name is not None and name not in names:
            raise config.ConfigError([config.no_preset(name)], "presets")
        if name is not None and whole:
            typer.echo(config.as_yaml(config.read(name)).rstrip())
            return
        for each in names if name is None else [name]:
            text = (config.PRESETS / f"{each}.yaml").read_text(encoding="utf-8")
            first = text.partition("\n")[0].removeprefix("#").strip()
            typer.echo(f"{each:30} {first}" if name is None else text.rstrip())


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.")] = None, json: Json = False
) -> None:
    """List the methods that a run file can name, or tell about one."""
    with _outcome():
        from rmdd.methods.about import about, listing

        try:
            facts: Any = listing() if name is None else about(name)
        except ValueError as error:
            raise config.ConfigError([str(error)], "methods") from error
        if json:
            _print_json(facts)
            return
        from rmdd import console

        for line in console.methods(facts) if name is None else console.method(facts):
            typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    import rmdd

    typer.echo(rmdd.__version__)


bench = typer.Typer(help="Measure the engine of matching, and ingest.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.command("step")
def bench_step(
    tower: Annotated[str, typer.Option(help="convnet or a timm model, with random weights.")] = "convnet",
    widths: Annotated[str, typer.Option(help="convnet: channels of its blocks.")] = "64,64,64",
    image_size: Annotated[int, typer.Option(help="Side of the pictures.")] = 64,
    pairs: Annotated[int, typer.Option(help="Synthetic pairs M.")] = 100,
    batch: Annotated[int, typer.Option(help="Pairs B of an inner step.")] = 20,
    steps: Annotated[int, typer.Option(help="Inner steps K.")] = 8,
    loss: Annotated[str, typer.Option(help="The student's loss.")] = "wbce",
    similarity: Annotated[str, typer.Option(help="full, low_rank or identity.")] = "full",
    yardsticks: Annotated[str, typer.Option(help="Which of whole_unroll, published, published_rebuilt.")] = (
        "whole_unroll,published,published_rebuilt"
    ),
    options: Annotated[
        list[str] | None, typer.Option("--engine", help="An engine to compare, such as bfloat16,recompute; repeat it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed iterations of each variant.")] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one iteration of matching and its memory against plain autograd and the published two-pass loop."""
    with _outcome(debug):
        from rmdd.bench import step

        case = step.Case(
            tower=tower,
            widths=tuple(int(w) for w in widths.split(",")),
            image_size=image_size,
            pairs=pairs,
            batch=batch,
            steps=steps,
            loss=loss,
            similarity=similarity,  # type: ignore[arg-type]
            threads=threads,
            device=device,
        )
        engines = {name: step.engine_of(name) for name in ["", *(options or [])]}
        chosen = step.variants(engines=engines, yardsticks=step.yardsticks_of(yardsticks))
        found = step.bench_step(case, chosen, repeats, out, memory)
    if json:
        _print_json(found)
    else:
        typer.echo(step.table(found))


@bench.command("estimator")
def bench_estimator(
    source: Source,
    set_: Sets = None,
    phase: Annotated[int, typer.Option(help="The phase to follow.")] = 0,
    iterations: Annotated[int, typer.Option(help="Outer iterations to follow it for.")] = 100,
    every: Annotated[int, typer.Option(help="Iterations between comparisons.")] = 10,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the first-order meta-gradient with the exact one along a run: cosine and norm ratio."""

    def compare(pipeline: "Pipeline") -> dict[str, Any]:
        from rmdd.bench import estimator
        from rmdd.console import comparison

        rows = estimator.of_run(pipeline, phase, iterations, every, lambda row: None)
        medians = estimator.summary(rows)
        return {"rows": rows, "medians": medians, "say": [comparison(rows, medians)]}

    _do(lambda: _load(source, set_ or []), compare, json, quiet, debug)


bench.command("ingest")(bench_ingest)


def main() -> None:
    """Entry point of the `rmdd` script."""
    _stop_on_sigterm()
    app(prog_name="rmdd")


# -- steps: each returns what it left, with `say` for people ---------------------------------------------------------


def _ingest(pipeline: "Pipeline") -> dict[str, Any]:
    dataset = pipeline.ingest()
    rejected = dataset.manifest["quarantine"]
    told = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    lines = [f"dataset: {dataset.path}", *([f"quarantine: {told}"] if told else [])]
    return {"dataset": str(dataset.path), "counts": dataset.counts, "quarantine": rejected, "say": lines}


def _experts(pipeline: "Pipeline") -> dict[str, Any]:
    store = pipeline.experts()
    left = {"store": str(store.path), "complete": store.complete(), "bytes": store.size()}
    return left | {"say": [f"experts: {store.path}"]}


def _distill(pipeline: "Pipeline") -> dict[str, Any]:
    folders = [str(folder) for folder in pipeline.distill()]
    return {"phases": folders, "say": [f"phase {p}: {folder}" for p, folder in enumerate(folders)]}


def _evaluate(pipeline: "Pipeline") -> dict[str, Any]:
    evaluation, path = pipeline.evaluate(), str(pipeline.folder / "evaluation.json")
    return {"evaluation": path, "table": evaluation["table"], "say": [_table(evaluation), f"evaluation: {path}"]}


def _report(pipeline: "Pipeline") -> dict[str, Any]:
    page, set_ = str(pipeline.report()), str(pipeline.folder / "set")
    return {"set": set_, "page": page, "say": [f"distilled set: {set_}", f"page: {page}"]}


def _everything(pipeline: "Pipeline") -> dict[str, Any]:
    began = time.perf_counter()
    result = pipeline.all()
    seconds = {"this_sitting": round(time.perf_counter() - began, 2), "steps": result.seconds}
    steps = ", ".join(f"{step} {value:.0f}" for step, value in result.seconds.items())
    return {
        "set": str(result.set),
        "page": str(result.report),
        "table": result.evaluation["table"],
        "seconds": seconds,
        "say": [
            _table(result.evaluation),
            f"distilled set: {result.set}",
            f"page: {result.report}",
            f"run folder: {pipeline.folder}",
            f"seconds: {seconds['this_sitting']:.0f} now; over all sittings {steps}",
        ],
    }


def _table(evaluation: dict[str, Any]) -> Any:
    from rmdd.console import result_table

    return result_table(evaluation)


# -- parts -----------------------------------------------------------------------------------------------------------


def _do(load: Callable[[], config.Run], step: Step, as_json: bool, quiet: bool, debug: bool) -> None:
    """Load, do one step over a pipeline, print what it left."""
    folders: list[Path] = []
    with _outcome(debug, folders):
        run = load()
        from rmdd.check import impossible
        from rmdd.pipeline import open_pipeline, run_folder
        from rmdd.progress import Progress

        if step is not _ingest and (mistakes := impossible(run)):
            raise config.ConfigError(mistakes, run.name)
        folders.append(run_folder(run))
        with contextlib.redirect_stdout(sys.stderr), open_pipeline(run, Progress(quiet)) as pipeline:
            _stop_on_sigterm()  # ray puts its own handler in place
            left = step(pipeline) | {"run": str(pipeline.folder)}
        lines = left.pop("say")
        if as_json:
            _print_json(left)
            return
        from rmdd.console import stdout

        for line in lines:
            stdout().print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


def _load(source: str, sets: list[str]) -> config.Run:
    """The run with absolute paths, so that it can be resumed from anywhere.

    The paths of weights and of a text encoder are in the hash of a run, which names its folder: the same files at
    another place make another run.
    """
    run = config.load(source, sets)
    data, image, text = run.data, run.model.image, run.model.text
    if data.root is not None:
        data = data.model_copy(update={"root": absolute(os.path.expanduser(data.root))})
    if image.weights != "pretrained" and not image.is_random:
        image = image.model_copy(update={"weights": _absolute(image.weights)})
    if Path(text.name).expanduser().is_dir():
        text = text.model_copy(update={"name": _absolute(text.name)})
    return run.model_copy(update={"data": data, "model": run.model.model_copy(update={"image": image, "text": text})})


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _load_folder(folder: Path) -> config.Run:
    import yaml

    from rmdd.pipeline import run_folder

    file = (folder := folder.absolute()) / "run.yaml"
    if not file.is_file():
        raise config.ConfigError(["no run.yaml in it; give a run's folder, such as runs/demo-0123abcd"], str(folder))
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(raw, dict):
        raw["runtime"] = {**(raw.get("runtime") or {}), "storage": str(folder.parent)}
    try:
        run = config.load(raw)
    except config.ConfigError as error:
        raise config.ConfigError(error.mistakes, str(file)) from None
    if run_folder(run) != folder:
        now = f"its run.yaml now means {run_folder(run).name}: it was changed, or the folder renamed"
        raise config.ConfigError([f"{now}; use `rmdd run {file}`"], str(folder))
    return run


@contextlib.contextmanager
def _outcome(debug: bool = False, folders: list[Path] | None = None) -> Iterator[None]:
    """Turns what can go wrong into a message on stderr and an exit code."""

    def end(message: str, code: int, error: BaseException) -> NoReturn:
        if debug:
            import traceback

            traceback.print_exc()
        typer.echo(message, err=True)
        raise typer.Exit(code) from error

    def how_to_resume(words: str) -> str:
        begun = [folder for folder in folders or [] if (folder / "run.yaml").is_file()]
        return "".join(f"{words}: rmdd resume {shlex.quote(str(folder))}" for folder in begun)

    try:
        yield
    except config.ConfigError as error:
        end(str(error), 2, error)
    except KeyboardInterrupt as error:
        end(how_to_resume("stopped; resume with") or "stopped", 130, error)
    except ValueError as error:
        end(f"error: {error}", 1, error)
    except ArithmeticError as error:  # the same numbers would come again
        advice = "" if "rmdd run" in str(error) else "\nlower the rates it names and use `rmdd run` again"
        end(f"error: {error}{advice}", 1, error)
    except (RuntimeError, OSError, MemoryError) as error:
        resume_with = how_to_resume("\nwhen that is mended, resume with")
        end(f"error: {error or type(error).__name__}{resume_with}", 1, error)


def _stop_on_sigterm() -> None:
    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, stop)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN: the spread of a single value is null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
