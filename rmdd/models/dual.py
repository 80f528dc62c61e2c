"""The dual encoder: image tower, trainable projections, and a scaled cosine between the two sides.

B pairs in a batch, F text feature width, D joint width, H W image size. The text tower is frozen, so texts
arrive as its embeddings.
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
    """The papers' projection: two linear layers, GELU, dropout, a skip from the first, LayerNorm."""

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
    """Scores B images against B text embeddings: `forward` gives the (B, B) cosines over the temperature."""

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
        """The same heads on images given as the tower's features; parameters are shared and keep their names."""
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
        """`mixing` changes what the encoders give, on both sides, before the projections."""
        features = self.image_tower(images)
        if mixing is not None:
            features, texts = mixing(features), mixing(texts)
        return self.scores(F.normalize(self.image_head(features), dim=1), self.embed_texts(texts))

    def scores(self, u: Float[Tensor, "M D"], v: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
        """Cosines of embedded images and texts over the temperature."""
        with _full_precision(u.device.type):
            return _at_least_float32(u) @ _at_least_float32(v).T / self.temperature

    def trained(self) -> Params:
        """The parameters that are trained and matched, detached, in registration order."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, params: Mapping[str, Tensor]) -> None:
        """Copy `params` in; raises `ValueError` when names or shapes differ."""
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        check_same_shapes({n: tuple(p.shape) for n, p in own.items()}, {n: tuple(p.shape) for n, p in params.items()})
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(params[name])


def _full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Scores are compared in float32 also under autocast, which the meta device does not know."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def tower_of(name: str) -> str:
    """Which side a parameter belongs to: `image` or `text`."""
    return "text" if name.startswith("text_head.") else "image"


def check_same_shapes(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless both list the same parameters, in the same order, with the same shapes."""
    if list(ours.items()) == list(theirs.items()):
        return
    missing = [n for n in ours if n not in theirs][:3]
    extra = [n for n in theirs if n not in ours][:3]
    other = [f"{n} {tuple(theirs[n])} for {tuple(ours[n])}" for n in ours if n in theirs and ours[n] != theirs[n]][:3]
    raise ValueError(
        "these parameters belong to another model: "
        f"missing {missing}, unexpected {extra}, other shapes {other or 'none (another order)'}; "
        "use the model section that they were trained with"
    )


def build(model: config.Model, text_width: int, image_size: int, seed: int, who: str, index: int = 0) -> DualEncoder:
    """A fresh dual encoder. `who` and `index` name the draw: every expert and student has heads of its own.

    A pretrained or local tower, and one of `random:SEED`, starts the same for everyone; a random one is drawn anew,
    like the heads.
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
