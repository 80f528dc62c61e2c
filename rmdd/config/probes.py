"""Probes: what a trained student can do beyond the retrieval that it was chosen by. They enter no choice and no hash.

A probe is a dataset and a way of asking. Of its `data` only what says where pictures and words are is its own; how they
are seen (`VIEW`) is the run's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from rmdd.config.data import Captions, Data
from rmdd.config.numbers import PositiveInt
from rmdd.config.runfile import Clash, Section

VIEW = ("image_size", "normalise", "captions", "background", "exif_orientation")
"""Fields of `data` that a probe takes from the run."""

TEMPLATES = ("single", "seven", "cifar", "imagenet")
"""Sets of prompts that come with rmdd."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Ks = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Classes(Section):
    """Labelled pictures. A subset of n classes is drawn by a hash of seed and class: a smaller one lies in a larger."""

    layout: Literal["folders", "list", "cifar10", "cifar100"] = Field(
        "folders", description="a folder per class; a list of files; CIFAR's binary version (test part)"
    )
    images: str = Field("", description="folder of the pictures below data.root, such as val")
    file: str | None = Field(
        None, description="of layout list, below data.root: lines `FILE CLASS`, or Kaggle's LOC_val_solution.csv"
    )
    names: str | None = Field(
        None,
        description="class names below data.root: lines `CLASS name, synonym`, or a JSON object; null: the folder's",
    )
    synonyms: bool = Field(False, description="make prompts of all names of a class, not of the first alone")
    number: Annotated[int, Field(ge=2)] | None = Field(None, description="classes drawn; null: all")
    seed: int = Field(0, description="another seed draws other classes")
    only: tuple[str, ...] | None = Field(None, description="these classes, instead of a draw")

    def clashes(self) -> list[Clash]:
        found = []
        if (self.layout == "list") != (self.file is not None):
            text = "data.classes.file goes with layout: list, which needs it"
            found.append(Clash(text, "data.classes.file", "data.classes.layout"))
        if self.only is not None and self.number is not None:
            text = "data.classes.only names the classes and number draws them; leave one out"
            found.append(Clash(text, "data.classes.only", "data.classes.number"))
        if self.only is not None and len(set(self.only)) < 2:
            found.append(Clash("data.classes.only needs two different classes or more", "data.classes.only"))
        return found


class CocoQa(Section):
    """COCO-QA as released: train/ and test/ with questions.txt, answers.txt, img_ids.txt and types.txt."""

    folder: str = Field("cocoqa", description="where train/ and test/ lie, below data.root or absolute")
    questions: PositiveInt | None = Field(None, description="test questions drawn; null: all")
    seed: int = Field(0, description="another seed draws other questions")


class _ProbeData(Data):
    def clashes(self) -> list[Clash]:
        return []  # told by `Evaluate`, which knows the name of the probe

    def faults(self) -> list[Clash]:
        return super().clashes()


class ClassData(_ProbeData):
    source: Literal["classes"] = Field("classes", description="labelled pictures")
    classes: Classes = Classes()

    def faults(self) -> list[Clash]:
        limited = "data.eval_limit would keep the first classes; draw some by data.classes.number"
        clash = Clash(limited, "data.eval_limit", "data.classes.number")
        return super().faults() + ([clash] if self.eval_limit else [])


class CocoQaData(_ProbeData):
    source: Literal["cocoqa"] = Field("cocoqa", description="COCO-QA")
    layout: Literal["coco"] = Field("coco", description="pictures may have their names of 2014 or of 2017")
    cocoqa: CocoQa = CocoQa()

    def faults(self) -> list[Clash]:
        limited = "data.eval_limit would keep the first pictures; draw questions by data.cocoqa.questions"
        clash = Clash(limited, "data.eval_limit", "data.cocoqa.questions")
        return super().faults() + ([clash] if self.eval_limit else [])


class PairData(_ProbeData):
    """Anything that `rmdd ingest` reads."""


class ZeroShot(Section):
    """Classification by the nearest class: the mean of its prompts."""

    kind: Literal["zero_shot"] = Field("zero_shot", description="classification")
    data: ClassData
    templates: str | tuple[str, ...] = Field(
        "single",
        description="single, seven, cifar, imagenet, a file with a template per line, or a list; {} is the class",
    )
    caption_rule: bool = Field(True, description="put prompts through data.captions, as captions are")
    ks: Ks = Field((1, 5, 10), description="ACC@K for those below the number of classes")


class Vqa(Section):
    """COCO-QA as retrieval: a sentence per candidate answer, ranked by its cosine with the picture."""

    kind: Literal["vqa"] = Field("vqa", description="questions about pictures")
    data: CocoQaData
    template: str = Field("Question: {question} Answer: {answer}.", description="the sentence")
    question_mark: bool = Field(False, description="end questions with ` ?`; the files have none")
    caption_rule: bool = Field(
        False, description="put sentences through data.captions, which takes colons and full stop away"
    )
    ks: Ks = Field((1, 5, 10), description="ACC@K")

    def clashes(self) -> list[Clash]:
        missing = [word for word in ("{question}", "{answer}") if word not in self.template]
        text = f"template of a vqa probe lacks {' and '.join(missing)}, found {self.template!r}"
        return [Clash(text, "template")] if missing else []


class Retrieval(Section):
    """Retrieval on another dataset: TextCaps, CC3M, or any that can be ingested."""

    kind: Literal["retrieval"] = Field("retrieval", description="retrieval elsewhere")
    data: PairData = Field(description="any source of the section data")
    split: Literal["train", "val", "test"] = Field("test", description="the gallery")


Probe = Annotated[ZeroShot | Vqa | Retrieval, Field(discriminator="kind")]


def with_paths(probe: Probe, place: Callable[[str], str]) -> Probe:
    """The probe with every path as `place` gives it."""
    root = probe.data.root
    if root is not None:
        probe = probe.model_copy(update={"data": probe.data.model_copy(update={"root": place(root)})})
    if isinstance(probe, ZeroShot) and isinstance(probe.templates, str) and probe.templates not in TEMPLATES:
        probe = probe.model_copy(update={"templates": place(probe.templates)})
    return probe


def prefix_data_fields(name: str, message: str) -> str:
    """A message about a probe's own `data`, as one about the run."""
    where = f"evaluate.probes.{name}"
    fields = "|".join({**ClassData.model_fields, **CocoQaData.model_fields})
    return f"{where}: " + re.sub(rf"(?<![\w./])data\.(?=({fields})\b)", f"{where}.data.", message)


def clashes(probes: dict[str, Any]) -> list[Clash]:
    """What is wrong with probes by themselves."""
    found = [
        Clash(f"evaluate.probes: '{name}' is no name; use letters, digits, - and _", "evaluate.probes", name)
        for name in probes
        if not NAME.fullmatch(name)
    ]
    return found + [
        Clash(prefix_data_fields(name, clash), "evaluate.probes", name, *clash.fields)
        for name, probe in probes.items()
        for clash in probe.data.faults()
    ]


def view_clashes(probes: dict[str, Any], data: Data) -> list[Clash]:
    """Settings of probes on how pictures and captions are seen that are not the run's."""
    usual = Data()
    return [
        Clash(
            f"evaluate.probes.{name}.data.{field} is {getattr(probe.data, field)!r}, but a probe sees through the "
            f"run's data.{field}; leave it out",
            *("evaluate.probes", name, f"data.{field}", *(Captions.model_fields if field == "captions" else ())),
        )
        for name, probe in probes.items()
        for field in VIEW
        if getattr(probe.data, field) not in (getattr(usual, field), getattr(data, field))
    ]
