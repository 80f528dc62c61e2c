"""Commands that measure trajectory matching: `rmdd bench step`, `estimator`."""

from pathlib import Path
from typing import Annotated

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, command
from rmdd.cli.console import comparison

GROUP = "Measure time and memory of a matching step, and how close first-order gradients are to exact ones."


@command(options=("json", "debug"))
def step(
    tower: Annotated[str, typer.Option(help="Image tower with random weights: convnet or a timm model.")] = "convnet",
    widths: Annotated[str, typer.Option(help="Number of channels of each block of convnet.")] = "64,64,64",
    image_size: Annotated[int, typer.Option(help="Width and height of the images in pixels.")] = 64,
    pairs: Annotated[int, typer.Option(help="Number of synthetic pairs M.")] = 100,
    batch: Annotated[int, typer.Option(help="Mini-batch size B of an inner step.")] = 20,
    steps: Annotated[int, typer.Option(help="Number of inner steps K.")] = 8,
    loss: Annotated[str, typer.Option(help="Loss function of the student.")] = "wbce",
    similarity: Annotated[str, typer.Option(help="Similarity matrix: full, low_rank or identity.")] = "full",
    yardsticks: Annotated[str, typer.Option(help="Loops to compare: whole_unroll, published, published_rebuilt.")] = (
        "whole_unroll,published,published_rebuilt"
    ),
    options: Annotated[
        list[str] | None,
        typer.Option("--engine", help="Options of the step to measure, such as bfloat16,recompute; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Also measure the step of this method, such as repblend; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Number of steps to time for each variant.")] = 20,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to which the result is also written.")] = None,
) -> Output:
    """Compare time and memory of rmdd's matching step with plain autograd and with the published two-pass loop."""
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
    phase: Annotated[int, typer.Option(help="Index of the phase to measure, from 0.")] = 0,
    iterations: Annotated[int, typer.Option(help="Number of outer iterations to run.")] = 100,
    every: Annotated[int, typer.Option(help="Outer iterations between two comparisons.")] = 10,
) -> Output:
    """Compare first-order with exact meta-gradients during a distillation, by cosine and ratio of norms."""
    from rmdd.bench.estimator import of_run, summary

    with call.pipeline(run) as pipeline:
        rows = of_run(pipeline, phase, iterations, every)
    medians = summary(rows)
    return Output({"rows": rows, "medians": medians}, [comparison(rows, medians)])
