"""The decorator `command` adds what all commands share: options, loading of the run, printing and exit codes.

A command is a decorated function in a file of this folder that returns an `Output`:

    @command
    def experts(call: Call, run: config.Run) -> Output:
        "Train the missing experts."
        with call.pipeline(run) as pipeline:
            ...
"""

import contextlib
import functools
import inspect
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, overload

import typer

from rmdd import config
from rmdd.cli.console import stdout
from rmdd.cli.loading import load
from rmdd.config.presets import preset_names
from rmdd.core.failures import MustChange, may_pass
from rmdd.core.progress import Progress
from rmdd.core.storage import address_of, is_uri, run_folder

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline


def presets_from(incomplete: str) -> list[str]:
    """Return the names of presets that begin with `incomplete`, for the completion of command lines in shells."""
    return [name for name in preset_names() if name.startswith(incomplete)]


SOURCE: Any = typer.Argument(
    metavar="CONFIG", help="A preset's name, a YAML file or a run folder.", autocompletion=presets_from
)
Source = Annotated[str, SOURCE]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set a field, such as distill.phases.0.pairs=20.")
]
Folder = Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="Path or URI of a run, sweep, search or comparison.")]
COMMON = {
    "json": Annotated[bool, typer.Option("--json", help="Print only one JSON object to stdout.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Hide the progress display.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")],
}
GENERAL_ADVICE = "lower the learning rates named above and start `rmdd run` again"
RESUMABLE = ("run.yaml", "sweep.json", "search.json", "comparison.json")
"""Names of files that record what was started: `rmdd resume` accepts a folder that contains one of these files."""


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    facts: Any = None
    """Value that is printed as JSON if the option `--json` is given."""
    lines: Sequence[Any] = ()
    """Lines and tables that are printed without `--json`."""
    failed: Exception | None = None
    """Error to raise after everything was printed, or None."""
    wrap: bool = False
    """Whether to break long lines even if the output goes to a file or pipe."""


def failure(summary: str, reasons: Iterable[tuple[Any, str]], again: bool = True) -> RuntimeError | None:
    """Return an error whose text has the number of failures, `summary` and each failure; None without failures.

    `again` says whether a second start may succeed; if not, the command line does not advise to resume.
    """
    lines = [f"{name}: {why}" for name, why in reasons]
    text = "\n".join([f"{len(lines)} {summary}", *lines])
    return (RuntimeError if again else MustChange)(text) if lines else None


@dataclass
class Call:
    """One call of a command: opens run pipelines and progress displays, and prints the output of the command."""

    quiet: bool = False
    folders: dict[Path, str] = field(default_factory=dict)
    """Folders whose work can be resumed after this call, each with the path or URI that the user sees."""
    more: dict[str, Any] = field(default_factory=dict)
    """Values that `--json` prints besides `Output.facts`: the run's folder and, if its storage is at a URI, its URI."""

    def mistakes(self, run: config.Run) -> list[str]:
        """Return a message for every problem that would stop the run and can be found before the run starts."""
        from rmdd.runs.preflight import problems_of

        return problems_of(run)

    def check(self, run: config.Run) -> None:
        """Raise `ConfigError` if `mistakes` finds a problem of the run."""
        if mistakes := self.mistakes(run):
            raise config.ConfigError(mistakes, run.name)

    @contextlib.contextmanager
    def working(self, folder: Path | None = None, address: str = "") -> Iterator[Progress]:
        """Yield a progress display for work in `folder`, which a user can resume by the path or URI `address`.

        In the block, stdout is redirected to stderr, so that the prints of libraries do not mix with the output.
        """
        if folder is not None:
            self.folders[folder] = address
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            yield Progress(self.quiet)

    @contextlib.contextmanager
    def pipeline(self, run: config.Run, check: bool = True) -> Iterator["Pipeline"]:
        """Open the pipeline of a run. If `check` is true, first call `Call.check`, which may raise `ConfigError`."""
        from rmdd.pipeline import open_pipeline

        if check:
            self.check(run)
        folder = run_folder(run)
        address = address_of(run.runtime, folder)
        with self.working(folder, address) as progress, open_pipeline(run, progress) as pipeline:
            yield pipeline
            self.more["run"] = str(pipeline.folder)
        if is_uri(run.runtime.storage):
            self.more["storage"] = address

    def show(self, output: Output, as_json: bool) -> None:
        """Print `output`, then raise the error `output.failed` unless it is None."""
        with quiet_if_unread():
            self._print(output, as_json)
        if output.failed is not None:
            raise output.failed

    def _print(self, output: Output, as_json: bool) -> None:
        if as_json:
            print_json(output.facts | self.more if self.more else output.facts)
        else:
            stored = [f"stored at: {self.more['storage']}"] if "storage" in self.more else []
            for line in (*output.lines, *stored):
                if isinstance(line, str):
                    typer.echo(line)
                else:
                    wrap = False if output.wrap or self.more else None
                    stdout().print(line, highlight=False, markup=False, soft_wrap=wrap)


@overload
def command(function: Callable[..., Output]) -> Callable[..., None]: ...
@overload
def command(*, options: Sequence[str]) -> Callable[[Callable[..., Output]], Callable[..., None]]: ...
def command(function: Callable[..., Output] | None = None, *, options: Sequence[str] = tuple(COMMON)) -> Any:
    """Decorate a function to make it a command; `options` names the common options that the command has.

    If the function has a parameter `run`, the command line gets CONFIG and `--set`, and the function gets the run that
    is loaded from them. A parameter `call` gets the `Call`. Typer handles all other parameters.
    """
    if function is None:
        return functools.partial(command, options=options)
    declared = inspect.signature(function).parameters
    named = {name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in declared.items()}
    parameters: list[inspect.Parameter] = []
    for name, parameter in named.items():
        if name == "run":
            parameters += [parameter.replace(name="source", annotation=Source)]
            parameters += [parameter.replace(name="set_", annotation=Sets, default=None)]
        elif name != "call":
            parameters.append(parameter)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [inspect.Parameter(o, keyword, annotation=COMMON[o], default=False) for o in options]

    @functools.wraps(function)
    def invoked(**words: Any) -> None:
        as_json, quiet, debug = (words.pop(option, False) for option in COMMON)
        call = Call(quiet)
        if "call" in declared and "torch" not in sys.modules:
            Progress(quiet).say("loading torch ...")
        with errors_to_exit_codes(debug, call.folders):
            if "run" in declared:
                words["run"] = load(words.pop("source"), words.pop("set_") or [])
            if "call" in declared:
                words["call"] = call
            call.show(function(**words), as_json)

    invoked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoked.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    invoked.command_name = function.__name__.strip("_").replace("_", "-")  # type: ignore[attr-defined]
    return invoked


@contextlib.contextmanager
def errors_to_exit_codes(debug: bool = False, folders: dict[Path, str] | None = None) -> Iterator[None]:
    """Turn an error into a message on stderr and an exit code; the message says how to resume `folders`."""

    def end(message: str, code: int, error: BaseException) -> NoReturn:
        if debug:
            import traceback

            traceback.print_exc()
        typer.echo(message, err=True)
        raise typer.Exit(code) from error

    def how_to_resume(words: str) -> str:
        resumable = [
            address for folder, address in (folders or {}).items() if any((folder / k).is_file() for k in RESUMABLE)
        ]
        return "".join(f"{words}: rmdd resume {shlex.quote(address)}" for address in resumable)

    def words(error: Exception) -> str:
        """Return the message of an error, with its notes, which name the worker process that raised the error."""
        return "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])

    try:
        yield
    except typer.Exit:
        raise
    except config.ConfigError as error:
        end(str(error), 2, error)
    except KeyboardInterrupt as error:
        end(how_to_resume("stopped; resume with") or "stopped", 130, error)
    except ValueError as error:
        end(f"error: {words(error)}", 1, error)
    except ArithmeticError as error:  # no advice to resume: the run would diverge again
        advice = getattr(error, "advice", GENERAL_ADVICE)
        end("\n".join(filter(None, [f"error: {words(error)}", advice])), 1, error)
    except (RuntimeError, OSError, MemoryError) as error:
        resume_with = how_to_resume("\nafter fixing the problem, resume with") if may_pass(error) else ""
        end(f"error: {words(error)}{resume_with}", 1, error)


@contextlib.contextmanager
def quiet_if_unread() -> Iterator[None]:
    """If the reader of stdout has gone, as in `rmdd presets | head -3`, end with the exit code of other Unix tools."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it ends
        raise typer.Exit(128 + signal.SIGPIPE) from None


def stop_on_sigterm() -> None:
    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may set signal handlers
        signal.signal(signal.SIGTERM, stop)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Replace non-finite floats, such as the spread of a single student, by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
