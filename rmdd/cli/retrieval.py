"""Commands that make a retrieval model and search with it: `rmdd train`, `rmdd search-images`."""

from pathlib import Path
from typing import Annotated

import typer

from rmdd import config
from rmdd.cli.command import Call, Output, Sets, command
from rmdd.cli.loading import load
from rmdd.core.storage import address_of


@command
def train(
    call: Call,
    source: Annotated[
        str, typer.Argument(metavar="SET_OR_RUN", help="Folder of a distilled set or of a run; or a run file.")
    ],
    on: Annotated[
        str, typer.Option(metavar="PAIRS", help="Training pairs: set, random, random:N, all, or a coreset's folder.")
    ] = "set",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the model; default: below models of the storage.")
    ] = None,
    student: Annotated[int, typer.Option(min=0, help="Number of the student, which selects its random draws.")] = 0,
    set_: Sets = None,
) -> Output:
    """Train a retrieval model on a distilled set, random pairs, a coreset or all pairs, and save it."""
    from rmdd.comparisons.train import prepare_training

    training = prepare_training(source, on, set_ or [], student, load)
    with call.working() as progress:
        model = training.execute(out, progress)
    assert model.path is not None
    folder = address_of(training.run.runtime, model.path) if out is None else str(model.path)
    trained = f"{model.trained_on['pairs']} pairs ({model.trained_on['kind']})"
    scored = [f"val R@mean: {model.scores['val']['R@mean']:.1f} %"] if model.scores else []
    lines = [f"trained on {trained}", *(scored or ["not scored: the data of the run is not here"]), f"model: {folder}"]
    return Output({"model": folder, "trained_on": dict(model.trained_on), "scores": dict(model.scores)}, lines)


@command
def search_images(
    call: Call,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model that `rmdd train` wrote.")],
    query: Annotated[str, typer.Argument(metavar="TEXT", help='What to find, such as "a red ring".')],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with pictures, read with its subfolders.")],
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Number of pictures to show.")] = 5,
    device: Annotated[str, typer.Option(help="Where to embed the pictures: cpu or cuda.")] = "cpu",
) -> Output:
    """Find the pictures of a folder that fit a text best, with their scores (cosines)."""
    from rmdd.retrieval.model import load_model, reasons

    if not folder.is_dir():
        raise config.ConfigError(["this folder does not exist; give a folder with pictures"], str(folder))
    with call.working() as progress:
        opened = load_model(model, device)
        with progress.stage("pictures", {}) as stage:

            def show(done: int, total: int) -> None:
                stage.add({"pictures": total})
                stage("pictures", {"done": done})

            gallery = opened.gallery(folder, show)
        skipped = ", ".join(f"{number} {reason}" for reason, number in reasons(gallery.unreadable).items())
        if not gallery.images:
            found_files = f"none of the {len(gallery.unreadable)} pictures in {folder} and its subfolders can be read"
            raise ValueError(f"{found_files} ({skipped}); give a folder with pictures")
        hits = opened.search(query, gallery, top)
    lines = [f"{score:6.3f}  {path}" for path, score in hits]
    lines.append(f"searched {len(gallery.images)} pictures{f'; could not read {skipped}' if skipped else ''}")
    found = [{"path": str(path), "score": score} for path, score in hits]
    facts = {"query": query, "hits": found, "pictures": len(gallery.images), "unreadable": dict(gallery.unreadable)}
    return Output(facts, lines)
