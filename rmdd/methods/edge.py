"""EDGE: distillation by a fine-tuned text-to-image diffusion model (arXiv 2509.15472).

Stable Diffusion is briefly fine-tuned on the real pairs, so that a generated image matches its own caption better than
other captions (contrastive loss L_C) and generated images differ from each other (diversity loss L_D). The model then
generates one image for each of M / cpi captions (cpi = captions per image), and a captioner adds cpi - 1 captions per
image. The cost hardly grows with the number of pairs.

    tune      SGD on biases and norms of the UNet: lambda_c L_C + lambda_d L_D + lambda_n MSE(predicted noise, noise)
    generate  draw M / cpi captions, uniform without replacement; one image and one seed per caption
    caption   cpi pairs share an image: one has its drawn caption, the others have captions by the captioner

If cpi does not divide M, each remaining pair gets an image with one caption. We follow the paper where the released
code has errors: the UNet reads noisy latents, the decoder gets latents at its own scale, and VAE and CLIP get pixels in
the range that they expect. `tuning.recipe: released` reproduces the code. We leave out time steps of high noise
(`tuning.max_step`), normalise image and text features before concatenation (`tuning.unit_halves`), and draw captions
once for all processes. We added the noise-prediction term, which keeps the model able to generate images;
`tuning.anchor: 0` removes this term.
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
    """Options of the captions that are added to each generated image: their origin and the captioner's settings."""

    kind: Literal["none", "nearest", "blip", "llava"] = Field(
        "nearest",
        description="none: add no captions; nearest: add real captions nearest in CLIP space; blip, llava: a captioner",
    )
    id: str | None = Field(
        None, description="blip, llava: hub id (or id@revision) or folder of the captioner; null: the default captioner"
    )
    prompt: str | None = Field(None, description="blip, llava: prompt for the captioner; null: the default prompt")
    tokens: PositiveInt = Field(48, description="blip, llava: largest number of generated tokens per caption")
    tries: PositiveInt = Field(
        3, description="blip, llava: number of attempts per caption, after which a real caption is used"
    )
    dtype: Precision = Field("float32", description="number format of the captioner's weights")


class EDGE(TunedMethod):
    card = "2509.15472"
    needs: ClassVar[tuple[Need, ...]] = ("features", "diffusion", "captioner")
    verified = (
        "Tests: all steps run with tiny random models of the published classes. Not verified (needs a GPU): what "
        "students learn from images that the published weights generate."
    )
    defaults = {
        "distill": {
            "phases": [{"pairs": 500, "iterations": 1}],
            "budget": 500,
            "similarity": {"kind": "identity"},
            "loss": "infonce",
        },
    }

    class Options(TunedMethod.Options):
        clip: str = Field(
            "openai/clip-vit-base-patch32", description="CLIP model that computes the losses: hub id or folder"
        )
        captions_per_image: PositiveInt = Field(2, description="cpi, number of pairs of the set that share an image")
        captioner: Captioning = Captioning()
        prefix: str = Field("", description="text put before the caption in the prompt of every image")
        tuning: EdgeTuning = EdgeTuning()
        sampling: Sampling = Sampling()

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options = cls.Options(**run.distill.options)
        if options.captions_per_image > 1 and options.captioner.kind == "none":
            return [
                "distill.options.captioner.kind none gives one caption per image; set "
                "distill.options.captions_per_image to 1, or choose a captioner"
            ]
        return []

    # -- pretrained models and training --------------------------------------------------------------------------------

    def parts(self) -> list[PretrainedModel]:
        options, models = self.options, [generator_part(self.options.generator)]
        nearest = self._needs_captions and options.captioner.kind == "nearest"
        if options.tuning.steps != 0 or nearest:
            models.append(clip_part(options.clip, "distill.options.clip: FOLDER"))
        if self._needs_captions and not nearest:
            models.append(self._captioner)
        return models

    @property
    def _needs_captions(self) -> bool:
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
        judge = Clip(clip.folder(), device)
        return EdgeTrainer(
            self.options.tuning,
            diffusion_of(generator.folder(), device),
            judge.model,
            judge.processor.tokenizer,
            train.split.captions,
            self.pictures(train),
            self.seed,
        )

    # -- making pairs ------------------------------------------------------------------------------------------------

    def rows(self, pairs: int) -> list[int]:
        """Return, for each image, the number of pairs that share it; the sum is `pairs`.

        If `captions_per_image` does not divide `pairs`, each remaining pair gets a separate image.
        """
        images, rest = divmod(pairs, self.options.captions_per_image)
        return [self.options.captions_per_image] * images + [1] * rest

    def make(self, studio: Studio, phase: int) -> None:
        options, split = self.options, studio.train.split
        rows = self.rows(studio.pairs)
        start = self.before(phase, lambda pairs: len(self.rows(pairs)))
        drawn = draws(self.seed, len(split.captions), len(rows), start)
        tuned, generator = self.tuned(studio), self.parts()[0]
        identity = generator.identity()
        requests: list[Values] = [
            {"caption": split.captions[r], "record": r, "number": start + k, "generator": identity}
            for k, r in enumerate(drawn)
        ]
        make = functools.partial(
            FromCaption, generator.folder(), studio.device, options.sampling, tuned, options.prefix
        )
        pictures = studio.draw(make, requests, batch=options.sampling.batch)
        added = self._added_captions(studio, pictures, drawn, rows)
        captions = [c for r, more in zip(drawn, added, strict=True) for c in (split.captions[r], *more.captions)]
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
                "caption_from": [source for more in added for source in ("drawn", *more.sources)],
                "answers_refused": sum(more.refused for more in added),
                "prompts_cut": cut_captions(generator.folder(), prompts),
            },
        )

    def _added_captions(
        self, studio: Studio, pictures: list[Path], drawn: list[int], rows: list[int]
    ) -> list[FurtherCaptions]:
        """Return, for each image, the captions to add to the caption from which it was generated."""
        if not self._needs_captions:
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
        """Return further captions for each image: the nearest real captions, by CLIP features of image and caption."""
        clip = self.parts()[1]
        texts = studio.features(f"clip:{self.options.clip}").texts
        nearest = nearest_captions(studio, clip.folder(), pictures, texts, max(rows))
        captions, added = studio.train.split.captions, []
        for record, count, near in zip(drawn, rows, nearest, strict=True):
            unique = dict.fromkeys(captions[int(r)] for r in near if captions[int(r)] != captions[record])
            if len(unique) < count - 1:
                raise ValueError(
                    f"an image needs {count} different captions, but its neighbours among the {len(captions)} real "
                    "captions hold fewer; lower distill.options.captions_per_image"
                )
            added.append(FurtherCaptions(list(unique)[: count - 1], ["real"] * (count - 1), 0))
        return added
