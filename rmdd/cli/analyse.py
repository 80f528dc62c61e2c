"""Commands that analyse a run: gradients, pca, collapse, sweep and linearity, as in PTM-ST's paper, and phases."""

from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, command
from rmdd.cli.console import rows_table

GROUP = "Analyse the experts and phases of a run, as PTM-ST's paper does; write tables and plots to the run folder."
Endpoint = Annotated[int | None, typer.Option(help="Expert epoch at which the shortcuts end; default: the last one.")]
Experts = Annotated[int | None, typer.Option(min=1, help="Number of experts to use; default: all.")]
Draws = Annotated[int, typer.Option(min=1, help="Random mini-batch draws for each start epoch and expert.")]
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
    """Compare matching gradients of all start epochs by cosine, on original and shortcut trajectories (Figure 4)."""
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
    """Plot the principal components of matching gradients, coloured by start epoch (Figures 2b and 6a)."""
    from rmdd.analyse.gradients import pca

    options: dict[str, Any] = {"endpoint": endpoint, "experts": experts, "draws": draws, "shortcut_only": shortcut_only}
    with call.pipeline(run) as pipeline:
        return _output(pca(pipeline, **options))


@command
def collapse(
    call: Call,
    run: config.Run,
    epochs: Annotated[
        str | None, typer.Option(help="Exclusive ends of the start-epoch ranges to try, such as 2,4,6; default: five.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Outer iterations of each distillation; default: those of phase 0.")
    ] = None,
    trajectories: Annotated[str, typer.Option(help="Use original, shortcut, or original,shortcut.")] = "original",
) -> Output:
    """Distil once per range of start epochs and compare students with the experts they match (Figure 2a, Table 7)."""
    from rmdd.analyse.tables import collapse

    call.check(run)
    stops = _numbers(epochs, "2,4,6")
    with call.working() as progress:
        kinds = trajectories.split(",")
        return _output(collapse(run, progress, epochs=stops, iterations=iterations, trajectories=kinds))


@command
def sweep(
    call: Call,
    run: config.Run,
    table: Annotated[str, typer.Option(help="Paper's table: shift (13), endpoints (14) or delta (15).")] = "shift",
) -> Output:
    """Distil once per row of an ablation table that varies how start epochs and endpoints move between phases."""
    from rmdd.analyse.tables import sweep

    call.check(run)
    with call.working() as progress:
        return _output(sweep(run, progress, table))


@command
def phases(
    call: Call,
    run: config.Run,
    epochs: Annotated[
        str | None, typer.Option(help="Numbers of student epochs to try for every row, such as 30,60,120.")
    ] = None,
    students: Annotated[
        int | None, typer.Option(min=1, help="Number of students per row; default: evaluate.students.")
    ] = None,
) -> Output:
    """Compare phases on val: each alone, in all orders, chained or not, the first phase repeated, and one phase."""
    from rmdd.analyse.phases import PhaseComparison

    call.check(run)
    passes = _numbers(epochs, "30,60,120")
    with call.working() as progress:
        return _output(PhaseComparison(run, passes, students).execute(progress))


@command
def linearity(
    call: Call,
    run: config.Run,
    endpoint: Endpoint = None,
    start: Annotated[float, typer.Option(help="Start epoch on the trajectory; may be a fraction such as 0.5.")] = 0.5,
    halvings: Annotated[int, typer.Option(min=1, help="How often to halve the distance between two start points.")] = 5,
    inner_steps: Annotated[int, typer.Option(min=1, help="Number of inner steps; Proposition 1 assumes one.")] = 1,
    shortcut_only: ShortcutOnly = False,
) -> Output:
    """Measure how the matching gradient changes with the start point on a trajectory (Proposition 1)."""
    from rmdd.analyse.linearity import linearity

    options: dict[str, Any] = {"endpoint": endpoint, "shortcut_only": shortcut_only}
    with call.pipeline(run) as pipeline:
        return _output(linearity(pipeline, start=start, halvings=halvings, inner_steps=inner_steps, **options))


def _numbers(text: str | None, example: str) -> list[int] | None:
    """Return the numbers in the value of `--epochs`, such as `2,4,6`."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise config.ConfigError([f"--epochs {text}: write whole numbers, such as {example}"], "analyse") from None


def _output(result: dict[str, Any]) -> Output:
    """Return the rows, note and file names of an analysis as an `Output`, with an error if runs of some rows failed."""
    rows = result["rows"]
    notes = [result["note"]] if "note" in result else []
    lines = [rows_table(rows), *notes, *(f"wrote {file}" for file in result["files"])]
    failed = [row["error"] for row in rows if "error" in row]
    error = RuntimeError("\n".join([f"{len(failed)} of {len(rows)} runs failed", *failed])) if failed else None
    return Output(result, lines, error, wrap=True)
