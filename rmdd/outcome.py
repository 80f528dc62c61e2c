"""What becomes of a command: messages on stderr and exit codes, or JSON on stdout."""

import contextlib
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from rmdd import config


@contextlib.contextmanager
def outcome(debug: bool = False, folders: list[Path] | None = None) -> Iterator[None]:
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
        resume_with = "" if "rmdd resume" in str(error) else how_to_resume("\nwhen that is mended, resume with")
        end(f"error: {error or type(error).__name__}{resume_with}", 1, error)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN: the spread of a single value is null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
