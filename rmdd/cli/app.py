"""The `rmdd` command line: collects the commands of this folder and of other packages into one Typer app.

Functions with the decorator `command` become commands of `rmdd`, or of `rmdd FILE` if their file defines `GROUP`, the
help text of that group. Other packages add such functions or Typer apps by entry points of the group `rmdd.commands`.
Commands import heavy modules inside their function, so that `rmdd --help` answers at once.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

import rmdd.cli
from rmdd.cli.command import stop_on_sigterm
from rmdd.core.version import VERSION

ENTRY_POINTS = "rmdd.commands"
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 mistakes in run file or options, 130 stopped (prints how to resume)."
FIRST = ("steps", "init", "about", "presets", "searches")
"""Files of this folder whose commands are listed first in the help; the others follow in alphabetical order."""


def build() -> typer.Typer:
    """Build the Typer app with all commands of this folder and of installed plugins."""
    app = typer.Typer(
        callback=_options,
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Distil an image-text dataset into a few hundred synthetic pairs. Start with `rmdd demo`.",
        epilog=EXIT_CODES,
    )
    names = {module.name for module in pkgutil.iter_modules(rmdd.cli.__path__)} - {"app"}
    commands: set[str] = set()
    for name in (*FIRST, *sorted(names - set(FIRST))):
        module = importlib.import_module(f"rmdd.cli.{name}")
        group = app
        if text := getattr(module, "GROUP", None):
            group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
            app.add_typer(group, name=name)
            commands.add(name)
        for function in vars(module).values():
            if hasattr(function, "command_name") and function.__module__ == module.__name__:
                group.command(function.command_name)(function)
                commands |= {function.command_name} if group is app else set()
    for point in entry_points(group=ENTRY_POINTS):
        if point.name not in commands:
            _add(app, point.name, point.load())
    return app


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit
    return asked


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version of rmdd.")
    ] = False,
) -> None:
    """Declare the options of `rmdd` itself; `_print_version` handles the option `--version`."""


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


app = build()


def main(words: list[str] | None = None) -> None:
    """Run the command line `words` (default: `sys.argv`), as the `rmdd` script does. Ends with `SystemExit`."""
    stop_on_sigterm()
    app(words, prog_name="rmdd")
