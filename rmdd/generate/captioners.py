"""Captions for generated images, written by a captioning model of transformers.

The answers of the model are cleaned like the captions of the dataset. Empty and repeated answers are dropped, and the
model is called again. If captions are still missing after the last try, captions of the dataset replace them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from rmdd.config import Captions
from rmdd.core.files import read_json, write_json
from rmdd.core.seeding import derive
from rmdd.core.threads import torch_threads
from rmdd.data.captions import clean
from rmdd.execution.tasks import Values
from rmdd.generate.decode import Precision
from rmdd.models.pretrained import quiet

Backend = Literal["blip", "llava"]
PROMPTS = {
    "blip": "",
    "llava": "Describe this picture in one short sentence that does not begin with the words 'the image'.",
}
DEFAULT_IDS = {"blip": "Salesforce/blip-image-captioning-large", "llava": "llava-hf/llava-1.5-7b-hf"}

_SPACE = re.compile(r"\s+")


@runtime_checkable
class Captioner(Protocol):
    def describe(self, image: Image.Image, count: int, seed: int) -> list[str]:
        """Return about `count` captions of an image, as the model wrote them; equal seeds give equal captions."""
        ...


class PretrainedCaptioner:
    """A captioner that runs BLIP or LLaVA from `folder` and samples the captions of an image with a given seed."""

    def __init__(
        self, backend: Backend, folder: Path, device: torch.device, *, prompt: str, tokens: int, dtype: Precision
    ):
        import transformers

        self.device = device if torch.cuda.is_available() else torch.device("cpu")
        kind: Any = {
            "blip": transformers.BlipForConditionalGeneration,
            "llava": transformers.LlavaForConditionalGeneration,
        }[backend]
        with quiet("transformers", "diffusers"):
            self.processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self.model = model.to(self.device).eval()
        self.text = f"USER: <image>\n{prompt} ASSISTANT:" if backend == "llava" else prompt or None
        self.prompt, self.tokens, self.backend = prompt, tokens, backend

    def describe(self, image: Image.Image, count: int, seed: int) -> list[str]:
        content = {"images": [image]} | ({"text": [self.text]} if self.text else {})
        inputs = self.processor(**content, return_tensors="pt").to(self.device, self.model.dtype)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs, do_sample=True, num_return_sequences=count, max_new_tokens=self.tokens
                )
        if self.backend == "llava":
            out = out[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(out, skip_special_tokens=True)
        return [answer.removeprefix(self.prompt.lower()) for answer in answers] if self.backend == "blip" else answers


@dataclass(frozen=True)
class FurtherCaptions:
    """The captions of a generated image except its first one, and the origin of each."""

    captions: list[str]
    sources: list[str]
    """Origin of each caption: `captioner` (written by the model) or `real` (taken from the dataset)."""
    refused: int
    """Number of answers of the captioner that were dropped because they were empty or repeated a caption."""


def further_captions(
    ask: Callable[[int, int], Iterable[str]],
    count: int,
    first: str,
    real: Sequence[str],
    rule: Captions,
    tries: int,
) -> FurtherCaptions:
    """Collect `count` captions that differ from `first` and from each other.

    Answers of `ask(wanted, attempt)` come first, then captions of `real`. Raises `ValueError` if they are too few.
    """
    captions: list[str] = []
    refused = 0
    for attempt in range(tries):
        if len(captions) == count:
            break
        for answer in ask(count - len(captions), attempt):
            caption = clean_answer(answer, rule)
            if len(captions) == count:
                break
            if not caption or caption in (first, *captions):
                refused += 1
            else:
                captions.append(caption)
    answered = len(captions)
    for caption in real:
        if len(captions) < count and caption not in (first, *captions):
            captions.append(caption)
    if len(captions) < count:
        raise ValueError(
            f"an image with caption {first!r} needs {count} more captions, but the captioner and {len(real)} captions "
            f"of the dataset gave only {len(captions)}; lower distill.options.captions_per_image"
        )
    return FurtherCaptions(captions, ["captioner"] * answered + ["real"] * (count - answered), refused)


def clean_answer(answer: str, rule: Captions) -> str:
    """Join the lines of a captioner's answer and clean the answer by `rule`; the result may be empty."""
    return clean(_SPACE.sub(" ", answer).strip().strip("\"'").strip(), rule)


class CaptionWriter:
    """A worker that captions one image per call and writes the captions as JSON to the file `item["out"]`."""

    def __init__(self, make: Callable[[], Captioner], rule: Captions, seed: int, tries: int, threads: int):
        self.rule, self.seed, self.tries, self.threads = rule, seed, tries, threads
        self.captioner = make()

    def __call__(self, item: Values) -> Values:
        def ask(wanted: int, attempt: int) -> list[str]:
            seed = derive(self.seed, "captioner", item["index"], attempt)
            return self.captioner.describe(image, wanted, seed)

        with torch_threads(self.threads):
            with Image.open(item["picture"]) as opened:
                image = opened.convert("RGB")
            further = further_captions(ask, item["count"], item["caption"], item["real"], self.rule, self.tries)
        write_json(Path(item["out"]), {"key": item["key"], **vars(further)})
        return {"captions": len(further.captions)}


def saved_captions(path: Path, key: str) -> FurtherCaptions | None:
    """Read the captions that an earlier run wrote to `path`; None if the file is absent or has a different `key`."""
    if not path.is_file():
        return None
    value = read_json(path)
    return FurtherCaptions(value["captions"], value["sources"], value["refused"]) if value["key"] == key else None


def stand_ins(captions: Sequence[str], texts: np.ndarray, record: int, count: int, image_of: np.ndarray) -> list[str]:
    """Choose captions of the dataset to replace missing answers of a captioner. Captions of the image of caption
    `record` come first. The captions whose embeddings have the highest cosines with that of caption `record` follow.

    `texts` (T,F) are the embeddings of `captions`. More than `count` captions are returned, because some may be equal.
    """
    same_image = np.flatnonzero(image_of == image_of[record])[: count + 1]
    of_image = [captions[int(r)] for r in same_image if int(r) != record]
    score = _cosines(texts, np.asarray(texts[record], dtype=np.float32))
    score[record] = -np.inf
    order = np.argsort(-score, kind="stable")[: min(len(score), 8 * (count + 1))]
    others = list(dict.fromkeys(captions[int(r)] for r in order if captions[int(r)] != captions[record]))
    return [*of_image, *others[: count + len(of_image)]]


def _cosines(rows: np.ndarray, vector: np.ndarray, chunk: int = 65_536) -> np.ndarray:
    """Return the cosine between `vector` and each row of `rows`; at most `chunk` rows are in memory at a time."""
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), chunk):
        block = np.asarray(rows[start : start + chunk], dtype=np.float32)
        size = np.maximum(np.linalg.norm(block, axis=1) * np.linalg.norm(vector), 1e-12)
        cosines[start : start + chunk] = block @ vector / size
    return cosines
