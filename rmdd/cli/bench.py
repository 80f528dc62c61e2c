"""Measurements of the matching step: `rmdd bench step`, `estimator`."""

from pathlib import Path
from typing import Annotated

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, command
from rmdd.cli.console import comparison

GROUP = "Measure one iteration of matching, and the first-order gradient against the exact one."


@command(options=("json", "debug"))
def step(
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
) -> Output:
    """Time one iteration of matching and its memory against plain autograd and the published two-pass loop."""
    from rmdd.bench import step as bench

    case = bench.Case(
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
    engines = {name: bench.engine_of(name) for name in ["", *(options or [])]}
    chosen = bench.variants(engines=engines, yardsticks=bench.yardsticks_of(yardsticks), of_methods=method or [])
    measured = bench.bench_step(case, chosen, repeats, out, memory)
    return Output(measured, [bench.table(measured)])


@command
def estimator(
    call: Call,
    run: config.Run,
    phase: Annotated[int, typer.Option(help="The phase to follow.")] = 0,
    iterations: Annotated[int, typer.Option(help="Outer iterations to follow it for.")] = 100,
    every: Annotated[int, typer.Option(help="Iterations between comparisons.")] = 10,
) -> Output:
    """Compare the first-order meta-gradient with the exact one along a run: cosine and norm ratio."""
    from rmdd.bench.estimator import of_run, summary

    with call.pipeline(run) as pipeline:
        rows = of_run(pipeline, phase, iterations, every)
    medians = summary(rows)
    return Output({"rows": rows, "medians": medians}, [comparison(rows, medians)])
