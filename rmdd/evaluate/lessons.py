"""Lessons on disk, for students of what no phase of their run made.

Two kinds of file, each named by the hash of its bytes: `.safetensors` holds M learned pairs per subset (`0.images`,
`0.texts`, `0.similarity`, `0.lr_image`, `0.lr_text`, `1.images`, ...), `.json` the caption records of real pairs in the
train split.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import atomic_path, read_json
from rmdd.distill.synthetic import enlarged
from rmdd.evaluate.students import Lesson
from rmdd.models.prepared import PreparedSplit


def lessons_of(found: DistilledSet) -> list[Lesson]:
    """What students learn from a set in order, its pictures of the side they are stored with."""
    return [Lesson(s.images, s.texts, s.matrix, s.lr_image, s.lr_text) for s in found.subsets]


def enlarged_to(size: int, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The same with pictures of the side that towers see."""
    return [replace(lesson, images=enlarged(lesson.images, size)) for lesson in lessons]


def write_lessons(folder: Path, lessons: Sequence[Lesson]) -> Path:
    """Keep learned pairs, pictures of the side they are stored with; returns the file."""
    tensors: dict[str, torch.Tensor] = {}
    for k, lesson in enumerate(lessons):
        rates = {n: torch.tensor(getattr(lesson, n), dtype=torch.float64) for n in ("lr_image", "lr_text")}
        learned = {"images": lesson.images, "texts": lesson.texts, "similarity": lesson.similarity}
        tensors |= {f"{k}.{name}": t.detach().contiguous() for name, t in (learned | rates).items()}
    return _keep(folder, ".safetensors", save(tensors))


def write_records(folder: Path, records: Sequence[int]) -> Path:
    """Keep which caption records of the train split are learned from; returns the file."""
    return _keep(folder, ".json", json.dumps(list(records)).encode())


def _keep(folder: Path, suffix: str, data: bytes) -> Path:
    path = folder / (hashlib.sha256(data).hexdigest()[:16] + suffix)
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path


def read_lessons(path: Path, image_size: int, train: Callable[[], PreparedSplit], lr: float) -> list[Lesson]:
    """What a student learns in order, with pictures of side `image_size`. `lr`, unless 0, replaces both rates."""
    if path.suffix == ".json":
        return [real_lesson(train(), read_json(path), lr)]
    tensors = load_file(path)
    subsets = range(1 + max(int(name.partition(".")[0]) for name in tensors))

    def subset(k: int) -> Lesson:
        learned = tensors[f"{k}.images"], tensors[f"{k}.texts"], tensors[f"{k}.similarity"]
        return Lesson(*learned, tensors[f"{k}.lr_image"].item(), tensors[f"{k}.lr_text"].item())

    lessons = enlarged_to(image_size, [subset(k) for k in subsets])
    return [replace(lesson, lr_image=lr, lr_text=lr) for lesson in lessons] if lr else lessons


def real_lesson(train: PreparedSplit, records: list[int], lr: float) -> Lesson:
    """Real caption records with identity similarity and one rate for both towers."""
    images = train.pictures(train.split.image_of[records])
    return Lesson(images, torch.tensor(train.texts[records]), torch.eye(len(records)), lr, lr)
