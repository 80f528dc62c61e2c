"""COCO-QA: four text files per split; line i of each file belongs to question i.

Each test question becomes a row with its image from val2014. A question is lower-case, tokenised and has no
question mark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rmdd.config import Data
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.layouts import read_text
from rmdd.data.source import AnnotationRow, AnnotationSource

FILES = ("questions.txt", "answers.txt", "img_ids.txt", "types.txt")
TYPES = ("object", "number", "colour", "location")


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    image: str
    """Path of the image, relative to the folder that contains val2014."""
    type: str
    line: int


def read(data: Any, split: str) -> list[Question]:
    """Read all questions of `split` (train or test) in file order. Raises `ValueError` with file and line number."""
    root = input_path(data.root)
    folder = root / data.cocoqa.folder / split
    lines = {name: _lines(folder / name) for name in FILES}
    counts = {name: len(values) for name, values in lines.items()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(f"{folder}: the four files must have equal numbers of lines, found {lengths}; copy all again")
    if not counts[FILES[0]]:
        raise ValueError(f"{folder / FILES[0]} holds no question; copy the file again")
    pictures = {"train": "train2014", "test": "val2014"}[split]
    questions = []
    for i, (question, answer, number, kind) in enumerate(zip(*lines.values(), strict=True), start=1):
        for name, word in zip(FILES, (question, answer, number, kind), strict=True):
            if not word:
                raise ValueError(f"{folder / name}: line {i} is empty; copy all four files again")
        if not number.isdecimal():
            raise ValueError(f"{folder / FILES[2]}: line {i} is {number!r}, expected the number of a COCO image")
        if kind not in ("0", "1", "2", "3"):
            raise ValueError(f"{folder / FILES[3]}: line {i} is {kind!r}, expected a type from 0 to 3")
        image = f"{pictures}/COCO_{pictures}_{int(number):012d}.jpg"
        questions.append(Question(question, answer, image, TYPES[int(kind)], i))
    return questions


def sampled_questions(data: Any) -> list[Question]:
    """Return all test questions, or `data.cocoqa.questions` of them, chosen by a hash of seed and line number."""
    questions, rule = read(data, "test"), data.cocoqa
    if rule.questions is None or rule.questions >= len(questions):
        return questions

    def order(q: Question) -> bytes:
        return hashlib.sha256(f"rmdd cocoqa/{rule.seed}/{q.line}".encode()).digest()

    return sorted(sorted(questions, key=order)[: rule.questions], key=lambda q: q.line)


def rows(data: Data) -> tuple[Iterator[AnnotationRow], list[InputPath]]:
    questions = sampled_questions(data)
    folder = input_path(data.root) / data.cocoqa.folder  # type: ignore[attr-defined]
    files = [folder / split / name for split in ("train", "test") for name in FILES]
    annotations = (
        AnnotationRow(
            q.image,
            (f"Question: {q.question} Answer: {q.answer}.",),
            "test",
            "cocoqa",
            f"test/img_ids.txt line {q.line}",
        )
        for q in questions
    )
    return annotations, files


def _lines(path: InputPath) -> list[str]:
    """Return the lines of a file without surrounding white space; blank lines at the end of the file are left out."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


SOURCE = AnnotationSource(rows)
