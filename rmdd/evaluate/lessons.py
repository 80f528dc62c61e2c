"""Lessons on disk, for students of what no phase of their run made.

Two kinds of file, each named by the hash of what it holds: `.safetensors` has learned pairs (see `rmdd.distill.sets`,
always with a similarity in full), `.json` the caption records of real pairs in the train split.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rmdd.artefact.distilled import DistilledSet
from rmdd.core.files import atomic_path, read_json
from rmdd.distill.sets import name_by_content, read_subsets, write_subsets
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
    subsets = [
        {
            "images": lesson.images,
            "texts": lesson.texts,
            "similarity.matrix": lesson.similarity,
            "lr_image": torch.tensor(lesson.lr_image, dtype=torch.float64),
            "lr_text": torch.tensor(lesson.lr_text, dtype=torch.float64),
        }
        for lesson in lessons
    ]
    alpha = [1.0] * len(subsets)
    path = folder / name_by_content(subsets, alpha)
    if not path.is_file():
        write_subsets(path, subsets, alpha)
    return path


def write_records(folder: Path, records: Sequence[int]) -> Path:
    """Keep which caption records of the train split are learned from; returns the file."""
    data = json.dumps(list(records)).encode()
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.json"
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path


def read_lessons(path: Path, image_size: int, train: Callable[[], PreparedSplit], lr: float) -> list[Lesson]:
    """What a student learns in order, with pictures of side `image_size`. `lr`, unless 0, replaces both rates."""
    if path.suffix == ".json":
        return [real_lesson(train(), read_json(path), lr)]
    learned = [
        Lesson(t["images"], t["texts"], t["similarity.matrix"], t["lr_image"].item(), t["lr_text"].item())
        for t, _ in read_subsets(path)
    ]
    lessons = enlarged_to(image_size, learned)
    return [replace(lesson, lr_image=lr, lr_text=lr) for lesson in lessons] if lr else lessons


def real_lesson(train: PreparedSplit, records: list[int], lr: float) -> Lesson:
    """Real caption records with identity similarity and one rate for both towers."""
    images = train.pictures(train.split.image_of[records])
    return Lesson(images, torch.tensor(train.texts[records]), torch.eye(len(records)), lr, lr)
