"""Captions of drawn pictures: images to strings, by a captioner of transformers, and what is made of its answers.

Answers are stripped, cleaned as the run cleans captions, and refused when empty or repeated; a captioner is asked
again, and at last a real caption stands in.
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
        """Some captions of a picture as the model gives them; about `count`, the same for the same seed."""
        ...


class PretrainedCaptioner:
    """BLIP or LLaVA from a folder; answers are sampled under a seed of their own."""

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
        return [one.removeprefix(self.prompt.lower()) for one in answers] if self.backend == "blip" else answers


@dataclass(frozen=True)
class FurtherCaptions:
    """The further captions of a picture, and where each came from."""

    captions: list[str]
    sources: list[str]
    """`captioner` or `real`, one per caption."""
    refused: int
    """Answers that were empty or repeated."""


def further_captions(
    ask: Callable[[int, int], Iterable[str]],
    count: int,
    first: str,
    real: Sequence[str],
    rule: Captions,
    tries: int,
) -> FurtherCaptions:
    """`count` captions beside `first`, all different: answers of `ask(wanted, attempt)`, then real ones in their order.

    Raises `ValueError` when the real ones do not suffice either.
    """
    captions: list[str] = []
    refused = 0
    for attempt in range(tries):
        if len(captions) == count:
            break
        for answer in ask(count - len(captions), attempt):
            caption = tidied(answer, rule)
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
            f"a picture of {first!r} needs {count} more captions, and the captioner and {len(real)} real ones gave "
            f"{len(captions)}; lower distill.options.captions_per_image"
        )
    return FurtherCaptions(captions, ["captioner"] * answered + ["real"] * (count - answered), refused)


def tidied(answer: str, rule: Captions) -> str:
    """An answer on one line, as the run's captions are; may be empty."""
    return clean(_SPACE.sub(" ", answer).strip().strip("\"'").strip(), rule)


class CaptionWriter:
    """A captioner at work: a picture's path in, a JSON of its further captions beside it out."""

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
    """What was gathered before, for the same picture, caption and captioner."""
    if not path.is_file():
        return None
    value = read_json(path)
    return FurtherCaptions(value["captions"], value["sources"], value["refused"]) if value["key"] == key else None


def stand_ins(captions: Sequence[str], texts: np.ndarray, record: int, count: int, image_of: np.ndarray) -> list[str]:
    """Real captions to stand in beside that of `record`: those of its own picture, then the nearest of others.

    `texts` (T,F) are the captions' embeddings. At most `count` of each kind.
    """
    own = [captions[int(r)] for r in np.flatnonzero(image_of == image_of[record])[: count + 1] if int(r) != record]
    here = np.asarray(texts[record], dtype=np.float32)
    score = _cosines(texts, here)
    score[record] = -np.inf
    few = min(len(score), 8 * (count + 1))
    order = np.argsort(-score, kind="stable")[:few]
    others = list(dict.fromkeys(captions[int(r)] for r in order if captions[int(r)] != captions[record]))
    return [*own, *others[: count + len(own)]]


def _cosines(rows: np.ndarray, one: np.ndarray, chunk: int = 65_536) -> np.ndarray:
    """Of every row with one vector, a chunk of rows at a time."""
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), chunk):
        block = np.asarray(rows[start : start + chunk], dtype=np.float32)
        size = np.maximum(np.linalg.norm(block, axis=1) * np.linalg.norm(one), 1e-12)
        cosines[start : start + chunk] = block @ one / size
    return cosines
