"""The command `rmdd coreset`: select real training pairs as a baseline for distilled sets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, Source, command
from rmdd.cli.loading import load
from rmdd.config.runfile import parse


@command
def coreset(
    call: Call,
    source: Source,
    method: Annotated[
        str, typer.Option(help="Method: random, herding, k-center, forgetting, medoids, matched, clip-score.")
    ] = "herding",
    pairs: Annotated[int | None, typer.Option(help="Number of pairs to select.")] = None,
    bytes_: Annotated[
        int | None, typer.Option("--bytes", metavar="N", help="Select as many pairs as fit in N bytes on disk.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="SET", help="Select as many pairs as fit in the bytes of this distilled set.")
    ] = None,
    unit: Annotated[str, typer.Option(help="image: at most one caption per image; record: any number.")] = "image",
    encoder: Annotated[
        str,
        typer.Option(
            help="Feature encoder: tower, expert:N, columns:NAME (stored in the dataset) or clip:NAME (hub id, folder)."
        ),
    ] = "tower",
    space: Annotated[str, typer.Option(help="Features to compare: joint, image, text or sum.")] = "joint",
    seed: Annotated[int | None, typer.Option(help="Random seed; default: the seed of the run file.")] = None,
    clusters: Annotated[int, typer.Option(help="k-means clusters, in each of which pairs are selected; 0: none.")] = 0,
    guard: Annotated[str, typer.Option(help="How to drop outliers first: none, centroids or cosine.")] = "none",
    never_learned: Annotated[
        str, typer.Option(help="For method forgetting: rank never-learned pairs first or last, or exclude them.")
    ] = "last",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="A=B", help="Any other option: caption, dtype, draw, start, quota, guard_share, expert."
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of workers that divide the features; default: by their size.")
    ] = None,
    set_: Sets = None,
) -> Output:
    """Select real training pairs (a coreset) as a baseline with as many pairs or bytes as a distilled set."""
    from rmdd.comparisons.coreset import choice_of, choose

    if like is not None and bytes_ is not None:
        raise config.ConfigError(["--like and --bytes both set the number of bytes; give only one of them"], "coreset")
    rule: dict[str, Any] = {"method": method, "pairs": pairs, "bytes": bytes_, "unit": unit, "encoder": encoder}
    rule |= {"space": space, "seed": seed, "clusters": clusters, "guard": guard, "never_learned": never_learned}
    rule |= _options(options or [])
    if like is not None:
        rule["bytes"] = _bytes_of(like)
    choice = choice_of(rule)
    with call.pipeline(choice.prepared(load(source, set_ or [])), check=False) as pipeline:
        subset, folder = choose(pipeline, choice, ranks)
    facts = subset.facts
    shown = {name: facts[name] for name in ("radius", "mean_error", "never_learned") if name in facts}
    measures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
    size = f"{facts['pairs']} pairs of {facts['items']} {subset.unit}s"
    cost = f"{facts['bytes']['total']:,} bytes, {facts['parameters']:,} parameters"
    if facts["pairs"] == facts["items"]:
        cost += "; the coreset holds all training pairs, so the method had no effect"
    lines = [f"{subset.method}: {size}, {cost}", *([measures] if measures else []), f"subset: {folder}"]
    return Output({"subset": str(folder), "method": subset.method, "facts": facts}, lines)


def _bytes_of(folder: Path) -> int:
    from rmdd.artefact.distilled import load as load_set

    nested = folder / "set"
    try:
        size: int = load_set(nested if nested.is_dir() else folder).budget()["total"]["bytes"]
    except (ValueError, OSError) as error:
        raise config.ConfigError([f"--like {folder}: {error}"], "coreset") from error
    return size


def _options(texts: list[str]) -> dict[str, Any]:
    split = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in split if not equals]:
        raise config.ConfigError([f"--option {name}: write it as name=value" for name in wrong], "coreset")
    return {name.replace("-", "_"): parse(value) for name, _, value in split}
