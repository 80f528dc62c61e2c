"""EVLF: early vision-language fusion for generative distillation (arXiv 2603.07476), in its image-text form.

Diffusion-based distillation clusters image latents and generates images near the cluster centres; text enters late, in
the denoiser. EVLF fuses each latent z with its text before clustering. A cross-attention layer is trained so that the
fused latent z~ stays close to z and a linear map recovers the text from it. Clustering, centres and guidance then use
z~. The centre of a cluster is called its mode.

    train     minimise lambda_1 L_align + lambda_2(step) MSE(z~, z); positives in L_align share an image or a caption
    fuse      compute z~ of all real pairs, multiplied by the latent scale
    modes     k-means with K = M in principal components; a mode is the centre or the fused latent nearest to it
    caption   choose the real caption nearest to the mean caption embedding of the mode's members
    generate  Stable Diffusion with that caption, starting from the noised mode (image_to_image) or guided towards the
              mode (mode_guidance)

The paper distils classes: it has class prompts instead of captions, and a class-conditional DiT instead of Stable
Diffusion. Our sampler also works with a DiT (`rmdd.generate.guidance.class_denoiser`). We differ from the paper in four
points. `fusion.residual` starts the fusion at the identity. Padding tokens are masked. The text is pooled at the first
end-of-text token, which padding repeats. Classifier-free guidance acts on all latent channels.
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
        256,
        multiple_of=8,
        description="side in pixels of generated and training images; the set stores images of side data.image_size",
    )


class EVLF(TunedMethod):
    card = "2603.07476"
    verified = (
        "Tests: all steps run on image-text pairs with tiny random models of the published classes. Not verified "
        "(needs a GPU): what students learn from images that the published weights generate."
    )
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
            256,
            description="number of principal components in which fused latents are clustered; null: no reduction",
        )
        mode: Literal["centre", "nearest"] = Field(
            "centre",
            description="mode of a cluster; centre: its mean latent; nearest: the latent nearest to the mean (sharper)",
        )
        sampler: Literal["image_to_image", "mode_guidance"] = Field(
            "image_to_image",
            description="image_to_image: noise the mode and denoise it; mode_guidance: guide pure noise to the mode",
        )
        strength: float = Field(
            0.7, gt=0, le=1, description="image_to_image: noise added to a mode, as a share of the full noise"
        )
        scheduler: Literal["ddpm", "ddim"] = Field("ddpm", description="mode_guidance: noise scheduler")
        eta: float = Field(
            0.0, ge=0, le=1, description="mode_guidance with ddim: scale of the added noise; 0: deterministic"
        )
        pull: NonNegativeFloat = Field(0.1, description="mode_guidance: scale s of the guidance towards the mode")
        pull_until: int = Field(
            25, ge=0, description="mode_guidance: number of denoising steps at the end without guidance"
        )
        sampling: LatentSampling = LatentSampling()

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options = cls.Options(**run.distill.options)
        guided, steps = options.sampler == "mode_guidance", options.sampling.steps
        if not guided and int(steps * options.strength) < 1:
            return [
                f"distill.options.strength {options.strength} uses none of the {steps} steps to denoise a mode; "
                "raise it, or distill.options.sampling.steps"
            ]
        if guided and options.pull and options.pull_until >= steps - 1:
            return [
                f"distill.options.pull_until {options.pull_until} leaves none of the {steps} steps guided; lower it"
            ]
        return []

    # -- pretrained models and training --------------------------------------------------------------------------------

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
        tuned_folder = self.folder_of(studio)
        # the name of `tuned_folder` is a hash of the training options, which also determine the fused latents
        fused = tuned_folder.with_name(f"fused-{tuned_folder.name}")
        rows = fused_rows(studio, folder, options.fusion, options.sampling.size, tuned, fused)
        total = sum(p.pairs for p in self.rule.phases)
        modes = modes_of(rows, train.texts, total, self.seed, components=options.components, kind=options.mode)
        order = torch.randperm(total, generator=generator(self.seed, "evlf modes")).tolist()
        start = self.before(phase, lambda pairs: pairs)
        chosen = order[start : start + studio.pairs]
        records = [modes.records[k] for k in chosen]
        captions = [train.split.captions[r] for r in records]
        pictures = studio.draw(
            self._painter(folder, studio.device),
            [
                {"caption": train.split.captions[r], "record": r, "number": start + k, "generator": identity}
                for k, r in enumerate(records)
            ],
            {"mode": torch.from_numpy(modes.latents[chosen]).view(-1, *latent_shape(folder, options.sampling.size))},
            batch=options.sampling.batch,
        )
        studio.finish(
            pictures,
            records,
            captions,
            parts=self.parts(),
            facts={"members": [modes.members[k] for k in chosen], "prompts_cut": cut_captions(folder, captions)},
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
