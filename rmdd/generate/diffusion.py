"""Those parts of a text-conditioned latent diffusion model that fine-tuning and fusion use.

Shapes: B images of S x S pixels, latents of C channels and h x w positions, L text tokens, F features of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rmdd.generate.fusion import first_end, positions_after


@dataclass
class Texts:
    """Captions, encoded by the text encoder of a diffusion model."""

    tokens: Float[Tensor, "B L F"]
    pooled: Float[Tensor, "B F"]
    """Output of the text encoder for the first end-of-text token of each caption."""
    padding: Bool[Tensor, "B L"]
    """True for the tokens of each caption after its first end-of-text token."""


class Diffusion:
    """The frozen parts of a Stable Diffusion pipeline: VAE, UNet and text encoder."""

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
        """Return the rows and columns of the latent of an image of side `size`; raises the errors of `grid_of`."""
        return grid_of(len(self.vae.config.block_out_channels), size)

    def latents(
        self, pixels: Float[Tensor, "B 3 S S"], random: torch.Generator | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Encode images in [-1, 1] as unscaled latents.

        With a CPU generator `random`, latents are samples of the VAE's posterior; otherwise they are its mean.
        """
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        if random is None:
            return posterior.mean.float()
        noise = torch.randn(posterior.mean.shape, generator=random).to(posterior.mean.device)
        return posterior.mean.float() + posterior.std.float() * noise

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Decode unscaled latents to images, approximately in [-1, 1]."""
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Texts:
        """Encode captions, padded or truncated to the length that the text encoder reads."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.device)
        tokens = self.text_encoder(ids).last_hidden_state.float()
        ends = first_end(ids, int(self.tokenizer.eos_token_id))
        pooled = tokens[torch.arange(len(ids), device=ids.device), ends]
        return Texts(tokens, pooled, positions_after(ends, ids.shape[1]))


def grid_of(blocks: int, size: int) -> tuple[int, int]:
    """Return height and width of the latents that a VAE encoder with `blocks` blocks makes from images of side `size`.

    Raises `ValueError` if the image cannot be halved `blocks - 1` times.
    """
    factor = 2 ** (blocks - 1)
    if size % factor:
        raise ValueError(
            f"this model's encoder cannot halve images of side {size} {blocks - 1} times; set the image size in "
            f"distill.options to a multiple of {factor}"
        )
    return size // factor, size // factor


def as_signed(pictures: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Convert uint8 pixels to [-1, 1], the range that the VAE encoder expects."""
    return pictures.to(torch.float32) / 127.5 - 1
