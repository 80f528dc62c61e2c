"""Probes: further tests of the trained students (classification, question answering, retrieval on other data).

A probe has its own dataset, in the field `data`, but its images and captions are preprocessed as in the run (`VIEW`).
Probes are not hashed, and no choice of a run depends on them.
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
"""Fields of `data` whose values a probe takes from the run."""

TEMPLATES = ("single", "seven", "cifar", "imagenet")
"""Names of the built-in sets of prompt templates."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Ks = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Classes(Section):
    """Labelled images of a `zero_shot` probe. Classes are drawn by a hash of the seed and the class name, so that a
    smaller draw is part of a larger one."""

    layout: Literal["folders", "list", "cifar10", "cifar100"] = Field(
        "folders", description="labels: a folder per class, a list of files and classes, or CIFAR's binary test file"
    )
    images: str = Field("", description="folder of the images relative to data.root, such as val")
    file: str | None = Field(
        None, description="layout list: file below data.root with lines FILE CLASS, or Kaggle's LOC_val_solution.csv"
    )
    names: str | None = Field(
        None,
        description="file below data.root with class names: lines CLASS name, synonym, or a JSON object; null: "
        "the names of the folders",
    )
    synonyms: bool = Field(False, description="make prompts from all names of a class, not only from the first")
    number: Annotated[int, Field(ge=2)] | None = Field(
        None, description="number of classes, drawn at random; null: all"
    )
    seed: int = Field(0, description="random seed with which the classes are drawn")
    only: tuple[str, ...] | None = Field(None, description="names of the classes to use, instead of a draw")

    def clashes(self) -> list[Clash]:
        mistakes = []
        if (self.layout == "list") != (self.file is not None):
            text = "layout: list needs data.classes.file, and other layouts do not; set or remove data.classes.file"
            mistakes.append(Clash(text, "data.classes.file", "data.classes.layout"))
        if self.only is not None and self.number is not None:
            text = "data.classes.only and data.classes.number exclude each other; remove one of them"
            mistakes.append(Clash(text, "data.classes.only", "data.classes.number"))
        if self.only is not None and len(set(self.only)) < 2:
            mistakes.append(Clash("data.classes.only needs at least two different classes", "data.classes.only"))
        return mistakes


class CocoQa(Section):
    """The COCO-QA dataset: folders train and test with questions.txt, answers.txt, img_ids.txt and types.txt."""

    folder: str = Field("cocoqa", description="folder that contains train and test: absolute, or relative to data.root")
    questions: PositiveInt | None = Field(None, description="number of test questions, drawn at random; null: all")
    seed: int = Field(0, description="random seed with which the questions are drawn")


class _ProbeData(Data):
    def clashes(self) -> list[Clash]:
        return []  # `Evaluate` reports clashes, because it knows the name of the probe

    def faults(self) -> list[Clash]:
        """Return the mistakes in this `data` section of a probe."""
        return super().clashes()


class ClassData(_ProbeData):
    """The data of a `zero_shot` probe."""

    source: Literal["classes"] = Field("classes", description="labelled images")
    classes: Classes = Classes()

    def faults(self) -> list[Clash]:
        limited = "data.eval_limit would keep only the first classes; set data.classes.number to draw some of them"
        clash = Clash(limited, "data.eval_limit", "data.classes.number")
        return super().faults() + ([clash] if self.eval_limit else [])


class CocoQaData(_ProbeData):
    """The data of a `vqa` probe."""

    source: Literal["cocoqa"] = Field("cocoqa", description="questions about COCO images")
    layout: Literal["coco"] = Field("coco", description="file names of the images: those of COCO 2014 or of 2017")
    cocoqa: CocoQa = CocoQa()

    def faults(self) -> list[Clash]:
        limited = "data.eval_limit would keep only the first images; set data.cocoqa.questions to draw questions"
        clash = Clash(limited, "data.eval_limit", "data.cocoqa.questions")
        return super().faults() + ([clash] if self.eval_limit else [])


class PairData(_ProbeData):
    """The data of a `retrieval` probe: any source that `rmdd ingest` reads."""


class ZeroShot(Section):
    """Zero-shot classification: an image gets the class whose mean prompt embedding is nearest."""

    kind: Literal["zero_shot"] = Field("zero_shot", description="zero-shot classification")
    data: ClassData
    templates: str | tuple[str, ...] = Field(
        "single",
        description="prompt templates: single, seven, cifar, imagenet, a file with one template per line, or a list; "
        "{} is replaced by the class name",
    )
    caption_rule: bool = Field(True, description="preprocess prompts like captions, as data.captions says")
    ks: Ks = Field((1, 5, 10), description="cut-offs K for which ACC@K is reported, if below the number of classes")


class Vqa(Section):
    """Question answering on COCO-QA: candidate answers, as sentences, are ranked by their cosine with the image."""

    kind: Literal["vqa"] = Field("vqa", description="visual question answering")
    data: CocoQaData
    template: str = Field(
        "Question: {question} Answer: {answer}.", description="sentence that is embedded for a question and an answer"
    )
    question_mark: bool = Field(False, description="add ` ?` to questions: those in COCO-QA's files have no such mark")
    caption_rule: bool = Field(
        False, description="preprocess sentences as data.captions says, which removes colons and full stops"
    )
    ks: Ks = Field((1, 5, 10), description="cut-offs K for which ACC@K (top-K accuracy in percent) is reported")

    def clashes(self) -> list[Clash]:
        missing = [word for word in ("{question}", "{answer}") if word not in self.template]
        text = f"the template of a vqa probe needs {' and '.join(missing)}, found {self.template!r}"
        return [Clash(text, "template")] if missing else []


class Retrieval(Section):
    """Image-text retrieval on a different dataset than the run's, such as TextCaps or CC3M."""

    kind: Literal["retrieval"] = Field("retrieval", description="retrieval on a different dataset")
    data: PairData = Field(description="the dataset, with the fields of the section data")
    split: Literal["train", "val", "test"] = Field("test", description="split on which retrieval is scored")


Probe = Annotated[ZeroShot | Vqa | Retrieval, Field(discriminator="kind")]


def with_paths(probe: Probe, convert: Callable[[str], str]) -> Probe:
    """Return a copy of the probe with each of its paths replaced by `convert(path)`."""
    root = probe.data.root
    if root is not None:
        probe = probe.model_copy(update={"data": probe.data.model_copy(update={"root": convert(root)})})
    if isinstance(probe, ZeroShot) and isinstance(probe.templates, str) and probe.templates not in TEMPLATES:
        probe = probe.model_copy(update={"templates": convert(probe.templates)})
    return probe


def prefix_data_fields(name: str, message: str) -> str:
    """Return `message` with `data.FIELD` written as `evaluate.probes.NAME.data.FIELD`, after the name of the probe.

    The checks of the section `data` name its fields as in a run; for a probe these fields are deeper in the file.
    """
    where = f"evaluate.probes.{name}"
    fields = "|".join({**ClassData.model_fields, **CocoQaData.model_fields})
    return f"{where}: " + re.sub(rf"(?<![\w./])data\.(?=({fields})\b)", f"{where}.data.", message)


def clashes(probes: dict[str, Any]) -> list[Clash]:
    """Return the mistakes in the names and in the `data` sections of the probes."""
    bad_names = [
        Clash(f"evaluate.probes: '{name}' is not a valid name; use letters, digits, - and _", "evaluate.probes", name)
        for name in probes
        if not NAME.fullmatch(name)
    ]
    return bad_names + [
        Clash(prefix_data_fields(name, clash), "evaluate.probes", name, *clash.fields)
        for name, probe in probes.items()
        for clash in probe.data.faults()
    ]


def view_clashes(probes: dict[str, Any], data: Data) -> list[Clash]:
    """Return an error message for each field of `VIEW` whose value in a probe differs from that in the run."""
    default = Data()
    return [
        Clash(
            f"evaluate.probes.{name}.data.{field} is {getattr(probe.data, field)!r}, but a probe uses "
            f"the run's data.{field}; remove the field from the probe",
            *("evaluate.probes", name, f"data.{field}", *(Captions.model_fields if field == "captions" else ())),
        )
        for name, probe in probes.items()
        for field in VIEW
        if getattr(probe.data, field) not in (getattr(default, field), getattr(data, field))
    ]
