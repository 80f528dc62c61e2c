"""Pretrained CLIP models, which turn images and captions into features of one common space.

The image processor saved with a model resizes and crops the images, without augmentation. Captions are cleaned by the
default caption rules (lower case, no punctuation, at most 30 words). Features are not scaled to unit length, because
unCLIP decoders use the length of a feature vector. Shapes: n images or captions, D features of each.
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
    """Return the CLIP model that the setting `clip:NAME` selects; `name` is a hub id or a folder."""
    return PretrainedModel.of("clip", name, files=FILES, option=option)


def projection_width(folder: Path) -> int:
    """Return D: the number of features that the CLIP model in `folder` computes for an image or a caption."""
    return int(read_json(folder / "config.json")["projection_dim"])


class Clip:
    """A CLIP model in float32, with its image processor and tokenizer."""

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
    """Return the features in `output` as float32; transformers 5 and later wrap features in an object."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
