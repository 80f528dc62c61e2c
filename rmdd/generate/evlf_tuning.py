"""EVLF's training of its fusion module: fused latents z~ learn to match their texts and to stay close to the latents z.

L = lambda_1 L_align(reader(z~), pooled text) + lambda_2(step) MSE(z~, z); the reader predicts the text from z~.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash, Section
from rmdd.core.seeding import derive, generator
from rmdd.generate.diffusion import Diffusion, Texts, as_signed
from rmdd.generate.fusion import Fusion, Projector, alignment, augment_text, positives, ramp


class FusionRule(Section):
    """Settings of EVLF's fusion module and of the training of this module."""

    width: PositiveInt = Field(256, description="number of features per position in the fusion module")
    heads: PositiveInt = Field(4, description="attention heads")
    layers: PositiveInt = Field(2, description="attention layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout rate in the attention layers")
    kv: Literal["both", "text"] = Field(
        "both",
        description="what latents attend to; both: image and text tokens (released code); text: text tokens (paper)",
    )
    residual: bool = Field(
        True,
        description="true: add the output of the module to the latent through a convolution that starts at zero, so "
        "z~ = z before training; false (as published): the module must learn the identity",
    )
    reader_width: PositiveInt = Field(
        64, description="number of channels in the reader, which predicts the text embedding from a fused latent"
    )
    epochs: PositiveInt = Field(4, description="number of passes over the train captions")
    steps: int | None = Field(
        None, ge=0, description="number of updates; 0: no training; null: as many as fusion.epochs needs"
    )
    batch: int = Field(16, ge=2, description="number of pairs in a batch")
    accumulate: PositiveInt = Field(2, description="number of batches per update (gradient accumulation)")
    lr: PositiveFloat = Field(3e-4, description="learning rate of the fusion module (AdamW)")
    lr_reader: PositiveFloat = Field(1e-4, description="learning rate of the reader (AdamW)")
    weight_decay: NonNegativeFloat = Field(1e-2, description="weight decay of fusion module and reader (AdamW)")
    clip: PositiveFloat = Field(1.0, description="maximum norm of the gradient; longer gradients are scaled down")
    temperature: PositiveFloat = Field(0.07, description="temperature tau of the alignment loss")
    align: NonNegativeFloat = Field(0.1, description="lambda_1, weight of the alignment loss")
    rebuild_low: NonNegativeFloat = Field(
        0.05, description="lambda_2, weight of the reconstruction loss, at the first update"
    )
    rebuild_high: NonNegativeFloat = Field(
        1.0, description="lambda_2, weight of the reconstruction loss, in the second half of the updates"
    )
    drop_text: float = Field(0.2, ge=0, le=1, description="probability that all text tokens of a batch are set to zero")
    drop_entries: float = Field(
        0.1, ge=0, lt=1, description="share of numbers in text tokens set to zero, in batches that keep their tokens"
    )
    text_noise: NonNegativeFloat = Field(
        0.01, description="standard deviation of the noise on text tokens, in batches that keep their tokens"
    )
    flip: float = Field(
        0.0, ge=0, le=1, description="probability that a training image is mirrored; published: 0.5, for class labels"
    )
    checkpoint_every: PositiveInt = Field(200, description="number of updates between two checkpoints")

    def clashes(self) -> list[Clash]:
        if self.width % self.heads:
            text = f"fusion.width {self.width} is not divisible by {self.heads} heads; give a multiple of fusion.heads"
            return [Clash(text, "fusion.width", "fusion.heads")]
        return []

    def updates(self, captions: int) -> int:
        """Return the number of updates for a train split with `captions` captions."""
        each = min(self.batch, captions) * self.accumulate
        return self.epochs * max(1, captions // each) if self.steps is None else self.steps


def fusion_of(rule: FusionRule, diffusion: Diffusion, size: int, seed: int) -> tuple[Fusion, Projector]:
    """Build the untrained fusion and reader modules for images of side `size`, initialised from `seed`."""
    grid, channels = diffusion.grid(size), int(diffusion.vae.config.latent_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "evlf modules"))
        fusion = Fusion(
            diffusion.text_width,
            grid,
            channels=channels,
            width=rule.width,
            heads=rule.heads,
            layers=rule.layers,
            dropout=rule.dropout,
            keys=rule.kv,
            residual=rule.residual,
        )
        reader = Projector(diffusion.text_width, grid, channels=channels, width=rule.reader_width)
    return fusion.to(diffusion.device), reader.to(diffusion.device)


class FusionTrainer:
    """A `rmdd.generate.tuning.Trainer` for EVLF's fusion module and reader.

    `pictures(records, size)` returns uint8 images of caption records; `image_of` has the image number of each record.
    """

    def __init__(
        self,
        rule: FusionRule,
        diffusion: Diffusion,
        captions: Sequence[str],
        image_of: Sequence[int],
        pictures: Callable[[list[int], int], UInt8[Tensor, "B 3 S S"]],
        size: int,
        seed: int,
    ):
        if len(set(image_of)) < 2:
            raise ValueError("EVLF needs at least two images, found a train split of one image; ingest more data")
        self.rule, self.diffusion, self.size, self.seed = rule, diffusion, size, seed
        self.captions, self.pictures = captions, pictures
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        self.image_of, self.caption_of = image_of, [numbers[caption] for caption in captions]
        self.fusion, self.reader = fusion_of(rule, diffusion, size, seed)
        self.fusion.train()
        self.total = rule.updates(len(captions))
        self.batch_size = min(rule.batch, len(captions))
        fusion = {f"fusion.{n}": p for n, p in self.fusion.named_parameters()}
        reader = {f"reader.{n}": p for n, p in self.reader.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = fusion | reader
        groups = [
            {"params": list(fusion.values()), "lr": rule.lr},
            {"params": list(reader.values()), "lr": rule.lr_reader},
        ]
        self.optimiser: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=rule.weight_decay)

    def batch_records(self, number: int) -> list[int]:
        """Return the caption records of batch `number`; every epoch takes them from a new random order."""
        epoch, offset = divmod(number, len(self.captions) // self.batch_size)
        order = torch.randperm(len(self.captions), generator=generator(self.seed, "evlf epoch", epoch))
        return order[offset * self.batch_size :][: self.batch_size].tolist()

    def losses(
        self,
        latents: Float[Tensor, "B C h w"],
        texts: Texts,
        tokens: Float[Tensor, "B L F"],
        positive: Bool[Tensor, "B B"],
    ) -> dict[str, Tensor]:
        """Return the alignment loss, whose targets are the unaugmented texts, and the reconstruction loss."""
        fused = self.fusion(latents, tokens, texts.padding)
        return {
            "align": alignment(self.reader(fused), texts.pooled, positive, self.rule.temperature),
            "rebuild": F.mse_loss(fused, latents),
        }

    def gradient(self, step: int) -> dict[str, float]:
        rule, device = self.rule, self.diffusion.device
        weight = ramp(step, self.total, rule.rebuild_low, rule.rebuild_high)
        report = {"loss": 0.0, "align": 0.0, "rebuild": 0.0}
        for number in range(step * rule.accumulate, (step + 1) * rule.accumulate):
            random, records = generator(self.seed, "evlf batch", number), self.batch_records(number)
            pictures = self.pictures(records, self.size)
            mirrored = torch.rand(len(records), generator=random) < rule.flip
            pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(-1), pictures)
            with torch.no_grad():
                latents = self.diffusion.latents(as_signed(pictures.to(device)))
                texts = self.diffusion.texts([self.captions[r] for r in records])
                tokens = augment_text(
                    texts.tokens, random, drop_all=rule.drop_text, drop=rule.drop_entries, noise=rule.text_noise
                )
            same = [torch.tensor([int(of[r]) for r in records]) for of in (self.image_of, self.caption_of)]
            positive = positives(*same).to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(derive(self.seed, "evlf dropout", number))
                losses = self.losses(latents, texts, tokens, positive)
            loss = rule.align * losses["align"] + weight * losses["rebuild"]
            (loss / rule.accumulate).backward()
            for name, value in {"loss": loss, **losses}.items():
                report[name] += float(value.detach()) / rule.accumulate
        nn.utils.clip_grad_norm_(list(self.parameters.values()), rule.clip)
        return report | {"rebuild_weight": weight}
