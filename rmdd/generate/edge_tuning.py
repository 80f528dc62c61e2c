"""EDGE's fine-tuning of the biases and normalisation parameters of a UNet, by gradients of the EDGE losses.

    z_t = noised(z_0), prediction = UNet(z_t, t, e), z^ = clean estimate, x^ = VAE(z^ / scale), i = CLIP(x^)
    L   = lambda_c L_C(i, w) + lambda_d L_D(i, w) + lambda_n MSE(prediction, target of the UNet)

z_0 is the latent of an image, t a time step, e the encoded caption, w the CLIP feature of the caption. If a batch is
divided into micro-batches to save memory, features are computed twice (gradient caching). The first pass, without
autograd, gives the contrastive loss of the entire batch. The second pass, with autograd, gives the gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section
from rmdd.core.seeding import generator
from rmdd.data.images import NORMALISATIONS
from rmdd.generate.diffusion import Diffusion, as_signed
from rmdd.generate.edge_losses import (
    biases_and_norms,
    clean_estimate,
    contrastive,
    diversity,
    noised,
    target_of,
)


class EdgeTuning(Section):
    """Settings of EDGE's fine-tuning of the diffusion model."""

    epochs: PositiveInt = Field(10, description="number of passes over the captions used for fine-tuning")
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the train captions used for fine-tuning: one random draw for all epochs"
    )
    steps: int | None = Field(
        None, ge=0, description="number of updates; 0: no fine-tuning; null: as many as tuning.epochs needs"
    )
    batch: int = Field(128, ge=2, description="number of pairs in a batch of the contrastive loss")
    micro_batch: PositiveInt | None = Field(
        None, description="number of pairs per forward pass; it changes memory use only; null: the entire batch"
    )
    size: PositiveInt = Field(256, description="side in pixels of the images in fine-tuning; released code: 224")
    lr: PositiveFloat = Field(1e-3, description="learning rate of SGD without momentum")
    contrast: NonNegativeFloat = Field(1.0, description="lambda_c, weight of the contrastive loss")
    diverse: NonNegativeFloat = Field(1.0, description="lambda_d, weight of the diversity loss")
    anchor: NonNegativeFloat = Field(
        1.0, description="lambda_n, weight of the denoising loss, which preserves image generation; released code: 0"
    )
    temperature: PositiveFloat = Field(0.1, description="temperature tau of the contrastive loss")
    unit_halves: bool = Field(
        True, description="scale image and text features to unit length before joining them; released code: false"
    )
    max_step: PositiveInt = Field(
        600,
        description="exclusive upper bound of the time steps t in fine-tuning: at high t, errors of the clean estimate "
        "grow up to 15 times; released code: 1000",
    )
    weighting: Literal["none", "alpha_bar"] = Field(
        "none",
        description="weights of the gradients of pairs; none: equal; alpha_bar: by the share abar_t of signal in the "
        "noisy latent, which allows a higher tuning.max_step",
    )
    clamp: PositiveFloat | None = Field(
        6.0, description="largest absolute value of the clean estimate, which is a scaled latent; null: no limit"
    )
    recipe: Literal["corrected", "released"] = Field(
        "corrected",
        description="corrected: as in the paper; released: as in the released code, where the UNet gets clean latents, "
        "the VAE decoder gets scaled latents, and the pixel normalisations of CLIP and VAE are swapped",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of matrix products; parameters and their updates are float32"
    )
    save_memory: bool = Field(
        False, description="compute activations of UNet and VAE again in the backward pass, which saves memory"
    )
    checkpoint_every: PositiveInt = Field(100, description="number of updates between two checkpoints")

    def clashes(self) -> list[Clash]:
        if self.micro_batch is not None and self.micro_batch > self.batch:
            text = f"tuning.micro_batch {self.micro_batch} is larger than tuning.batch {self.batch}; lower it"
            return [Clash(text, "tuning.micro_batch", "tuning.batch")]
        return []

    def updates(self, captions: int) -> int:
        """Return the number of updates for a train split with `captions` captions."""
        used = self.used(captions)
        return self.epochs * max(1, used // min(self.batch, used)) if self.steps is None else self.steps

    def used(self, captions: int) -> int:
        """Return how many of `captions` captions are used for fine-tuning: at least 2, unless only 1 exists."""
        return min(captions, max(2, int(self.fraction * captions)))


@dataclass(frozen=True)
class TuningBatch:
    """A training batch on the device of the model, before the noise is added to the latents."""

    latents: Float[Tensor, "B C h w"]
    """Clean latents z_0, multiplied by the scaling factor of the VAE."""
    tokens: Float[Tensor, "B L F"]
    texts: Float[Tensor, "B D"]
    """CLIP features w of the captions, not scaled to unit length."""
    captions: Int[Tensor, " B"]
    """Number of the caption of each pair; pairs with equal captions have equal numbers."""
    times: Int[Tensor, " B"]
    noise: Float[Tensor, "B C h w"]

    def part(self, rows: slice) -> "TuningBatch":
        return TuningBatch(**{name: value[rows] for name, value in vars(self).items()})


class EdgeTrainer:
    """A `rmdd.generate.tuning.Trainer` for EDGE; `pictures(records, size)` returns uint8 images of caption records."""

    def __init__(
        self,
        rule: EdgeTuning,
        diffusion: Diffusion,
        clip: Any,
        clip_tokenizer: Any,
        captions: Sequence[str],
        pictures: Callable[[list[int], int], UInt8[Tensor, "B 3 S S"]],
        seed: int,
    ):
        if len(captions) < 2:
            raise ValueError("EDGE needs at least two captions, found a train split of one caption; ingest more data")
        self.rule, self.diffusion, self.seed = rule, diffusion, seed
        self.clip, self.clip_tokenizer = clip.requires_grad_(False).eval(), clip_tokenizer
        self.captions, self.pictures = captions, pictures
        diffusion.grid(rule.size)
        if rule.max_step > len(diffusion.alpha_bar):
            raise ValueError(
                f"distill.options.tuning.max_step {rule.max_step} exceeds this model's {len(diffusion.alpha_bar)} "
                "time steps; lower it"
            )
        order = torch.randperm(len(captions), generator=generator(seed, "edge fraction"))
        self.records = order[: rule.used(len(captions))]
        self.batch_size = min(rule.batch, len(self.records))
        self.total = rule.updates(len(captions))
        self.parameters: dict[str, nn.Parameter] = biases_and_norms(diffusion.unet)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimiser: torch.optim.Optimizer = torch.optim.SGD(self.parameters.values(), lr=rule.lr)
        if rule.save_memory:
            diffusion.unet.enable_gradient_checkpointing()
            diffusion.vae.enable_gradient_checkpointing()

    # -- a batch -----------------------------------------------------------------------------------------------------

    def batch_records(self, step: int) -> list[int]:
        """Return the caption records in the batch of a step; every epoch takes them from a new random order."""
        epoch, offset = divmod(step, len(self.records) // self.batch_size)
        order = torch.randperm(len(self.records), generator=generator(self.seed, "edge epoch", epoch))
        return self.records[order[offset * self.batch_size :][: self.batch_size]].tolist()

    @torch.no_grad()
    def batch(self, step: int) -> TuningBatch:
        """Build the batch of a step; all random numbers are drawn on the CPU, so every device gets the same batch."""
        rule, device, random = self.rule, self.diffusion.device, generator(self.seed, "edge step", step)
        records = self.batch_records(step)
        captions = [self.captions[r] for r in records]
        pixels = self._for_vae(self.pictures(records, rule.size).to(device))
        latents = torch.cat([self.diffusion.latents(pixels[rows], random) for rows in self._parts(len(records))])
        times = torch.randint(rule.max_step, (len(records),), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        return TuningBatch(
            latents * self.diffusion.scale,
            self.diffusion.texts(captions).tokens,
            self._text_features(captions),
            torch.tensor([number[c] for c in captions], device=device),
            times.to(device),
            noise.to(device),
        )

    def _parts(self, count: int) -> Iterator[slice]:
        size = self.rule.micro_batch or count
        return (slice(start, start + size) for start in range(0, count, size))

    def _for_vae(self, pictures: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        if self.rule.recipe == "corrected":
            return as_signed(pictures)
        return _standardised(pictures.to(torch.float32) / 255)

    def _text_features(self, captions: list[str]) -> Float[Tensor, "B D"]:
        limit = self.clip.config.text_config.max_position_embeddings
        ids = self.clip_tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return self.clip.get_text_features(**ids.to(self.diffusion.device)).pooler_output.float()

    # -- the losses --------------------------------------------------------------------------------------------------

    def features_and_error(self, batch: TuningBatch) -> tuple[Float[Tensor, "B D"], Float[Tensor, ""]]:
        """Return the CLIP features of the denoised images, and the squared error of the UNet: a mean over each pair,
        summed over all pairs of the batch."""
        rule, diffusion = self.rule, self.diffusion
        alpha_bar = diffusion.alpha_bar[batch.times]
        noisy = noised(batch.latents, batch.noise, alpha_bar)
        latents = noisy if rule.recipe == "corrected" else batch.latents
        with torch.autocast(diffusion.device.type, torch.bfloat16, enabled=rule.precision == "bfloat16"):
            predicted = diffusion.unet(latents, batch.times, encoder_hidden_states=batch.tokens, return_dict=False)[0]
            predicted = predicted.float()
            estimate = clean_estimate(noisy, predicted, alpha_bar, diffusion.prediction)
            if rule.clamp is not None:
                estimate = estimate.clamp(-rule.clamp, rule.clamp)
            pixels = diffusion.decode(estimate / diffusion.scale if rule.recipe == "corrected" else estimate)
            features = self.clip.get_image_features(pixel_values=self._for_clip(pixels)).pooler_output
        if rule.weighting == "alpha_bar":
            features = _weighted(features.float(), alpha_bar)
        target = target_of(batch.latents, batch.noise, alpha_bar, diffusion.prediction)
        return features.float(), F.mse_loss(predicted, target, reduction="sum") / target[0].numel()

    def _for_clip(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 s s"]:
        side = self.clip.config.vision_config.image_size
        pixels = pixels if self.rule.recipe == "released" else (pixels.float() + 1) / 2
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        return pixels if self.rule.recipe == "released" else _standardised(pixels)

    def feature_losses(self, features: Float[Tensor, "B D"], batch: TuningBatch) -> dict[str, Tensor]:
        """Return the contrastive and the diversity loss, which depend on the features of the entire batch."""
        rule = self.rule
        return {
            "contrast": contrastive(features, batch.texts, rule.temperature, batch.captions),
            "diversity": diversity(features, batch.texts, unit_halves=rule.unit_halves),
        }

    def gradient(self, step: int) -> dict[str, float]:
        rule, batch = self.rule, self.batch(step)
        count = len(batch.latents)
        parts = list(self._parts(count))
        if len(parts) == 1:
            features, miss = self.features_and_error(batch)
            losses = self.feature_losses(features, batch) | {"anchor": miss / count}
            self._sum(losses).backward()
        else:
            with torch.no_grad():
                features = torch.cat([self.features_and_error(batch.part(rows))[0] for rows in parts])
            features.requires_grad_(True)
            losses = self.feature_losses(features, batch)
            (rule.contrast * losses["contrast"] + rule.diverse * losses["diversity"]).backward()
            assert features.grad is not None
            misses = torch.zeros((), device=features.device)
            for rows in parts:
                again, miss = self.features_and_error(batch.part(rows))
                ((again * features.grad[rows]).sum() + rule.anchor * miss / count).backward()
                misses += miss.detach()
            losses["anchor"] = misses / count
        report = {"loss": self._sum(losses), **losses}
        return {name: float(value.detach()) for name, value in report.items()}

    def _sum(self, losses: dict[str, Tensor]) -> Tensor:
        rule = self.rule
        return rule.contrast * losses["contrast"] + rule.diverse * losses["diversity"] + rule.anchor * losses["anchor"]


def draws(seed: int, count: int, number: int, start: int = 0) -> list[int]:
    """Draw `number` of `count` captions without replacement, in an order set by `seed`; return the captions' indices.

    The first `start` captions of that order are skipped, because other phases use them. Raises `ValueError` if too
    few captions remain.
    """
    if start + number > count:
        raise ValueError(
            f"{start + number} images need different captions, but the train split has {count} captions; "
            "lower distill.phases.*.pairs, raise distill.options.captions_per_image, or ingest more data"
        )
    order = torch.randperm(count, generator=generator(seed, "edge captions"))
    return order[start : start + number].tolist()


def _standardised(pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """Normalise pixels in [0, 1] with the pixel mean and standard deviation of CLIP."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in NORMALISATIONS["clip"])
    return (pixels - mean) / std


def _weighted(features: Float[Tensor, "B D"], weight: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """Return `features` unchanged, but multiply the gradient of each row by its entry in `weight`."""
    w = weight[:, None]
    return w * features + (1 - w) * features.detach()
