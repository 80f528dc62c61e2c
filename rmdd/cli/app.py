"""The command line: every command in a file of this folder, and those of other packages.

A file's functions with the decorator `command` are commands of `rmdd`; where the file has a `GROUP`, which is then its
help, they are commands of `rmdd FILE`. Another package names functions of the same kind, or Typer apps, as entry points
of the group `rmdd.commands`. What is heavy is imported inside the command that needs it, so that help comes at once.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

import typer

import rmdd.cli
from rmdd.cli.command import stop_on_sigterm

ENTRY_POINTS = "rmdd.commands"
EXIT_CODES = "Exit codes: 0 done, 1 a run failed, 2 a run file cannot be used, 130 stopped (a resumable run says how)."
FIRST = ("steps", "about", "presets", "searches")
"""Files whose commands are listed first; the others follow by name."""


def build() -> typer.Typer:
    """The app with every command there is."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Distil image-text data into a few hundred synthetic pairs. Start with `rmdd demo`.",
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


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


app = build()


def main(words: list[str] | None = None) -> None:
    """Entry point of the `rmdd` script, and of jobs with the `words` of a command line. Ends by `SystemExit`."""
    stop_on_sigterm()
    app(words, prog_name="rmdd")
