"""Zero-shot classification: an image gets the class whose prototype has the highest cosine with it.

The prototype of a class is the normalised mean of the normalised text embeddings of its prompts. ACC@K: the correct
class is among the K classes with the highest cosines; ties count against the student.
Letters in shapes: N images, C classes, P prompts of all classes, D joint width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rmdd import config
from rmdd.data.captions import clean
from rmdd.data.sources import classes
from rmdd.data.splits import Split
from rmdd.evaluate.probes import ranking
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import Constants

TEMPLATES: dict[str, tuple[str, ...]] = {
    "single": ("a photo of a {}.",),
    # The seven prompt templates that, according to CLIP's authors, score almost as well as their full list.
    "seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    # Prompt templates for small images, written for rmdd.
    "cifar": (
        "a photo of a {}.",
        "a small photo of a {}.",
        "a tiny picture of a {}.",
        "a blurry photo of the {}.",
        "a dark photo of the {}.",
        "a bright photo of the {}.",
        "a grainy picture of a {}.",
        "a close view of a {}.",
        "a cropped picture of the {}.",
        "one {} seen from the side.",
    ),
    # Prompt templates for photographs of objects, written for rmdd.
    "imagenet": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a picture of one {}.",
        "a close-up of a {}.",
        "a {} seen from far away.",
        "a large {}.",
        "a small {}.",
        "a clean {} on a plain background.",
        "a {} outdoors.",
        "a {} indoors.",
        "a dark photo of a {}.",
        "a bright photo of a {}.",
        "a blurry photo of a {}.",
        "a drawing of a {}.",
        "a toy {}.",
    ),
}

TOGETHER = 4096
"""Number of images in a chunk; one operation compares a chunk with all classes."""


def templates(named: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return prompt templates: those of a named list, the lines of a text file, or the templates passed as a list.

    Raise `ValueError` for an unknown name or file, and for a template without {}.
    """
    if not isinstance(named, str):
        origin, lines = "templates", list(enumerate(named))
    elif named in TEMPLATES:
        return TEMPLATES[named]
    else:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ValueError(
                f"templates '{named}' is not a file and not one of {', '.join(TEMPLATES)}; give one of them"
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}); give a text file") from None
        origin = str(path)
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{origin} has no templates; write lines such as: a photo of a {{}}.")
    for i, line in lines:
        if "{}" not in line:
            raise ValueError(
                f"{origin}: line {i} is not a template, found {line[:60]!r}; write {{}} in the place of the class name"
            )
    return tuple(line for _, line in lines)


def task_of(probe: config.ZeroShot, data: config.ClassData, captions: config.Captions, split: Split) -> dict[str, Any]:
    """Return the content of the probe: class names, prompts of each class, and the class index of each image.

    `captions` holds the run's settings for caption cleaning, applied to prompts if the probe asks for it.
    """
    names = classes.read(data).names
    number_of = {clean(c, data.captions): i for i, c in enumerate(names)}
    lines = templates(probe.templates)
    prompts = []
    for synonyms in names.values():
        used = synonyms if data.classes.synonyms else synonyms[:1]
        filled = [line.replace("{}", name) for name in used for line in lines]
        prompts.append([clean(p, captions) for p in filled] if probe.caption_rule else filled)
    return {
        "classes": list(names),
        "names": [synonyms[0] for synonyms in names.values()],
        "templates": list(lines),
        "prompts": prompts,
        "labels": [number_of[split.captions[j]] for j in range(len(split.captions))],
        "ks": [k for k in probe.ks if k < len(names)],
    }


def facts(task: dict[str, Any]) -> dict[str, Any]:
    """Return the classes, prompt templates and chance level that are reported with the zero-shot scores."""
    names, total = task["names"], len(task["classes"])
    return {
        "classes": task["classes"],
        "names": names,
        "templates": task["templates"],
        "duplicate_names": sum(names.count(name) > 1 for name in names),
        "chance": {f"ACC@{k}": 100 * k / total for k in task["ks"]},
    }


def sentences(task: dict[str, Any]) -> list[list[str]]:
    """Return a list with a single block of sentences to embed: the prompts of all classes."""
    return [[prompt for prompts in task["prompts"] for prompt in prompts]]


def metrics(task: dict[str, Any]) -> list[str]:
    return [f"ACC@{k}" for k in task["ks"]]


@torch.no_grad()
def score(
    model: DualEncoder,
    task: dict[str, Any],
    split: Split,
    constants: tuple[Constants, Constants],
    embed: Callable[[list[str]], Any],
    device: torch.device,
    chunk: int,
    alive: Callable[[], object],
) -> dict[str, float]:
    """Return ACC@K in percent; `model` must be in eval mode. Raise `Diverged` if the model's embeddings collapsed."""
    texts_PD = ranking.embed_texts(model, embed(sentences(task)[0]), device)
    means = [part.mean(0) for part in texts_PD.split([len(prompts) for prompts in task["prompts"]])]
    prototypes_CD = F.normalize(torch.stack(means), dim=1)
    images_ND = ranking.embed_pictures(model, split.images, constants, device, chunk, alive)
    labels = torch.tensor(task["labels"], device=device)
    rank = [
        ranking.ranks(images_ND[i : i + TOGETHER] @ prototypes_CD.T, labels[i : i + TOGETHER])
        for i in range(0, len(labels), TOGETHER)
    ]
    return ranking.accuracies(torch.cat(rank), task["ks"])
