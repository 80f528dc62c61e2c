"""A text-conditioned latent diffusion model taken apart: what training and fusing need of it.

B batch, S pixels on a side, C h w a latent, L text tokens, F text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rmdd.generate.fusion import after, first_end


@dataclass
class Texts:
    """Captions as a text encoder leaves them."""

    tokens: Float[Tensor, "B L F"]
    pooled: Float[Tensor, "B F"]
    """The state of the first end-of-text token."""
    padding: Bool[Tensor, "B L"]
    """True behind it."""


class Diffusion:
    """Frozen parts of a Stable Diffusion pipeline."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.vae, self.unet, self.text_encoder = pipeline.vae, pipeline.unet, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        for part in (self.vae, self.unet, self.text_encoder):
            part.requires_grad_(False).eval()
        self.scale = float(self.vae.config.scaling_factor)
        self.prediction = self.scheduler.config.prediction_type
        self.device = self.vae.device
        self.alpha_bar = self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def text_width(self) -> int:
        return int(self.text_encoder.config.hidden_size)

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of the latent of a picture. Raises `ValueError` for sizes the encoder cannot halve."""
        return grid_of(len(self.vae.config.block_out_channels), size)

    def latents(
        self, pixels: Float[Tensor, "B 3 S S"], random: torch.Generator | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Unscaled latents of pictures in [-1, 1]: a sample of the posterior by a CPU generator, its mean without."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        if random is None:
            return posterior.mean.float()
        noise = torch.randn(posterior.mean.shape, generator=random).to(posterior.mean.device)
        return posterior.mean.float() + posterior.std.float() * noise

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Pictures around [-1, 1] of unscaled latents."""
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Texts:
        """Captions padded to the length that the encoder reads, and cut where they are longer."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.device)
        tokens = self.text_encoder(ids).last_hidden_state.float()
        ends = first_end(ids, int(self.tokenizer.eos_token_id))
        pooled = tokens[torch.arange(len(ids), device=ids.device), ends]
        return Texts(tokens, pooled, after(ends, ids.shape[1]))


def grid_of(blocks: int, size: int) -> tuple[int, int]:
    """Rows and columns of a latent behind an encoder of so many blocks. Raises `ValueError` for other sizes."""
    factor = 2 ** (blocks - 1)
    if size % factor:
        raise ValueError(
            f"pictures of side {size} cannot be halved {blocks - 1} times by this model's encoder; give a multiple of "
            f"{factor} as the size in distill.options"
        )
    return size // factor, size // factor


def as_signed(pictures: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Pixels in [-1, 1], as the encoder expects them."""
    return pictures.to(torch.float32) / 127.5 - 1
