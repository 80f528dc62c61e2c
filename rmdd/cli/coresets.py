"""The words of `rmdd coreset`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmdd.cli.common import Debug, Json, Quiet, Sets, Source, do, load

if TYPE_CHECKING:
    from rmdd.pipeline import Pipeline


def coreset(
    source: Source,
    method: Annotated[
        str, typer.Option(help="random, herding, k-center, forgetting, medoids, matched or clip-score.")
    ] = "herding",
    pairs: Annotated[int | None, typer.Option(help="Pairs to choose.")] = None,
    bytes_: Annotated[
        int | None, typer.Option("--bytes", metavar="N", help="As many as fit, as encoded images and captions.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="SET", help="As many as fit the bytes of this distilled set, or of a run's.")
    ] = None,
    unit: Annotated[str, typer.Option(help="image: one caption of an image at most; record: any captions.")] = "image",
    encoder: Annotated[
        str,
        typer.Option(
            help="tower, expert:N, columns:NAME for features in the dataset, or clip:NAME, a hub id or folder."
        ),
    ] = "tower",
    space: Annotated[str, typer.Option(help="joint, image, text or sum.")] = "joint",
    seed: Annotated[int | None, typer.Option(help="Default: the run's.")] = None,
    clusters: Annotated[int, typer.Option(help="Choose within so many k-means clusters.")] = 0,
    guard: Annotated[str, typer.Option(help="Drop outliers first: none, centroids or cosine.")] = "none",
    never_learned: Annotated[
        str, typer.Option(help="forgetting: put what was never learned first, last, or exclude it.")
    ] = "last",
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="A=B", help="More: caption, dtype, draw, start, quota, guard_share, expert."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Workers that hold the features; default: by their size.")
    ] = None,
    set_: Sets = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose real pairs of the training split: the baselines, at equal pairs or at equal bytes."""
    from rmdd import config

    asked: dict[str, Any] = {"method": method, "pairs": pairs, "bytes": bytes_, "unit": unit, "encoder": encoder}
    asked |= {"space": space, "seed": seed, "clusters": clusters, "guard": guard, "never_learned": never_learned}

    def prepared() -> config.Run:
        asked.update(_options(options or []))
        if like is not None:
            if bytes_ is not None:
                raise config.ConfigError(["--like and --bytes both say how many bytes; give one"], "coreset")
            asked["bytes"] = _bytes_of(like)
        return _choice(asked).prepared(load(source, set_ or []))

    def step(pipeline: "Pipeline") -> dict[str, Any]:
        from rmdd.comparisons.coreset import choose

        subset, folder = choose(pipeline, _choice(asked), ranks)
        facts = subset.facts
        shown = {name: facts[name] for name in ("radius", "mean_error", "never_learned") if name in facts}
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        size = f"{facts['pairs']} pairs of {facts['items']} {subset.unit}s"
        cost = f"{facts['bytes']['total']:,} bytes, {facts['parameters']:,} parameters"
        if facts["pairs"] == facts["items"]:
            cost += "; that is all of them, so that nothing was chosen"
        lines = [f"{subset.method}: {size}, {cost}", *([told] if told else []), f"subset: {folder}"]
        return {"subset": str(folder), "method": subset.method, "facts": facts, "say": lines}

    do(prepared, step, json, quiet, debug, check=False)


def _bytes_of(folder: Path) -> int:
    from rmdd import config
    from rmdd.artefact.distilled import load

    try:
        own = folder / "set"
        found: int = load(own if own.is_dir() else folder).budget()["total"]["bytes"]
    except (ValueError, OSError) as error:
        raise config.ConfigError([f"--like {folder}: {error}"], "coreset") from error
    return found


def _choice(asked: dict[str, Any]) -> Any:
    from rmdd.comparisons.coreset import choice_of

    return choice_of(asked)


def _options(texts: list[str]) -> dict[str, Any]:
    from rmdd import config
    from rmdd.config.runfile import parse

    split = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in split if not equals]:
        raise config.ConfigError([f"--option {name}: write it as name=value" for name in wrong], "coreset")
    return {name.replace("-", "_"): parse(value) for name, _, value in split}
