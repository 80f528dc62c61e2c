"""The dual encoder: an image tower, and projections of images and texts into one space (the joint space).

The score of an image and a text is the cosine of their projections, divided by the temperature. The text tower is
frozen, so the model takes text embeddings instead of captions. Shapes: B pairs, F features of a text, D features in the
joint space, H x W pixels.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rmdd import config
from rmdd.core.seeding import derive, generator
from rmdd.models.image import build_image_tower

Params = dict[str, Tensor]
TOWERS = ("image", "text")


class Block(nn.Module):
    """A projection of kind `block`: LayerNorm(dropout(linear(GELU(h))) + h), where h = linear(x)."""

    def __init__(self, inputs: int, width: int, dropout: float):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B inputs"]) -> Float[Tensor, "B D"]:
        h = self.first(x)
        return self.norm(self.dropout(self.second(F.gelu(h))) + h)


def _projection(kind: str, inputs: int, width: int, dropout: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.Linear(inputs, width) if kind == "linear" else Block(inputs, width, dropout)


class DualEncoder(nn.Module):
    """A dual encoder: `forward` returns the (B, B) scores (cosine / temperature) of B images and B text embeddings."""

    def __init__(self, image_tower: nn.Module, image_head: nn.Module, text_head: nn.Module, temperature: float):
        super().__init__()
        self.image_tower = image_tower
        self.image_head = image_head
        self.text_head = text_head
        self.temperature = temperature

    def train(self, mode: bool = True) -> "DualEncoder":
        super().train(mode)
        if not any(p.requires_grad for p in self.image_tower.parameters()):
            self.image_tower.eval()
        return self

    def on_features(self) -> "DualEncoder":
        """Return a dual encoder that takes image features instead of images.

        Both encoders use the same projection parameters (not copies), under the same names.
        """
        return DualEncoder(nn.Identity(), self.image_head, self.text_head, self.temperature).train(self.training)

    def embed_images(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.image_head(self.image_tower(images)), dim=1)

    def embed_texts(self, texts: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.text_head(texts), dim=1)

    def forward(
        self,
        images: Float[Tensor, " B *image"],
        texts: Float[Tensor, "B F"],
        mixing: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "B B"]:
        """Return the score of every image with every text; `mixing` changes the features before projection."""
        features = self.image_tower(images)
        if mixing is not None:
            features, texts = mixing(features), mixing(texts)
        return self.scores(F.normalize(self.image_head(features), dim=1), self.embed_texts(texts))

    def scores(self, u: Float[Tensor, "M D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
        """Return cosine / temperature of image embeddings `u` and text embeddings `v`."""
        with _full_precision(u.device.type):
            return _at_least_float32(u) @ _at_least_float32(v).T / self.temperature

    def trained(self) -> Params:
        """Return the trainable parameters by name, detached from autograd, in registration order."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, params: Mapping[str, Tensor]) -> None:
        """Copy `params` into the trainable parameters. Raises `ValueError` if their names, order or shapes differ."""
        trainable = {name: p for name, p in self.named_parameters() if p.requires_grad}
        shapes = {n: tuple(p.shape) for n, p in trainable.items()}
        check_same_shapes(shapes, {n: tuple(p.shape) for n, p in params.items()})
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(params[name])


def _full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context that disables autocast, so that scores are float32; on the meta device it does nothing."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def tower_of(name: str) -> str:
    """Return the modality of the parameter called `name`: `image` or `text`."""
    return "text" if name.startswith("text_head.") else "image"


def check_same_shapes(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless `actual` and `expected` have the same parameter names and shapes, in the same order."""
    if list(expected.items()) == list(actual.items()):
        return
    missing = [n for n in expected if n not in actual][:3]
    extra = [n for n in actual if n not in expected][:3]
    common = [n for n in expected if n in actual and expected[n] != actual[n]][:3]
    differing = [f"{n} {tuple(actual[n])} instead of {tuple(expected[n])}" for n in common]
    differences = {"missing": missing, "unexpected": extra, "different shapes": differing}
    reasons = [f"{kind} {names}" for kind, names in differences.items() if names]
    raise ValueError(
        f"these parameters belong to another model: {', '.join(reasons) or 'the same parameters in another order'}; "
        "use the section `model` of the run file with which they were trained"
    )


def build(model: config.Model, text_width: int, image_size: int, seed: int, who: str, index: int = 0) -> DualEncoder:
    """Build a dual encoder with newly initialised projections.

    `who` (such as `expert` or `student`) and `index` select the random numbers, so each expert and each student starts
    with different projections. Image towers with weights `random` also differ. With all other weights (`pretrained`, a
    file, `random:SEED`), all experts and students start with the same image tower.
    """
    tower = build_image_tower(model.image, generator(seed, f"{who} tower", index), image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, f"{who} heads", index))
        features = int(tower.width)  # type: ignore[arg-type]
        joint = features if model.image.projection == "none" else model.width or features
        image_head = _projection(model.image.projection, features, joint, model.dropout)
        text_head = _projection(model.text.projection, text_width, joint, model.dropout)
    if not model.image.trainable:
        tower.requires_grad_(False)
    return DualEncoder(tower, image_head, text_head, model.temperature)
