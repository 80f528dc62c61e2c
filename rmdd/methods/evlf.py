"""EVLF: early vision-language fusion for generative distillation (arXiv 2603.07476), in its image-text form.

Diffusion-based distillation clusters latents and draws pictures near the centres; text enters late, in the denoiser.
EVLF fuses latents with text before that, by cross-attention trained so that a fused latent still looks like the latent
and can be read linearly as its text. Clusters, centres and guidance then use fused latents.

    train   lambda_1 L_align + lambda_2(step) MSE(z~, z); positives are pairs of one picture or one caption
    fuse    all pairs, times the latent scale
    modes   k-means with K = M in principal components; the centre, or the fused latent nearest to it
    say     the caption nearest to the mean caption of a mode's members
    draw    Stable Diffusion with that caption: from the noised mode (image_to_image), or guided to it (mode_guidance)

Published for classes, where class prompts stand for captions and a class-conditional DiT for Stable Diffusion; the
same sampler takes a DiT (`rmdd.generate.guidance.class_denoiser`). Where we depart: `fusion.residual` starts the
fusion at the identity, padding tokens are masked, the pooled text is the first end-of-text state (padding repeats that
token), and classifier-free guidance acts on all latent channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from rmdd import config
from rmdd.config.numbers import NonNegativeFloat, PositiveInt
from rmdd.core.seeding import generator
from rmdd.generate.decode import Decoder
from rmdd.generate.evlf_tuning import FusionRule, FusionTrainer
from rmdd.generate.fusing import fused_rows
from rmdd.generate.modes import modes_of
from rmdd.generate.stable_diffusion import (
    FromLatent,
    NearLatent,
    Sampling,
    cut_captions,
    diffusion_of,
    generator_part,
    latent_shape,
)
from rmdd.generate.studio import Studio
from rmdd.methods.tuned import TunedMethod
from rmdd.models.prepared import PreparedSplit
from rmdd.models.pretrained import PretrainedModel


class LatentSampling(Sampling):
    size: PositiveInt = Field(
        256, multiple_of=8, description="side of the pictures, in training and as drawn; the set's is another"
    )


class EVLF(TunedMethod):
    card = "2603.07476"
    verified = "whole with tiny parts of the real classes, as image-text; what pictures of real weights teach: GPU"
    defaults = {
        "distill": {
            "phases": [{"pairs": 100, "iterations": 1}],
            "budget": 100,
            "similarity": {"kind": "identity"},
            "loss": "infonce",
        },
    }

    class Options(TunedMethod.Options):
        fusion: FusionRule = FusionRule()
        components: PositiveInt | None = Field(
            256, description="principal components that latents are clustered in; null: all their numbers"
        )
        mode: Literal["centre", "nearest"] = Field(
            "centre", description="the mean latent of a cluster, or the fused latent nearest to it, which is sharper"
        )
        sampler: Literal["image_to_image", "mode_guidance"] = Field(
            "image_to_image", description="start from the noised mode, or from noise and be pulled to the mode"
        )
        strength: float = Field(0.7, gt=0, le=1, description="image_to_image: share of the noise that is put on a mode")
        scheduler: Literal["ddpm", "ddim"] = Field("ddpm", description="mode_guidance: ancestral, or DDIM")
        eta: float = Field(0.0, ge=0, le=1, description="mode_guidance with ddim: noise of a step; 0 is deterministic")
        pull: NonNegativeFloat = Field(0.1, description="mode_guidance: scale s of the pull")
        pull_until: int = Field(
            25, ge=0, description="mode_guidance: the pull acts while more steps than these are left"
        )
        sampling: LatentSampling = LatentSampling()

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options = cls.Options(**run.distill.options)
        guided, steps = options.sampler == "mode_guidance", options.sampling.steps
        if not guided and int(steps * options.strength) < 1:
            return [
                f"distill.options.strength {options.strength} leaves none of the {steps} steps to denoise a mode; "
                "raise it, or distill.options.sampling.steps"
            ]
        if guided and options.pull and options.pull_until >= steps - 1:
            return [
                f"distill.options.pull_until {options.pull_until} leaves none of the {steps} steps to "
                "be guided; lower it"
            ]
        return []

    # -- parts and training ------------------------------------------------------------------------------------------

    def parts(self) -> list[PretrainedModel]:
        return [generator_part(self.options.generator)]

    def sizes(self) -> dict[str, int]:
        return {"sampling.size": self.options.sampling.size}

    @property
    def checkpoint_every(self) -> int:
        return self.options.fusion.checkpoint_every

    def shapes(self) -> dict[str, Any]:
        size = self.options.sampling.size
        return {"fusion": self.options.fusion.model_dump(mode="json", exclude={"checkpoint_every"}), "size": size}

    def updates(self, captions: int) -> int:
        return self.options.fusion.updates(captions)

    def trainer(self, train: PreparedSplit, device: torch.device) -> FusionTrainer:
        return FusionTrainer(
            self.options.fusion,
            diffusion_of(self.parts()[0].folder(), device),
            train.split.captions,
            train.split.image_of.tolist(),
            self.pictures(train),
            self.options.sampling.size,
            self.seed,
        )

    # -- making pairs ------------------------------------------------------------------------------------------------

    def make(self, studio: Studio, phase: int) -> None:
        options, train, part = self.options, studio.train, self.parts()[0]
        folder, identity = part.folder(), part.identity()
        tuned = self.tuned(studio)
        beside = self.folder_of(studio)
        fused = beside.with_name(f"fused-{beside.name}")  # what shapes a training shapes what it gives
        rows = fused_rows(studio, folder, options.fusion, options.sampling.size, tuned, fused)
        total = sum(p.pairs for p in self.rule.phases)
        found = modes_of(rows, train.texts, total, self.seed, components=options.components, kind=options.mode)
        order = torch.randperm(total, generator=generator(self.seed, "evlf modes")).tolist()
        start = self.before(phase, lambda pairs: pairs)
        mine = order[start : start + studio.pairs]
        records = [found.records[k] for k in mine]
        captions = [train.split.captions[r] for r in records]
        pictures = studio.draw(
            self._painter(folder, studio.device),
            [
                {"caption": train.split.captions[r], "record": r, "number": start + k, "generator": identity}
                for k, r in enumerate(records)
            ],
            {"mode": torch.from_numpy(found.latents[mine]).view(-1, *latent_shape(folder, options.sampling.size))},
            batch=options.sampling.batch,
        )
        studio.finish(
            pictures,
            records,
            captions,
            parts=self.parts(),
            facts={"members": [found.members[k] for k in mine], "prompts_cut": cut_captions(folder, captions)},
        )

    def _painter(self, folder: Path, device: torch.device) -> Callable[[], Decoder]:
        options = self.options
        if options.sampler == "image_to_image":
            return functools.partial(FromLatent, folder, device, options.sampling, options.strength)
        return functools.partial(
            NearLatent,
            folder,
            device,
            options.sampling,
            options.scheduler,
            strength=options.pull,
            stop=options.pull_until,
            eta=options.eta,
        )
