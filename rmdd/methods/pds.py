"""PDS: prototype-guided data synthesis (arXiv 2602.19756), distillation without training.

    features    projected CLIP features of every image and caption, raw scale; the fifth of the pairs whose two sides
                agree least is left out
    clusters    k-means of images and of captions apart, M clusters each, paired one to one by the Hungarian algorithm
                so that as many pairs as can be lie in both clusters of a match
    prototypes  the mean image and the mean caption feature of what a match shares, ordered by their cosine
    captions    the real caption nearest to the caption prototype
    pictures    the image prototype decoded by an unCLIP diffusion model, prompted with that caption

Where paper and code differ: a match that shares no pair is discarded, as printed, and the set is then topped up to M by
splitting the largest (`pairless`); clusters are counted densely, means are those of members, captions come from the
pairs that pruning left, and every picture has a generator of its own. Students get the run's own embedding of the
captions; `texts: prototypes` gives them the mean of these over the shared pairs, as the released evaluation does in
CLIP's text space. `decode: nearest` takes the real image nearest to the prototype: nothing is made up, no diffusion
model is needed.
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
from rmdd.models import pretrained as parts
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
"""What tells such a pipeline from others."""
STEPS, GUIDANCE = {"unclip": 100, "karlo": 25}, {"unclip": 5.0, "karlo": 8.0}


class PDS(GenerativeMethod):
    reference = "pds"
    card = "arXiv 2602.19756"
    verified = (
        "whole with tiny parts of the real classes and with decode: nearest on emoji; pictures of real weights: GPU"
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
            description="encoder of both sides: clip:NAME by hub id (@REVISION) or folder; columns:NAME, of the data; "
            "tower, the run's own as they begin; expert:N, which is trained on all data, so no longer learning-free",
        )
        rm_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.2, description="share of pairs, those of lowest image-text cosine, that is left out first"
        )
        starts: PositiveInt = Field(20, description="k-means++ starts of each side's clusters")
        normalize: bool = Field(False, description="cluster features of unit length; prototypes stay means of raw ones")
        pairless: Literal["topup", "keep_centres", "drop"] = Field(
            "topup",
            description="matches without a shared pair: left out, and the largest cells split until there are M; both "
            "k-means centres kept; or left out, and M not reached",
        )
        rescale: bool = Field(False, description="give prototypes the mean length of their members")
        caption_pool: Literal["kept", "all"] = Field("kept", description="captions to retrieve from; all: pruned too")
        repeats: Literal["allow", "forbid"] = Field(
            "allow", description="whether two prototypes may retrieve the same caption, or image; forbid assigns them"
        )
        texts: Literal["captions", "prototypes"] = Field(
            "captions", description="what students get: the captions embedded, or the mean embedding of what is shared"
        )
        decode: Literal["unclip", "karlo", "nearest"] = Field(
            "unclip", description="Stable unCLIP; Karlo, which reads no captions; or the nearest real image"
        )
        decoder: str | None = Field(
            None, description="hub id (@REVISION) or folder of the pipeline; null: the published one"
        )
        steps: PositiveInt | None = Field(None, description="denoising steps; null: 100, Karlo 25")
        guidance: Annotated[float, Field(ge=1)] | None = Field(None, description="null: 5, Karlo 8")
        noise_level: Annotated[int, Field(ge=0, lt=1000)] = Field(10, description="unclip: noise on the prototype")
        negative_prompt: str = Field("text, watermark", description="unclip: what a picture shall not show")
        batch: PositiveInt = Field(4, description="pictures made together")
        dtype: Literal["float32", "bfloat16", "float16"] = Field(
            "bfloat16", description="of the decoder; float16 is as released"
        )
        offload: Literal["none", "model", "sequential"] = Field(
            "none", description="parts of the decoder wait in main memory, by model or layer by layer (accelerate)"
        )

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options, found = cls.Options(**run.distill.options), []
        if len(run.distill.phases) != 1:
            found.append(f"pds makes one set at once, found {len(run.distill.phases)} phases; list one")
        if run.distill.init != "real":
            found.append(f"pds starts from real pairs; distill.init is {run.distill.init}, set it to real")
        if options.decode != "nearest" and not options.features.startswith(("clip:", "columns:")):
            found.append(
                f"decode: {options.decode} reads CLIP embeddings, and distill.options.features is {options.features}; "
                "set it to clip:NAME with the decoder's own CLIP, or decode to nearest"
            )
        if options.features == "tower" and options.rm_ratio:
            found.append("the run's own towers have no common space to prune in; set distill.options.rm_ratio to 0")
        if options.decode == "nearest" and options.decoder is not None:
            found.append("decode: nearest needs no decoder; leave distill.options.decoder out")
        kind, _, number = options.features.partition(":")
        if kind == "expert" and int(number or 0) >= run.experts.num:
            found.append(f"distill.options.features names {options.features}; the run trains {run.experts.num} experts")
        return found

    def parts(self) -> list[parts.PretrainedModel]:
        kind, _, name = self.options.features.partition(":")
        asked = [clip_part(name, "distill.options.features: clip:FOLDER")] if kind == "clip" else []
        how = self.options.decode
        if how != "nearest":
            name = self.options.decoder or DECODERS[how]
            needs, option = COMPONENTS[how], "distill.options.decoder: FOLDER"
            asked.append(parts.PretrainedModel.of("decoder", name, "diffusers", needs, option))
        return asked

    def faults(self) -> list[str]:
        found, asked = super().faults(), self.parts()
        if len(asked) == 2 and not parts.missing(asked):
            clip, decoder = (part.folder() for part in asked)
            if (given := projection_width(clip)) != (taken := decode.width_of(decoder)):
                found.append(
                    f"distill.options.features: {asked[0].id} gives embeddings of width {given}, and the decoder "
                    f"{asked[1].id} takes {taken}; take the CLIP that the decoder was trained with"
                )
        return found

    def make(self, studio: Studio, phase: int) -> None:
        options, split = self.options, studio.train.split
        sides = studio.features(options.features)
        found, kept = find(
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
        if len(found.cells) < studio.pairs:
            studio.tools.progress.say(f"pds: {len(found.cells)} of {studio.pairs} pairs are left by pairless: drop")
        repeats = options.repeats == "allow"
        pool = kept if options.caption_pool == "kept" else np.arange(len(split.captions))
        if not repeats:  # nor the same words of two records
            pool = pool[np.unique([split.captions[i] for i in pool], return_index=True)[1]]
        records = retrieved(found.texts, sides.texts, pool, repeats).tolist()
        captions = [split.captions[record] for record in records]
        if options.decode == "nearest":
            images = retrieved(found.images, sides.images, np.unique(split.image_of[kept]), repeats).tolist()
            requests: list[dict[str, Any]] = [{"image": image} for image in images]
            pictures = studio.draw(lambda: Nearest(split), requests, batch=64, here=True)
        else:
            requests = [{"caption": caption} for caption in captions]
            make = functools.partial(decoder_of, options, self.parts()[-1].folder(), studio.device)
            tensors = {"embedding": torch.from_numpy(found.images)}
            pictures = studio.draw(make, requests, tensors, options.batch)
        texts = None if options.texts == "captions" else torch.from_numpy(shared_texts(studio.train.texts, found))
        facts = {"pictures": "real" if options.decode == "nearest" else "generated", **found.facts}
        studio.finish(pictures, records, captions, texts, self.parts(), facts)


def decoder_of(options: PDS.Options, folder: Path, device: torch.device) -> Decoder:
    """The pipeline that a run asks for, loaded from its folder."""
    how = options.decode
    given: dict[str, Any] = {"dtype": options.dtype, "offload": options.offload}
    given |= {"steps": options.steps or STEPS[how], "guidance": options.guidance or GUIDANCE[how]}
    if how == "karlo":
        return Karlo(folder, device, **given)
    return StableUnclip(
        folder, device, noise_level=options.noise_level, negative_prompt=options.negative_prompt, **given
    )


def shared_texts(texts: np.ndarray, found: Prototypes) -> np.ndarray:
    """(M, F): per pair the mean of the text tower's embeddings over the records that it stands for."""
    import numpy as np

    return np.stack([texts[cell.texts].astype(np.float64).mean(axis=0) for cell in found.cells]).astype(np.float32)
