"""Stable Diffusion decoders: image generation from a caption, from a latent, or guided towards a latent.

An image of a single colour (such as the output of a safety checker) is generated again with the next seed. Shapes: B
images of a block, latents of C channels and h x w positions.
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
from rmdd.generate.decode import Offload, Precision, Request, move_to_device, pictures
from rmdd.generate.diffusion import Diffusion, grid_of
from rmdd.generate.guidance import guided, scheduler_for, text_denoiser
from rmdd.generate.tuning import read_tuned, use_tuned
from rmdd.models.pretrained import PretrainedModel, quiet

_logger = logging.getLogger(__name__)


class Sampling(Section):
    """Settings of image generation with Stable Diffusion."""

    steps: PositiveInt = Field(50, description="denoising steps")
    guidance: NonNegativeFloat = Field(7.5, description="scale of classifier-free guidance; 1 or less disables it")
    size: PositiveInt = Field(
        512, multiple_of=8, description="side in pixels of generated images; the distilled set gets data.image_size"
    )
    batch: PositiveInt = Field(
        1, description="number of images per forward pass; rounding errors in the pixels depend on this number"
    )
    dtype: Precision = Field("float32", description="floating-point type of the pipeline, weights and activations")
    offload: Offload = Field(
        "none",
        description="none: keep the pipeline on the GPU; model, sequential: keep its models or single layers in main "
        "memory until they are needed",
    )
    redraws: int = Field(3, ge=0, description="number of further seeds to try if an image has a single colour")


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32, kind: str = "StableDiffusion") -> Any:
    """Load `<kind>Pipeline` of diffusers, without the safety checker, which would turn some images black."""
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
    """Load the diffusion model in `folder` in float32, to `device` if the machine has a GPU, otherwise to the CPU."""
    return Diffusion(load_pipeline(folder).to(device if torch.cuda.is_available() else "cpu"))


def latent_shape(folder: Path, size: int) -> tuple[int, int, int]:
    """Return the channels, rows and columns of a latent, for images of side `size` and the pipeline in `folder`."""
    vae = read_json(folder / "vae" / "config.json")
    rows, columns = grid_of(len(vae["block_out_channels"]), size)
    return int(vae["latent_channels"]), rows, columns


def cut_captions(folder: Path, captions: Sequence[str]) -> int:
    """Count the captions that are too long for the text encoder of the pipeline in `folder`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(list(captions), verbose=False).input_ids)


class FromCaption:
    """A decoder from captions to images; `tuned` is a folder with the UNet parameters that fine-tuning wrote."""

    kind = "StableDiffusion"

    def __init__(self, folder: Path, device: torch.device, rule: Sampling, tuned: Path | None = None, prefix: str = ""):
        self.rule, self.prefix, self.dtype = rule, prefix, getattr(torch, rule.dtype)
        self.pipeline = load_pipeline(folder, self.dtype, self.kind)
        if tuned is not None:
            use_tuned(self.pipeline.unet, read_tuned(tuned))
        self.device = move_to_device(self.pipeline, device, rule.offload)

    def decode(self, requests: Sequence[Request]) -> list[Image.Image]:
        """Generate an image for each request. Raises `ValueError` for an image with non-finite pixels."""
        pictures = self._generate(requests, 0)
        for position, request in enumerate(requests):
            for attempt in range(1, self.rule.redraws + 1):
                if not is_plain(pictures[position]):
                    break
                _logger.warning(
                    "the image of pair %d has one colour; generating it again, try %d", request["index"], attempt
                )
                pictures[position] = self._generate([request], attempt)[0]
                pictures[position].info["redrawn"] = attempt
        return pictures

    def _generate(self, requests: Sequence[Request], attempt: int) -> list[Image.Image]:
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
    """A decoder that adds noise to a pair's latent `mode` and runs only the last steps (a fraction `strength`)."""

    kind = "StableDiffusionImg2Img"

    def __init__(self, folder: Path, device: torch.device, rule: Sampling, strength: float):
        super().__init__(folder, device, rule)
        self.strength = strength

    def _images(self, requests: Sequence[Request], randoms: list[torch.Generator]) -> np.ndarray:
        output = self.pipeline(
            prompt=self._prompts(requests),
            image=stack_modes(requests).to(self.device, self.dtype),
            strength=self.strength,
            num_inference_steps=self.rule.steps,
            guidance_scale=self.rule.guidance,
            generator=randoms,
            output_type="np",
        )
        return output.images


class NearLatent(FromCaption):
    """A decoder that starts from noise and denoises it with the caption, guided towards the latent `mode` of a pair."""

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
        pipeline, modes = self.pipeline, stack_modes(requests).to(self.device, self.dtype)
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
    """Return the random generator of an image, seeded by the image's number, counted over all phases."""
    return generator(request["seed"], what, request["number"])


def stack_modes(requests: Sequence[Request]) -> Float[Tensor, "B C h w"]:
    return torch.stack([r["mode"] for r in requests]).float()


def is_plain(image: Image.Image) -> bool:
    """Return whether an image has a single colour."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[0, 0]).all())
