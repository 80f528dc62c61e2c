"""PDS: prototype-guided data synthesis (arXiv 2602.19756), distillation without training.

    features    compute projected, unnormalised CLIP features of every image and caption; drop the 20 % of the pairs
                with the lowest image-caption cosine (`rm_ratio`)
    clusters    run k-means with M clusters on the image features and again on the caption features; match image
                clusters to caption clusters one to one (Hungarian algorithm) so that matched clusters share the
                largest number of pairs
    prototypes  for matched clusters, average the image features and the caption features of the pairs that they share;
                sort the prototypes by the cosine of the two means
    captions    take the real caption nearest to the caption prototype
    images      decode the image prototype with an unCLIP diffusion model, prompted with that caption

Paper and released code differ. Matched clusters that share no pair are discarded, as in the paper; then the largest
matched clusters are split until the set has M pairs (`pairless`). Captions come from the pairs that remain after the
drop by `rm_ratio`, and every image has its own random seed. The run's text tower embeds the captions for the students.
With `texts: prototypes`, students get the mean of the text embeddings over the shared pairs instead; the released
evaluation does this in CLIP's text space. `decode: nearest` takes the real image nearest to the image prototype and
needs no diffusion model.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from rmdd import config
from rmdd.config.numbers import PositiveInt
from rmdd.generate import decode
from rmdd.generate.decode import Decoder, Karlo, Nearest, StableUnclip
from rmdd.generate.prototypes import Prototypes, find, retrieved
from rmdd.generate.studio import Studio
from rmdd.methods.generative import GenerativeMethod
from rmdd.models import pretrained
from rmdd.models.clip import clip_part, projection_width

CLIP = "openai/clip-vit-large-patch14"
DECODERS = {
    "unclip": "stabilityai/stable-diffusion-2-1-unclip-small",
    "karlo": "kakaobrain/karlo-v1-alpha-image-variations",
}
COMPONENTS = {
    "unclip": ("image_normalizer", "image_noising_scheduler", "text_encoder", "unet", "vae"),
    "karlo": ("decoder", "text_proj", "image_encoder", "super_res_first", "super_res_last"),
}
"""For each decoder, the components that its diffusers pipeline must have."""
STEPS, GUIDANCE = {"unclip": 100, "karlo": 25}, {"unclip": 5.0, "karlo": 8.0}


class PDS(GenerativeMethod):
    reference = "pds"
    card = "arXiv 2602.19756"
    verified = (
        "Tests: all steps run with tiny random models of the published classes. On emoji pairs, all steps run with "
        "decode: nearest. Not verified (needs a GPU): images that the published weights generate."
    )
    defaults = {
        "distill": {
            "budget": 100,
            "phases": [{"pairs": 100, "iterations": 1}],
            "similarity": {"kind": "identity"},
            "loss": "infonce",
        },
    }

    class Options(GenerativeMethod.Options):
        features: str = Field(
            f"clip:{CLIP}",
            pattern=r"^(clip:.+|tower|expert(:\d+)?|columns:[^/\\]+)$",
            description="origin of the image and caption features; clip:NAME: a CLIP model, by hub id (@REVISION) or "
            "folder; columns:NAME: columns of the dataset; tower: the run's untrained towers; expert:N: expert N, "
            "trained on the data",
        )
        rm_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.2,
            description="share of the real pairs dropped before clustering: those with the lowest image-text cosine",
        )
        starts: PositiveInt = Field(20, description="number of k-means++ starts of each of the two clusterings")
        normalize: bool = Field(
            False,
            description="scale features to unit length for clustering only; prototypes are means of unscaled features",
        )
        pairless: Literal["topup", "keep_centres", "drop"] = Field(
            "topup",
            description="what happens to matched clusters that share no pair; topup: drop them and split the largest "
            "others until M are left; keep_centres: use their k-means centres; drop: drop them (gives fewer pairs)",
        )
        rescale: bool = Field(
            False, description="scale each prototype to the mean norm of the features that it averages"
        )
        caption_pool: Literal["kept", "all"] = Field(
            "kept", description="real captions to choose from; kept: those left after pruning; all: all captions"
        )
        repeats: Literal["allow", "forbid"] = Field(
            "allow",
            description="whether two prototypes may retrieve the same caption or image; forbid: each at most once",
        )
        texts: Literal["captions", "prototypes"] = Field(
            "captions",
            description="text input of students; captions: embedding of the retrieved caption; prototypes: mean "
            "embedding of the captions of the shared pairs",
        )
        decode: Literal["unclip", "karlo", "nearest"] = Field(
            "unclip",
            description="unclip: Stable unCLIP; karlo: Karlo, which uses no captions; nearest: the nearest real image",
        )
        decoder: str | None = Field(
            None, description="hub id (@REVISION) or folder of the decoder; null: the published one"
        )
        steps: PositiveInt | None = Field(
            None, description="number of denoising steps; null: 100 for unclip, 25 for karlo"
        )
        guidance: Annotated[float, Field(ge=1)] | None = Field(
            None, description="scale of classifier-free guidance; null: 5 for unclip, 8 for karlo"
        )
        noise_level: Annotated[int, Field(ge=0, lt=1000)] = Field(
            10, description="unclip: noise level of the image prototype, as a diffusion time step"
        )
        negative_prompt: str = Field(
            "text, watermark", description="unclip: negative prompt, content that images should not show"
        )
        batch: PositiveInt = Field(4, description="number of images generated at once")
        dtype: Literal["float32", "bfloat16", "float16"] = Field(
            "bfloat16", description="number format of the decoder's weights; float16 as released"
        )
        offload: Literal["none", "model", "sequential"] = Field(
            "none",
            description="move idle weights of the decoder to main memory; model: by component; sequential: by layer "
            "(both need accelerate)",
        )

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options, mistakes = cls.Options(**run.distill.options), []
        if len(run.distill.phases) != 1:
            mistakes.append(
                f"pds makes the set in one phase, but distill.phases lists {len(run.distill.phases)}; list one"
            )
        if run.distill.init != "real":
            mistakes.append(f"pds starts from real pairs, but distill.init is {run.distill.init}; set it to real")
        if options.decode != "nearest" and not options.features.startswith(("clip:", "columns:")):
            mistakes.append(
                f"distill.options.decode: {options.decode} reads CLIP embeddings, but distill.options.features is "
                f"{options.features}; set it to clip:NAME with the decoder's own CLIP, or set decode: nearest"
            )
        if options.features == "tower" and options.rm_ratio:
            mistakes.append(
                "untrained towers have no common embedding space to prune in; set distill.options.rm_ratio to 0"
            )
        if options.decode == "nearest" and options.decoder is not None:
            mistakes.append("decode: nearest needs no decoder; remove distill.options.decoder")
        kind, _, number = options.features.partition(":")
        if kind == "expert" and int(number or 0) >= run.experts.num:
            mistakes.append(
                f"distill.options.features is {options.features}, but the run trains {run.experts.num} experts, "
                "counted from 0; choose one of them"
            )
        return mistakes

    def parts(self) -> list[pretrained.PretrainedModel]:
        kind, _, name = self.options.features.partition(":")
        models = [clip_part(name, "distill.options.features: clip:FOLDER")] if kind == "clip" else []
        decoder_kind = self.options.decode
        if decoder_kind != "nearest":
            name = self.options.decoder or DECODERS[decoder_kind]
            needs, option = COMPONENTS[decoder_kind], "distill.options.decoder: FOLDER"
            models.append(pretrained.PretrainedModel.of("decoder", name, "diffusers", needs, option))
        return models

    def faults(self) -> list[str]:
        faults, models = super().faults(), self.parts()
        if len(models) == 2 and not pretrained.missing(models):
            clip, decoder = (model.folder() for model in models)
            if (clip_width := projection_width(clip)) != (decoder_width := decode.width_of(decoder)):
                faults.append(
                    f"distill.options.features: {models[0].id} gives embeddings of width {clip_width}, but the decoder "
                    f"{models[1].id} needs width {decoder_width}; use the CLIP that the decoder was trained with"
                )
        return faults

    def make(self, studio: Studio, phase: int) -> None:
        options, split = self.options, studio.train.split
        sides = studio.features(options.features)
        prototypes, remaining = find(
            sides,
            studio.pairs,
            self.seed,
            studio.tools.ranks,
            rm_ratio=options.rm_ratio,
            starts=options.starts,
            normalize=options.normalize,
            pairless=options.pairless,
            rescale=options.rescale,
        )
        if len(prototypes.cells) < studio.pairs:
            studio.tools.progress.say(
                f"pds: the set has {len(prototypes.cells)} of {studio.pairs} pairs, because pairless: drop removes "
                "matched clusters that share no pair"
            )
        repeats = options.repeats == "allow"
        pool = remaining if options.caption_pool == "kept" else np.arange(len(split.captions))
        if not repeats:  # of several records with the same caption, keep one
            pool = pool[np.unique([split.captions[i] for i in pool], return_index=True)[1]]
        records = retrieved(prototypes.texts, sides.texts, pool, repeats).tolist()
        captions = [split.captions[record] for record in records]
        if options.decode == "nearest":
            candidates = np.unique(split.image_of[remaining])
            images = retrieved(prototypes.images, sides.images, candidates, repeats).tolist()
            requests: list[dict[str, Any]] = [{"image": image} for image in images]
            pictures = studio.draw(lambda: Nearest(split), requests, batch=64, here=True)
        else:
            requests = [{"caption": caption} for caption in captions]
            make = functools.partial(decoder_of, options, self.parts()[-1].folder(), studio.device)
            tensors = {"embedding": torch.from_numpy(prototypes.images)}
            pictures = studio.draw(make, requests, tensors, options.batch)
        texts = None if options.texts == "captions" else torch.from_numpy(shared_texts(studio.train.texts, prototypes))
        facts = {"pictures": "real" if options.decode == "nearest" else "generated", **prototypes.facts}
        studio.finish(pictures, records, captions, texts, self.parts(), facts)


def decoder_of(options: PDS.Options, folder: Path, device: torch.device) -> Decoder:
    """Load the diffusion pipeline of the decoder named in `options.decode` from the folder `folder`."""
    kind = options.decode
    arguments: dict[str, Any] = {"dtype": options.dtype, "offload": options.offload}
    arguments |= {"steps": options.steps or STEPS[kind], "guidance": options.guidance or GUIDANCE[kind]}
    if kind == "karlo":
        return Karlo(folder, device, **arguments)
    return StableUnclip(
        folder, device, noise_level=options.noise_level, negative_prompt=options.negative_prompt, **arguments
    )


def shared_texts(texts: np.ndarray, prototypes: Prototypes) -> np.ndarray:
    """Return the prototypes' texts (M, F): the mean text embedding of the pairs that two matched clusters share."""
    return np.stack([texts[cell.texts].astype(np.float64).mean(axis=0) for cell in prototypes.cells]).astype(np.float32)
