"""EDGE: distillation by a fine-tuned text-to-image diffusion model (arXiv 2509.15472).

Stable Diffusion is briefly fine-tuned on the real pairs so that what it draws for a caption can be told from what it
draws for others (L_C) and draws spread out (L_D). It then draws one picture for each of M / cpi captions, and a
captioner says cpi - 1 more about each. Cost hardly grows with the budget.

    tune    biases and norms of the UNet: lambda_c L_C + lambda_d L_D + lambda_n MSE(noise), SGD
    draw    M / cpi captions, uniform without replacement; one picture each, a seed per picture
    say     the drawn caption first, then those of the captioner; cpi rows with the same picture

Where the released code errs we do what the paper says: noisy latents into the UNet, decoding at the decoder's scale,
pixels in the range that VAE and CLIP expect (`tuning.recipe: released` for its way), time steps of high noise left out
(`tuning.max_step`), halves of unit length (`tuning.unit_halves`), one draw of captions for all processes. The
noise-prediction term, which keeps the model a generator, is ours: `tuning.anchor: 0` takes it out.
A remainder of M / cpi gets pictures with a caption each.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from rmdd import config
from rmdd.config.numbers import PositiveInt
from rmdd.config.runfile import Section
from rmdd.execution.tasks import Values
from rmdd.generate.captioners import (
    DEFAULT_IDS,
    PROMPTS,
    CaptionWriter,
    FurtherCaptions,
    PretrainedCaptioner,
    saved_captions,
    stand_ins,
)
from rmdd.generate.decode import Precision
from rmdd.generate.edge_tuning import EdgeTrainer, EdgeTuning, draws
from rmdd.generate.nearest import nearest_captions
from rmdd.generate.stable_diffusion import FromCaption, Sampling, cut_captions, diffusion_of, generator_part
from rmdd.generate.studio import Studio
from rmdd.methods.base import Need
from rmdd.methods.tuned import TunedMethod
from rmdd.models.clip import Clip, clip_part
from rmdd.models.prepared import PreparedSplit
from rmdd.models.pretrained import PretrainedModel


class Captioning(Section):
    """Who says more about a drawn picture."""

    kind: Literal["none", "nearest", "blip", "llava"] = Field(
        "nearest", description="none (one caption per picture), the nearest real captions by CLIP, or a captioner"
    )
    id: str | None = Field(None, description="blip, llava: hub id (or id@revision) or folder; null: the usual one")
    prompt: str | None = Field(None, description="blip, llava: what is asked; null: the usual words")
    tokens: PositiveInt = Field(48, description="blip, llava: new tokens of an answer at most")
    tries: PositiveInt = Field(3, description="blip, llava: how often it is asked before real captions stand in")
    dtype: Precision = Field("float32", description="of the captioner")


class EDGE(TunedMethod):
    card = "2509.15472"
    needs: ClassVar[tuple[Need, ...]] = ("features", "diffusion", "captioner")
    verified = "whole with tiny parts of the real classes; what pictures of real weights teach: GPU"
    defaults = {
        "distill": {
            "phases": [{"pairs": 500, "iterations": 1}],
            "budget": 500,
            "similarity": {"kind": "identity"},
            "loss": "infonce",
        },
    }

    class Options(TunedMethod.Options):
        clip: str = Field("openai/clip-vit-base-patch32", description="CLIP of the losses: hub id or folder")
        captions_per_image: PositiveInt = Field(2, description="cpi, rows of the set with the same picture")
        captioner: Captioning = Captioning()
        prefix: str = Field("", description="put before every caption when its picture is drawn")
        tuning: EdgeTuning = EdgeTuning()
        sampling: Sampling = Sampling()

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options = cls.Options(**run.distill.options)
        if options.captions_per_image > 1 and options.captioner.kind == "none":
            return [
                "distill.options.captioner.kind none gives one caption per picture; set "
                "distill.options.captions_per_image to 1, or another captioner"
            ]
        return []

    # -- parts and training ------------------------------------------------------------------------------------------

    def parts(self) -> list[PretrainedModel]:
        options, found = self.options, [generator_part(self.options.generator)]
        nearest = self._asks and options.captioner.kind == "nearest"
        if options.tuning.steps != 0 or nearest:
            found.append(clip_part(options.clip, "distill.options.clip: FOLDER"))
        if self._asks and not nearest:
            found.append(self._captioner)
        return found

    @property
    def _asks(self) -> bool:
        return self.options.captions_per_image > 1

    @property
    def _captioner(self) -> PretrainedModel:
        rule = self.options.captioner
        assert rule.kind in DEFAULT_IDS
        files = ("preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.txt|tokenizer.model")
        option = "distill.options.captioner.id: FOLDER"
        return PretrainedModel.of("captioner", rule.id or DEFAULT_IDS[rule.kind], files=files, option=option)

    @property
    def checkpoint_every(self) -> int:
        return self.options.tuning.checkpoint_every

    def shapes(self) -> dict[str, Any]:
        return {"tuning": self.options.tuning.model_dump(mode="json", exclude={"checkpoint_every", "save_memory"})}

    def sizes(self) -> dict[str, int]:
        tuning, drawn = self.options.tuning, {"sampling.size": self.options.sampling.size}
        return drawn if tuning.steps == 0 else {"tuning.size": tuning.size, **drawn}

    def updates(self, captions: int) -> int:
        return self.options.tuning.updates(captions)

    def trainer(self, train: PreparedSplit, device: torch.device) -> EdgeTrainer:
        generator, clip = self.parts()[:2]
        seen = Clip(clip.folder(), device)
        return EdgeTrainer(
            self.options.tuning,
            diffusion_of(generator.folder(), device),
            seen.model,
            seen.processor.tokenizer,
            train.split.captions,
            self.pictures(train),
            self.seed,
        )

    # -- making pairs ------------------------------------------------------------------------------------------------

    def rows(self, pairs: int) -> list[int]:
        """How many rows each picture gets, M in all; a remainder of M / cpi gets pictures of its own."""
        whole, rest = divmod(pairs, self.options.captions_per_image)
        return [self.options.captions_per_image] * whole + [1] * rest

    def make(self, studio: Studio, phase: int) -> None:
        options, split = self.options, studio.train.split
        rows = self.rows(studio.pairs)
        start = self.before(phase, lambda pairs: len(self.rows(pairs)))
        drawn = draws(self.seed, len(split.captions), len(rows), start)
        tuned, generator = self.tuned(studio), self.parts()[0]
        identity = generator.identity()
        asked: list[Values] = [
            {"caption": split.captions[r], "record": r, "number": start + k, "generator": identity}
            for k, r in enumerate(drawn)
        ]
        make = functools.partial(
            FromCaption, generator.folder(), studio.device, options.sampling, tuned, options.prefix
        )
        pictures = studio.draw(make, asked, batch=options.sampling.batch)
        said = self._said(studio, pictures, drawn, rows)
        captions = [c for r, more in zip(drawn, said, strict=True) for c in (split.captions[r], *more.captions)]
        of = [k for k, count in enumerate(rows) for _ in range(count)]
        prompts = [options.prefix + split.captions[r] for r in drawn]
        studio.finish(
            [pictures[k] for k in of],
            [drawn[k] for k in of],
            captions,
            parts=self.parts(),
            facts={
                "pictures": len(pictures),
                "picture_of": of,
                "caption_from": [source for more in said for source in ("drawn", *more.sources)],
                "answers_refused": sum(more.refused for more in said),
                "prompts_cut": cut_captions(generator.folder(), prompts),
            },
        )

    def _said(self, studio: Studio, pictures: list[Path], drawn: list[int], rows: list[int]) -> list[FurtherCaptions]:
        """What else is said about each picture."""
        if not self._asks:
            return [FurtherCaptions([], [], 0) for _ in pictures]
        if self.options.captioner.kind == "nearest":
            return self._nearest(studio, pictures, drawn, rows)
        rule, split, texts = self.options.captioner, studio.train.split, studio.train.texts
        kind: Any = rule.kind
        make = functools.partial(
            PretrainedCaptioner,
            kind,
            self._captioner.folder(),
            studio.device,
            prompt=PROMPTS[kind] if rule.prompt is None else rule.prompt,
            tokens=rule.tokens,
            dtype=rule.dtype,
        )
        items: list[Values] = []
        for index, (picture, record, count) in enumerate(zip(pictures, drawn, rows, strict=True)):
            real = stand_ins(split.captions, texts, record, count, split.image_of) if count > 1 else []
            item = {"index": index, "caption": split.captions[record], "count": count - 1, "real": real}
            key = config.hash_value([item, self._captioner.identity(), rule.model_dump(mode="json"), self.seed])
            out = picture.with_suffix(".captions.json")
            items.append({**item, "picture": str(picture), "out": str(out), "key": key})
        todo = [i for i in items if i["count"] and saved_captions(Path(i["out"]), i["key"]) is None]
        threads = self.run.runtime.threads
        work = functools.partial(CaptionWriter, make, self.run.data.captions, self.seed, rule.tries, threads)
        for _ in studio.stream(f"captions of phase {studio.phase}", "captions")(work, todo):
            pass
        return [saved_captions(Path(i["out"]), i["key"]) or FurtherCaptions([], [], 0) for i in items]

    def _nearest(
        self, studio: Studio, pictures: list[Path], drawn: list[int], rows: list[int]
    ) -> list[FurtherCaptions]:
        """The real captions whose CLIP features lie nearest to those of each picture."""
        clip = self.parts()[1]
        texts = studio.features(f"clip:{self.options.clip}").texts
        found = nearest_captions(studio, clip.folder(), pictures, texts, max(rows))
        captions, said = studio.train.split.captions, []
        for record, count, near in zip(drawn, rows, found, strict=True):
            told = dict.fromkeys(captions[int(r)] for r in near if captions[int(r)] != captions[record])
            if len(told) < count - 1:
                raise ValueError(
                    f"{len(captions)} real captions hold no {count} different ones near a picture; lower "
                    "distill.options.captions_per_image"
                )
            said.append(FurtherCaptions(list(told)[: count - 1], ["real"] * (count - 1), 0))
        return said
