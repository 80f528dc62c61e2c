"""Pretrained CLIP models: projected features of images and captions.

Images are preprocessed by the model's own processor (resize and centre crop, no augmentation). Captions are cleaned as
published (lower case, no punctuation, at most 30 words). Features are not normalised, because unCLIP decoders use their
length. n rows, D projection width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from rmdd.config import Captions
from rmdd.core.files import read_json
from rmdd.data.captions import clean
from rmdd.models.pretrained import PretrainedModel, quiet

FILES = ("preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.json")


def clip_part(name: str, option: str = "") -> PretrainedModel:
    """Describe the CLIP model of an encoder `clip:NAME`."""
    return PretrainedModel.of("clip", name, files=FILES, option=option)


def projection_width(folder: Path) -> int:
    """Return D of the CLIP model in `folder`."""
    return int(read_json(folder / "config.json")["projection_dim"])


class Clip:
    """A CLIP model with its processor, in float32."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPModel, CLIPProcessor

        self.device = device if torch.cuda.is_available() else torch.device("cpu")
        with quiet("transformers"):
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


def _projected(output: Any) -> Tensor:
    """Return the projected features as float32; since version 5, transformers wraps them in an output object."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
