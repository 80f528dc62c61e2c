"""The words after `rmdd analyse`."""

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd import config
from rmdd.cli.common import Debug, Json, Quiet, Sets, Source, do, load, outcome, print_json, stop_on_sigterm

if TYPE_CHECKING:
    from rmdd.core.progress import Progress
    from rmdd.pipeline import Pipeline

analyse = typer.Typer(
    help="The analyses of PTM-ST on a run's own experts: tables and drawings in its folder.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Endpoint = Annotated[int | None, typer.Option(help="Epoch at which shortcuts end; default: the last one.")]
Experts = Annotated[int | None, typer.Option(min=1, help="Use only so many experts.")]
Draws = Annotated[int, typer.Option(min=1, help="Draws of mini-batches per start and expert.")]
ShortcutOnly = Annotated[
    bool, typer.Option("--shortcut-only", help="Leave out original trajectories, which need experts.keep: all.")
]


@analyse.command("gradients")
def gradients_(
    source: Source,
    set_: Sets = None,
    endpoint: Endpoint = None,
    experts: Experts = None,
    draws: Draws = 2,
    shortcut_only: ShortcutOnly = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Cosines between the matching gradients of all starts, on original and shortcut trajectories (Figure 4)."""

    def step(pipeline: "Pipeline") -> dict[str, Any]:
        from rmdd.analyse.gradients import gradients

        found = gradients(pipeline, endpoint=endpoint, experts=experts, draws=draws, shortcut_only=shortcut_only)
        return _told(found)

    do(lambda: load(source, set_ or []), step, json, quiet, debug)


@analyse.command("pca")
def pca_(
    source: Source,
    set_: Sets = None,
    endpoint: Endpoint = None,
    experts: Experts = None,
    draws: Draws = 4,
    shortcut_only: ShortcutOnly = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Principal components of the matching gradients by start epoch (Figures 2b and 6a)."""

    def step(pipeline: "Pipeline") -> dict[str, Any]:
        from rmdd.analyse.gradients import pca

        return _told(pca(pipeline, endpoint=endpoint, experts=experts, draws=draws, shortcut_only=shortcut_only))

    do(lambda: load(source, set_ or []), step, json, quiet, debug)


@analyse.command("collapse")
def collapse_(
    source: Source,
    set_: Sets = None,
    epochs: Annotated[
        str | None, typer.Option(help="Stops (exclusive ends of the range of starts), such as 2,4,6; default: five.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Updates of each; default: those of phase 0.")] = None,
    trajectories: Annotated[str, typer.Option(help="original, shortcut, or both with a comma.")] = "original",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Teacher against student by stop of the starts (Figure 2a, Table 7); a distillation each."""

    def table(run: config.Run, progress: "Progress") -> dict[str, Any]:
        from rmdd.analyse.tables import collapse

        try:
            stops = [int(e) for e in epochs.split(",")] if epochs is not None else None
        except ValueError:
            raise config.ConfigError([f"--epochs {epochs}: write whole numbers, such as 2,4,6"], "analyse") from None
        kinds = tuple(trajectories.split(","))
        return collapse(run, progress, epochs=stops, iterations=iterations, trajectories=kinds)

    _runs(source, set_ or [], table, json, quiet, debug)


@analyse.command("sweep")
def sweep_(
    source: Source,
    set_: Sets = None,
    table: Annotated[str, typer.Option(help="shift, endpoints or delta: Tables 13, 14 and 15.")] = "shift",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What ranges and endpoints that move from phase to phase are worth; a distillation per row."""

    def rows(run: config.Run, progress: "Progress") -> dict[str, Any]:
        from rmdd.analyse.tables import sweep

        return sweep(run, progress, table)

    _runs(source, set_ or [], rows, json, quiet, debug)


@analyse.command("linearity")
def linearity_(
    source: Source,
    set_: Sets = None,
    endpoint: Endpoint = None,
    start: Annotated[float, typer.Option(help="Epoch to start at, which may lie between two.")] = 0.5,
    halvings: Annotated[int, typer.Option(min=1, help="How often the distance between starts is halved.")] = 5,
    inner_steps: Annotated[int, typer.Option(min=1, help="Student steps; the proposition is about one.")] = 1,
    shortcut_only: ShortcutOnly = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """How the matching gradient changes with the start (Proposition 1)."""

    def step(pipeline: "Pipeline") -> dict[str, Any]:
        from rmdd.analyse.linearity import linearity

        return _told(
            linearity(
                pipeline,
                endpoint=endpoint,
                start=start,
                halvings=halvings,
                inner_steps=inner_steps,
                shortcut_only=shortcut_only,
            )
        )

    do(lambda: load(source, set_ or []), step, json, quiet, debug)


def _runs(
    source: str,
    sets: list[str],
    table: Callable[[config.Run, "Progress"], dict[str, Any]],
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """A table whose cells are runs of their own."""
    with outcome(debug):
        from rmdd.core.progress import Progress
        from rmdd.runs.preflight import impossible

        run = load(source, sets)
        if mistakes := impossible(run):
            raise config.ConfigError(mistakes, run.name)
        stop_on_sigterm()
        with contextlib.redirect_stdout(sys.stderr):
            found = table(run, Progress(quiet))
        if as_json:
            print_json(found)
        else:
            from rmdd.cli.console import stdout

            for line in _told(found)["say"]:
                stdout().print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))
        if failed := [row["error"] for row in found["rows"] if "error" in row]:
            raise RuntimeError("\n".join([f"{len(failed)} of {len(found['rows'])} runs failed", *failed]))


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """With lines for people: the rows as a table, what they are, and the files."""
    from rmdd.cli.console import rows_table

    table, notes = rows_table(found["rows"]), [found["note"]] if "note" in found else []
    return found | {"say": [table, *notes, *(f"wrote {file}" for file in found["files"])]}
