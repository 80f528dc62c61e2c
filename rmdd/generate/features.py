"""CLIP at work: images and captions of a split to projected features of raw scale, block by block.

Images go through the processor of the CLIP itself (resize and centre crop, no augmentation), each once however many
captions it has; captions are cleaned as published (lower case, no punctuation, 30 words at most). Nothing is brought
to unit length: unCLIP decoders read the length too. n rows of a block, D projection width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from rmdd.config import Captions
from rmdd.core.device import device_of
from rmdd.core.files import read_json
from rmdd.coresets.features import BLOCK, save_block
from rmdd.data.captions import clean
from rmdd.data.decode import decode
from rmdd.data.splits import read_rows
from rmdd.execution.tasks import Values
from rmdd.generate.decode import quiet
from rmdd.generate.parts import Part
from rmdd.runs.tasks import Item, prepared_split

BATCH = 64
FILES = ("preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.json")


def part_of(name: str, option: str = "") -> Part:
    """The CLIP that an encoder `clip:NAME` names."""
    return Part.of("clip", name, files=FILES, option=option)


def width_of(folder: Path) -> int:
    """D of the CLIP in a folder."""
    return int(read_json(folder / "config.json")["projection_dim"])


class Clip:
    """A CLIP with its processor, in float32."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPModel, CLIPProcessor

        self.device = device if torch.cuda.is_available() else torch.device("cpu")
        with quiet():
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)
            self.processor: Any = CLIPProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Float32[Tensor, "n D"]:
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _projected(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Float32[Tensor, "n D"]:
        cleaned = [clean(caption, Captions()) for caption in captions]
        tokens = self.processor.tokenizer(cleaned, padding=True, truncation=True, max_length=77, return_tensors="pt")
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return _projected(self.model.get_text_features(**inputs))


class ClipBlocks:
    """Numbers of blocks of one side to files of rows. The CLIP is loaded once."""

    def __init__(self, item: Item, place: Path, folder: Path, side: Literal["image", "text"]):
        self.split, self.folder, self.side = prepared_split(item, "train").split, folder, side
        self.data, self.threads = item.run.data, item.run.runtime.threads
        self.clip = Clip(place, device_of(item.run.runtime))

    def __call__(self, values: Values) -> Values:
        first = values["block"] * BLOCK
        ids = np.arange(first, min(first + BLOCK, len(self.split if self.side == "image" else self.split.captions)))
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            rows = np.concatenate([self._rows(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)])
        finally:
            torch.set_num_threads(before)
        if not np.isfinite(rows).all():
            bad = int(ids[~np.isfinite(rows).all(axis=1)][0])
            raise ValueError(
                f"the CLIP gives numbers that are not finite for {self.side} {bad}; its weights are broken"
            )
        save_block(self.folder, values["block"], ids, rows)
        return {"rows": len(ids)}

    def _rows(self, ids: np.ndarray) -> Float32[np.ndarray, "n D"]:
        if self.side == "text":
            return self.clip.captions([self.split.captions[i] for i in ids]).cpu().numpy()
        rule = {name: getattr(self.data, name) for name in ("max_pixels", "background", "exif_orientation")}
        encoded = dict(read_rows(self.split.dataset, "train", self.split.rows[ids]))
        return self.clip.images([decode(encoded[int(row)], **rule) for row in self.split.rows[ids]]).cpu().numpy()


def _projected(found: Any) -> Tensor:
    """The projected features, which transformers wraps since version 5."""
    return (found if isinstance(found, Tensor) else found.pooler_output).float()
