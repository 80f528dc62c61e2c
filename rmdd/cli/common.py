"""What every command does: load a run, do a step, print what it left, and end with a message and an exit code."""

import contextlib
import json
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rmdd import config
from rmdd.runs.absolute import with_absolute_paths

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline

Source = Annotated[str, typer.Argument(metavar="CONFIG", help="A preset's name or a YAML file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a field, such as distill.phases.0.pairs=20.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Step = Callable[["Pipeline"], dict[str, Any]]


def do(load: Callable[[], config.Run], step: Step, as_json: bool, quiet: bool, debug: bool, check: bool = True) -> None:
    """Load, do one step over a pipeline, print what it left; `check` first whether the whole run can be done."""
    folders: dict[Path, str] = {}
    with outcome(debug, folders):
        run = load()
        from rmdd.core.progress import Progress
        from rmdd.core.storage import address_of, is_uri, run_folder
        from rmdd.pipeline import open_pipeline
        from rmdd.runs.preflight import impossible

        if check and (mistakes := impossible(run)):
            raise config.ConfigError(mistakes, run.name)
        folder = run_folder(run)
        folders[folder] = address_of(run.runtime, folder)
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr), open_pipeline(run, Progress(quiet)) as pipeline:
            left = step(pipeline) | {"run": str(pipeline.folder)}
        lines = left.pop("say")
        if is_uri(run.runtime.storage):
            left["storage"] = folders[folder]
            lines = [*lines, f"stored at: {folders[folder]}"]
        if as_json:
            print_json(left)
            return
        from rmdd.cli.console import stdout

        out = stdout()
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


def load(source: str | Mapping[str, Any], sets: list[str]) -> config.Run:
    """The run with absolute paths, so that it can be resumed from anywhere.

    The paths of weights and of a text encoder are in the hash of a run, which names its folder: the same files at
    another place make another run.
    """
    return with_absolute_paths(config.load(source, sets))


def load_folder(place: str) -> config.Run:
    """The run that was begun in a folder, or at a URI."""
    import yaml

    from rmdd.core.storage import is_uri, located, run_folder

    storage, file = located(place, "run.yaml", depth=1)
    if not file.is_file():
        absent = not is_uri(place) and not file.parent.is_dir()
        found = "there is no such folder" if absent else "no run.yaml, sweep.json or search.json in it"
        advice = "give the folder of a run, a sweep or a search, such as runs/demo-0123abcd"
        raise config.ConfigError([f"{found}; {advice}"], place)
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(raw, dict):
        raw["runtime"] = {**(raw.get("runtime") or {}), "storage": storage}
    try:
        run = config.load(raw)
    except config.ConfigError as error:
        raise config.ConfigError(error.mistakes, str(file)) from None
    if run_folder(run).name != file.parent.name:
        now = f"its run.yaml now means {run_folder(run).name}: it was changed, or the folder renamed"
        raise config.ConfigError([f"{now}; use `rmdd run {file}`"], place)
    return run


@contextlib.contextmanager
def outcome(debug: bool = False, folders: dict[Path, str] | None = None) -> Iterator[None]:
    """Turns what can go wrong into a message on stderr and an exit code."""

    def end(message: str, code: int, error: BaseException) -> NoReturn:
        if debug:
            import traceback

            traceback.print_exc()
        typer.echo(message, err=True)
        raise typer.Exit(code) from error

    def how_to_resume(words: str) -> str:
        kept = ("run.yaml", "sweep.json", "search.json", "comparison.json")
        begun = [address for folder, address in (folders or {}).items() if any((folder / k).is_file() for k in kept)]
        return "".join(f"{words}: rmdd resume {shlex.quote(address)}" for address in begun)

    def words(error: Exception) -> str:
        """With where it happened, if that was another process."""
        return "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])

    try:
        yield
    except config.ConfigError as error:
        end(str(error), 2, error)
    except KeyboardInterrupt as error:
        end(how_to_resume("stopped; resume with") or "stopped", 130, error)
    except ValueError as error:
        end(f"error: {words(error)}", 1, error)
    except ArithmeticError as error:  # the same numbers would come again
        advice = "" if "rmdd run" in str(error) else "\nlower the rates it names and use `rmdd run` again"
        end(f"error: {words(error)}{advice}", 1, error)
    except (RuntimeError, OSError, MemoryError) as error:
        resume_with = how_to_resume("\nwhen that is mended, resume with")
        end(f"error: {words(error)}{resume_with}", 1, error)


def stop_on_sigterm() -> None:
    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, stop)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN: the spread of a single value is null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
