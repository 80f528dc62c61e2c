"""The words after `rmdd bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd.cli.common import Debug, Json, Quiet, Sets, Source, do, load, outcome, print_json

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline

bench = typer.Typer(
    help="Measure one iteration of matching, and the first-order gradient against the exact one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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
    method: Annotated[
        list[str] | None, typer.Option(help="Also the step of a method, such as repblend; repeat it.")
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
    with outcome(debug):
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
        chosen = step.variants(engines=engines, yardsticks=step.yardsticks_of(yardsticks), of_methods=method or [])
        found = step.bench_step(case, chosen, repeats, out, memory)
    if json:
        print_json(found)
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
        from rmdd.cli.console import comparison

        rows = estimator.of_run(pipeline, phase, iterations, every, lambda row: None)
        medians = estimator.summary(rows)
        return {"rows": rows, "medians": medians, "say": [comparison(rows, medians)]}

    do(lambda: load(source, set_ or []), compare, json, quiet, debug)
