"""Pictures by a text-conditioned Stable Diffusion: from captions alone, from a latent, or near a latent.

A picture that comes out as one colour, as a safety checker leaves it, is drawn again by the next seed. B pictures of
a block, C h w a latent.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from rmdd.config.numbers import NonNegativeFloat, PositiveInt
from rmdd.config.runfile import Section
from rmdd.core.files import read_json
from rmdd.core.seeding import generator
from rmdd.generate.decode import Offload, Precision, Request, pictures, placed
from rmdd.generate.diffusion import Diffusion, grid_of
from rmdd.generate.guidance import guided, scheduler_for, text_denoiser
from rmdd.generate.tuning import read_tuned, use_tuned
from rmdd.models.pretrained import PretrainedModel, quiet

_logger = logging.getLogger(__name__)


class Sampling(Section):
    """How pictures are drawn."""

    steps: PositiveInt = Field(50, description="denoising steps")
    guidance: NonNegativeFloat = Field(7.5, description="scale of classifier-free guidance; at most 1: without")
    size: PositiveInt = Field(
        512, multiple_of=8, description="side of the pictures as drawn; the set has data.image_size"
    )
    batch: PositiveInt = Field(
        1, description="pictures that are drawn together; above 1 their last bits depend on how many"
    )
    dtype: Precision = Field("float32", description="of the whole pipeline while it draws")
    offload: Offload = Field("none", description="keep parts of the pipeline in main memory until they are needed")
    redraws: int = Field(3, ge=0, description="further seeds for a picture that comes out as one colour")


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32, kind: str = "StableDiffusion") -> Any:
    """`<kind>Pipeline` of a folder, without a safety checker: what that blacks out would enter the set."""
    import diffusers

    with quiet("transformers", "diffusers"):
        loaded = getattr(diffusers, f"{kind}Pipeline").from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generator_part(name: str) -> PretrainedModel:
    needs = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return PretrainedModel.of("generator", name, "diffusers", needs, option="distill.options.generator: FOLDER")


def diffusion_of(folder: Path, device: torch.device) -> Diffusion:
    """The pipeline of a folder in parts, float32, on a device that is there."""
    return Diffusion(load_pipeline(folder).to(device if torch.cuda.is_available() else "cpu"))


def latent_shape(folder: Path, size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of the latents of pictures of side `size`, by the pipeline in `folder`."""
    vae = read_json(folder / "vae" / "config.json")
    rows, columns = grid_of(len(vae["block_out_channels"]), size)
    return int(vae["latent_channels"]), rows, columns


def cut_captions(folder: Path, captions: Sequence[str]) -> int:
    """How many captions are longer than the text encoder of the pipeline in `folder` reads."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(list(captions), verbose=False).input_ids)


class FromCaption:
    """A decoder of captions; `tuned` is the folder of a fine-tuning of its UNet (see `rmdd.generate.tuning`)."""

    kind = "StableDiffusion"

    def __init__(self, folder: Path, device: torch.device, rule: Sampling, tuned: Path | None = None, prefix: str = ""):
        self.rule, self.prefix, self.dtype = rule, prefix, getattr(torch, rule.dtype)
        self.pipeline = load_pipeline(folder, self.dtype, self.kind)
        if tuned is not None:
            use_tuned(self.pipeline.unet, read_tuned(tuned))
        self.device = placed(self.pipeline, device, rule.offload)

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        """Raises `ValueError` for a picture that stays of one colour, or is not finite."""
        pictures = self._drawn(requests, 0)
        for position, request in enumerate(requests):
            for attempt in range(1, self.rule.redraws + 1):
                if not is_plain(pictures[position]):
                    break
                _logger.warning("the picture of pair %d has one colour; drawn again, try %d", request["index"], attempt)
                pictures[position] = self._drawn([request], attempt)[0]
                pictures[position].info["redrawn"] = attempt
        return pictures

    def _drawn(self, requests: Sequence[Request], attempt: int) -> list[Image.Image]:
        what = f"picture {attempt}" if attempt else "picture"
        return pictures(requests, self._images(requests, [_random_of(r, what) for r in requests]))

    def _prompts(self, requests: Sequence[Request]) -> list[str]:
        return [self.prefix + r["caption"] for r in requests]

    def _images(self, requests: Sequence[Request], randoms: list[torch.Generator]) -> np.ndarray:
        rule = self.rule
        output = self.pipeline(
            prompt=self._prompts(requests),
            height=rule.size,
            width=rule.size,
            num_inference_steps=rule.steps,
            guidance_scale=rule.guidance,
            generator=randoms,
            output_type="np",
        )
        return output.images


class FromLatent(FromCaption):
    """Image-to-image: the row `mode` of a pair, a scaled latent, noised to `strength` and denoised with the caption."""

    kind = "StableDiffusionImg2Img"

    def __init__(self, folder: Path, device: torch.device, rule: Sampling, strength: float):
        super().__init__(folder, device, rule)
        self.strength = strength

    def _images(self, requests: Sequence[Request], randoms: list[torch.Generator]) -> np.ndarray:
        output = self.pipeline(
            prompt=self._prompts(requests),
            image=modes_of(requests).to(self.device, self.dtype),
            strength=self.strength,
            num_inference_steps=self.rule.steps,
            guidance_scale=self.rule.guidance,
            generator=randoms,
            output_type="np",
        )
        return output.images


class NearLatent(FromCaption):
    """Mode guidance: from noise, with the caption, pulled to the row `mode` of a pair; see `rmdd.generate.guidance`."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        rule: Sampling,
        scheduler: Literal["ddpm", "ddim"],
        strength: float,
        stop: int,
        eta: float,
    ):
        super().__init__(folder, device, rule)
        self.scheduler = scheduler_for(scheduler, self.pipeline.scheduler.config)
        self.options: dict[str, Any] = {"strength": strength, "stop": stop, "eta": eta}

    def _images(self, requests: Sequence[Request], randoms: list[torch.Generator]) -> np.ndarray:
        pipeline, modes = self.pipeline, modes_of(requests).to(self.device, self.dtype)
        start = torch.cat([torch.randn((1, *modes.shape[1:]), generator=random) for random in randoms])
        texts, empty = pipeline.encode_prompt(
            self._prompts(requests), self.device, 1, self.rule.guidance > 1, [""] * len(requests)
        )
        x = guided(
            text_denoiser(pipeline.unet, texts, empty, self.rule.guidance),
            self.scheduler,
            start.to(modes),
            modes,
            steps=self.rule.steps,
            generators=randoms,
            **self.options,
        )
        images = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pipeline.maybe_free_model_hooks()
        return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _random_of(request: Request, what: str) -> torch.Generator:
    """Of a picture, by its number among those of all phases, which would else begin from the same noise."""
    return generator(request["seed"], what, request["number"])


def modes_of(requests: Sequence[Request]) -> Float[Tensor, "B C h w"]:
    return torch.stack([r["mode"] for r in requests]).float()


def is_plain(image: Image.Image) -> bool:
    """Whether it has one colour."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())
