"""The words after `rmdd bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd.cli.common import Debug, Json, Quiet, Sets, Source, do, load, outcome, print_json

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline

bench = typer.Typer(
    help="Measure matching, fleets, ingest, coresets, the metric.", no_args_is_help=True, rich_markup_mode=None
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


@bench.command("phases")
def bench_phases(
    phases: Annotated[str, typer.Option(help="Numbers of phases to compare.")] = "2,3",
    iterations: Annotated[int, typer.Option(help="Iterations of each phase.")] = 60,
    repeats: Annotated[int, typer.Option(help="How often each is measured; the medians are told.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time phases side by side on Ray against the same ones in turn, one thread each."""
    with outcome(debug):
        from rmdd.bench.phases import Case, bench_phases, table

        found = bench_phases(Case(iterations=iterations), [int(p) for p in phases.split(",")], repeats, out)
    if json:
        print_json(found)
    else:
        typer.echo(table(found))


@bench.command("experts")
def bench_experts(
    experts: Annotated[int, typer.Option(help="Tiny experts to train.")] = 8,
    workers: Annotated[int, typer.Option(help="Workers side by side, and CPUs of the local Ray.")] = 2,
    epochs: Annotated[int, typer.Option(help="Epochs of each.")] = 10,
    each: Annotated[int, typer.Option(help="Experts that get a trainer of their own.")] = 2,
    ways: Annotated[str, typer.Option(help="What to compare.")] = "in_turn,pool,train,trainer_each",
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time many experts, and their memory: in turn, by a pool of actors, by one run of Ray Train, by one each."""
    with outcome(debug):
        from rmdd.bench import experts as fleets

        case = fleets.Case(experts=experts, workers=workers, epochs=epochs, each=each)
        found = fleets.bench_experts(case, tuple(w for w in ways.split(",") if w), out)
    if json:
        print_json(found)
    else:
        typer.echo(fleets.table(found))


@bench.command("ingest")
def bench_ingest(
    pairs: Annotated[int, typer.Option(help="Pairs to generate and read.")] = 20_000,
    side: Annotated[int, typer.Option(help="Side of the JPEGs.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read.")] = 2,
    object_store: Annotated[int, typer.Option(help="Object store of Ray, in MiB.")] = 512,
    variants: Annotated[str, typer.Option(help="Of loop, loader, rmdd, in_turn; the first is the yardstick.")] = (
        "loop,loader,rmdd,in_turn"
    ),
    folder: Annotated[Path | None, typer.Option(help="Where the pairs lie and stay; default: a temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure pairs per second and peak memory of an ingest beside a plain loop and a torch DataLoader."""
    with outcome(debug):
        import tempfile

        from rmdd.bench import ingest

        case = ingest.Case(pairs=pairs, side=side, workers=workers, object_store_mb=object_store)
        with tempfile.TemporaryDirectory() as temporary:
            found = ingest.bench_ingest(case, folder or Path(temporary), variants.split(","), out)
        if json:
            print_json(found)
        else:
            typer.echo(ingest.table(found))


@bench.command("coresets")
def bench_coresets(
    rows: Annotated[int, typer.Option(help="Features to generate.")] = 1_000_000,
    width: Annotated[int, typer.Option(help="Numbers in each.")] = 384,
    dtype: Annotated[str, typer.Option(help="float32 or float16, on disk.")] = "float32",
    picks: Annotated[str, typer.Option(help="Sizes of the coresets.")] = "100,500",
    methods: Annotated[str, typer.Option(help="Of herding, k_center, medoids.")] = "herding,k_center",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where features lie and stay; default: a temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time herding and k-center over generated features on disk, and their memory."""
    with outcome(debug):
        import tempfile

        from rmdd.bench import coresets

        case = coresets.Case(rows=rows, width=width, dtype=dtype, threads=threads)
        sizes, chosen = [int(k) for k in picks.split(",")], methods.split(",")
        with tempfile.TemporaryDirectory() as temporary:
            found = coresets.bench_coresets(case, sizes, folder or Path(temporary), chosen, out)
        if json:
            print_json(found)
        else:
            typer.echo(coresets.table(found))


@bench.command("metric")
def bench_metric(
    images: Annotated[int, typer.Option(help="Images of the gallery.")] = 5000,
    texts: Annotated[int, typer.Option(help="Captions of the gallery.")] = 25_010,
    width: Annotated[int, typer.Option(help="Length of an embedding.")] = 512,
    chunk: Annotated[int, typer.Option(help="Queries scored at once.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed rankings; the quickest is told.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the exact ranking of a gallery, by default of COCO's size, and measure its peak memory."""
    with outcome(debug):
        from rmdd.bench import metric

        found = metric.bench_metric(metric.Case(images, texts, width, chunk, threads), repeats, out)
    if json:
        print_json(found)
    else:
        typer.echo(metric.table(found))
