"""The analyses of PTM-ST: `rmdd analyse gradients`, `pca`, `collapse`, `sweep`, `linearity`."""

from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, command
from rmdd.cli.console import rows_table

GROUP = "The analyses of PTM-ST on a run's own experts: tables and drawings in its folder."
Endpoint = Annotated[int | None, typer.Option(help="Epoch at which shortcuts end; default: the last one.")]
Experts = Annotated[int | None, typer.Option(min=1, help="Use only so many experts.")]
Draws = Annotated[int, typer.Option(min=1, help="Draws of mini-batches per start and expert.")]
ShortcutOnly = Annotated[
    bool, typer.Option("--shortcut-only", help="Leave out original trajectories, which need experts.keep: all.")
]


@command
def gradients(
    call: Call,
    run: config.Run,
    endpoint: Endpoint = None,
    experts: Experts = None,
    draws: Draws = 2,
    shortcut_only: ShortcutOnly = False,
) -> Output:
    """Cosines between the matching gradients of all starts, on original and shortcut trajectories (Figure 4)."""
    from rmdd.analyse.gradients import gradients

    with call.pipeline(run) as pipeline:
        return _output(
            gradients(pipeline, endpoint=endpoint, experts=experts, draws=draws, shortcut_only=shortcut_only)
        )


@command
def pca(
    call: Call,
    run: config.Run,
    endpoint: Endpoint = None,
    experts: Experts = None,
    draws: Draws = 4,
    shortcut_only: ShortcutOnly = False,
) -> Output:
    """Principal components of the matching gradients by start epoch (Figures 2b and 6a)."""
    from rmdd.analyse.gradients import pca

    options: dict[str, Any] = {"endpoint": endpoint, "experts": experts, "draws": draws, "shortcut_only": shortcut_only}
    with call.pipeline(run) as pipeline:
        return _output(pca(pipeline, **options))


@command
def collapse(
    call: Call,
    run: config.Run,
    epochs: Annotated[
        str | None, typer.Option(help="Stops (exclusive ends of the range of starts), such as 2,4,6; default: five.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Updates of each; default: those of phase 0.")] = None,
    trajectories: Annotated[str, typer.Option(help="original, shortcut, or both with a comma.")] = "original",
) -> Output:
    """Teacher against student by stop of the starts (Figure 2a, Table 7); a distillation each."""
    from rmdd.analyse.tables import collapse

    call.check(run)
    try:
        stops = [int(e) for e in epochs.split(",")] if epochs is not None else None
    except ValueError:
        raise config.ConfigError([f"--epochs {epochs}: write whole numbers, such as 2,4,6"], "analyse") from None
    with call.working() as progress:
        kinds = trajectories.split(",")
        return _output(collapse(run, progress, epochs=stops, iterations=iterations, trajectories=kinds))


@command
def sweep(
    call: Call,
    run: config.Run,
    table: Annotated[str, typer.Option(help="shift, endpoints or delta: Tables 13, 14 and 15.")] = "shift",
) -> Output:
    """What ranges and endpoints that move from phase to phase are worth; a distillation per row."""
    from rmdd.analyse.tables import sweep

    call.check(run)
    with call.working() as progress:
        return _output(sweep(run, progress, table))


@command
def linearity(
    call: Call,
    run: config.Run,
    endpoint: Endpoint = None,
    start: Annotated[float, typer.Option(help="Epoch to start at, which may lie between two.")] = 0.5,
    halvings: Annotated[int, typer.Option(min=1, help="How often the distance between starts is halved.")] = 5,
    inner_steps: Annotated[int, typer.Option(min=1, help="Student steps; the proposition is about one.")] = 1,
    shortcut_only: ShortcutOnly = False,
) -> Output:
    """How the matching gradient changes with the start (Proposition 1)."""
    from rmdd.analyse.linearity import linearity

    options: dict[str, Any] = {"endpoint": endpoint, "shortcut_only": shortcut_only}
    with call.pipeline(run) as pipeline:
        return _output(linearity(pipeline, start=start, halvings=halvings, inner_steps=inner_steps, **options))


def _output(result: dict[str, Any]) -> Output:
    """The rows as a table, what they are, and the files; rows of runs that failed raise."""
    rows = result["rows"]
    notes = [result["note"]] if "note" in result else []
    lines = [rows_table(rows), *notes, *(f"wrote {file}" for file in result["files"])]
    failed = [row["error"] for row in rows if "error" in row]
    error = RuntimeError("\n".join([f"{len(failed)} of {len(rows)} runs failed", *failed])) if failed else None
    return Output(result, lines, error, wrap=True)
