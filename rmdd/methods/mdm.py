"""MDM: multimodal distribution matching on the unit hypersphere (arXiv 2605.23482, CVPR 2026).

MDM moves the set until its features are distributed like the features of real pairs. A teacher model computes both
kinds of features and changes in every step. No student is unrolled. M is the number of distilled pairs; v and t are the
unit embeddings of an image and its text.

    start    cluster [v ; t] of all real pairs by k-means (cosine, K = M); take the pair nearest to each centre
    teacher  merge two random expert checkpoints w_1, w_2 around the anchor w_0, tensor by tensor:
             w* = w_0 + alpha c/(1 + c) (d_1 + d_2),  d_i = w_i - w_0,  c = cosine of d_1 and d_2
             (`rmdd.distill.distribution.merging`)
    loss     L = InfoNCE(distilled batch) + lambda_agr GKE(u real, u distilled) + lambda_dis GKE(g real, g distilled)
             u = (v + t)/|v + t| is the direction in which image and text agree, g = (v - t)/|v - t| the direction in
             which image and text differ; GKE is the energy distance of a Gaussian kernel of angles
             (`rmdd.distill.distribution.sphere`)
    update   SGD with momentum 0.5 on images and texts, their joint gradient clipped to norm 1

Where paper and released code differ we follow the paper (V-statistic, teacher in eval mode, 64 real pairs), with three
exceptions. Negative c are set to 0, because the factor c/(1 + c) diverges as c approaches -1. The anchor w_0 is always
the first expert at epoch 0; the code draws a new text head for the anchor in every iteration. A merged teacher embeds
the pairs for clustering, as in the code.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rmdd import config
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.config.runfile import Clash
from rmdd.core.device import local_device
from rmdd.core.seeding import derive, generator
from rmdd.distill.distribution import merging, sphere
from rmdd.distill.distribution.joint import Embedded, Side, nearest_pairs
from rmdd.distill.starts import check_enough, choose_records
from rmdd.distill.synthetic import Synthetic, enlarged, zeros_like
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model, kept_epochs
from rmdd.methods.distribution import DistributionMethod, Effort
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.prepared import PreparedSplit

POOL_BYTES = 4 * 2**30
"""Largest total size in bytes of the expert checkpoints held in memory."""


class MDM(DistributionMethod):
    class Options(DistributionMethod.Options):
        clip: PositiveFloat | None = Field(
            1.0,
            description="largest norm of the joint gradient of images and texts; a larger gradient is scaled down to "
            "this norm; null: no clipping",
        )
        real_batch: PositiveInt = Field(
            64, description="B_r, number of real pairs per draw; at most the whole train split"
        )
        synthetic_batch: PositiveInt = Field(64, description="B_s, number of distilled pairs per draw; at most B_r")
        cluster: Literal["joint", "image", "text", "random"] = Field(
            "joint",
            description="embeddings that are clustered to choose the initial pairs; random: draw the pairs; not used "
            "with distill.init: noise",
        )
        teacher: Literal["mixed", "weighted_sum", "naive", "expert", "pretrained"] = Field(
            "mixed",
            description="mixed: merge of two checkpoints; weighted_sum: anchor plus 0.2 to 0.5 of the way to an "
            "expert's last checkpoint; naive: anchor plus 0.1 to 0.9 of the way to any checkpoint; expert: one "
            "checkpoint; pretrained: the anchor",
        )
        partners: Literal["any", "same_expert"] = Field(
            "any",
            description="any: checkpoints of any experts, with epoch 0 of the first expert as the anchor; same_expert: "
            "checkpoints of one expert, with its epoch 0 as the anchor, for experts that start from different weights",
        )
        alpha: NonNegativeFloat = Field(0.5, description="mixed: alpha in the formula of the merge; 0 gives the anchor")
        positive_cosine: bool = Field(
            True, description="mixed: replace a negative cosine c by 0; false: keep it, as released"
        )
        first_epoch: PositiveInt = Field(1, description="checkpoints are drawn from this expert epoch and later ones")
        resample_every: PositiveInt = Field(1, description="number of iterations after which a new teacher is drawn")
        teacher_dropout: bool = Field(False, description="apply the heads' dropout in the teacher, as released")
        agreement: NonNegativeFloat = Field(
            0.8, description="lambda_agr, weight of the energy distance between agreement directions"
        )
        discrepancy: NonNegativeFloat = Field(
            0.8, description="lambda_dis, weight of the energy distance between difference directions"
        )
        contrastive: NonNegativeFloat = Field(1.0, description="weight of the contrastive loss (InfoNCE)")
        kernel: sphere.Kernel = Field(
            "geodesic",
            description="kernel of both energy distances; geodesic: Gaussian of angles; chordal: Gaussian of chords",
        )
        sigma: PositiveFloat = Field(0.5, description="width of the kernel, in radians")
        statistic: sphere.Statistic = Field(
            "v",
            description="v: average the kernel over all pairs of points; u: leave out pairs of a point with itself, "
            "like the released code",
        )
        root: bool = Field(True, description="take the square root of the energy distances, as in the paper")

        def clashes(self) -> list[Clash]:
            small = [n for n in ("real_batch", "synthetic_batch") if getattr(self, n) < 2]
            return [Clash(f"{n} is 1, but a single pair has no negatives; set it to 2 or more", n) for n in small]

    options: Options

    reference = "mdm"
    card = "2605.23482"
    verified = (
        "Tests: the loss terms equal those of slow implementations, and a resumed run gives the same bits. On emoji "
        "pairs, the method runs. Not verified: the published numbers, which need NFNet, BERT and a GPU."
    )
    defaults = {
        "experts": {"keep": "all"},
        "distill": {
            "phases": [{"pairs": 100, "iterations": 3000}],
            "loss": "infonce",
            "similarity": {"kind": "identity"},
            "lr_image": 1000.0,
            "lr_text": 1000.0,
            "momentum": 0.5,
            "ema": 0.0,
        },
    }

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options, mistakes = cls.Options(**run.distill.options), []
        apart = options.teacher not in ("expert", "pretrained") and options.partners == "any"
        if apart and run.model.image.trainable and run.model.image.weights == "random":
            mistakes.append(
                "distill.method mdm averages experts that start from the same weights, but model.image.weights: random "
                "draws new ones for each expert; set random:SEED, pretrained or a weights file, or "
                "distill.options.partners: same_expert"
            )
        if options.first_epoch > run.experts.epochs:
            mistakes.append(
                f"distill.options.first_epoch {options.first_epoch} is larger than experts.epochs "
                f"{run.experts.epochs}; lower it"
            )
        elif options.teacher == "mixed":
            stored = kept_epochs(run.experts, run.endpoints) or range(1, run.experts.epochs + 1)
            epochs = sum(e >= options.first_epoch for e in stored)
            if epochs * (1 if options.partners == "same_expert" else run.experts.num) < 2:
                mistakes.append(
                    "distill.method mdm merges two expert checkpoints, but the store would hold one; raise experts.num "
                    "or set experts.keep: all"
                )
        if run.distill.init in ("prototypes", "mean_captions"):
            mistakes.append(
                f"distill.init: {run.distill.init} is not available for mdm; set distill.options.cluster: joint instead"
            )
        return mistakes

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]:
        pairs, side = self.rule.phases[phase].pairs, self.options.cluster
        if self.rule.init == "noise" or side == "random":
            return choose_records(phase, pairs, train, self.seed)
        assert store is not None
        check_enough(phase, pairs, train)
        device = local_device(self.run.runtime)
        model = expert_model(
            self.run.model, self.run.data.image_size, self.run.seed_of("experts"), 0, train.texts.shape[1]
        )
        Teacher(self, phase, store, model, device).load_initial()
        embedded = Embedded.by(model, train, device, _side(side))
        return nearest_pairs(embedded, pairs, generator(self.seed, "mdm clusters", phase))

    def effort(self, phase: int, records: int) -> Effort:
        draws, real = self.options.draws, min(self.options.real_batch, records)
        distilled = min(real, self.options.synthetic_batch, self.rule.phases[phase].pairs)
        # memory holds 5 copies of the parameters: the anchor, two checkpoints, their merge, the teacher
        return Effort(draws * real, draws * distilled, distilled, models=5)

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> "MDMObjective":
        return MDMObjective(self, phase, store, train, model, device)


def _side(name: str) -> Side:
    return "image" if name == "image" else "text" if name == "text" else "joint"


class Teacher:
    """The model that embeds pairs. Merged checkpoints replace its parameters in place; no parameter gets a gradient."""

    def __init__(self, method: MDM, phase: int, store: Store, model: DualEncoder, device: torch.device):
        self.options, self.phase, self.seed = method.options, phase, method.seed
        num = method.run.experts.num
        experts = [e for e in store.complete() if e < num]
        if len(experts) < num:
            raise ValueError(
                f"the run needs {num} experts, but the store at {store.path} holds {len(experts)} finished ones; "
                "train the rest with `rmdd experts`"
            )
        epochs = [e for e in store.kept_epochs if e >= self.options.first_epoch]
        self.pool = merging.Pool(store, experts, epochs, POOL_BYTES)
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self._trained = {n: p for n, p in model.named_parameters() if n in store.shapes}
        self._anchor: Params | None = None
        self._current: tuple[int, int] | None = None

    def load_initial(self) -> None:
        """Load the teacher that embeds the real pairs for clustering."""
        random = generator(self.seed, "mdm first teacher", self.phase)
        self._load(random, share=0.5)

    def load_draw(self, iteration: int, draw: int) -> None:
        """Load the teacher for draw number `draw` of an iteration, unless it is already loaded."""
        key = (iteration // self.options.resample_every, draw)
        if key != self._current:
            self._load(generator(self.seed, "mdm teacher", self.phase, *key))
            self._current = key

    def _load(self, random: torch.Generator, share: float | None = None) -> None:
        """Draw a random teacher and load its parameters. Teachers of the kinds weighted_sum and naive lie on the line
        from the anchor to a checkpoint; `share` is the fraction of the way (None: a random fraction)."""
        kind, pool = self.options.teacher, self.pool

        def random_cell(epochs: list[int]) -> merging.Cell:
            places = [int(torch.randint(len(among), (1,), generator=random)) for among in (pool.experts, epochs)]
            return merging.Cell(pool.experts[places[0]], epochs[places[1]])

        if kind == "mixed":
            params = self._mixed(random)
        elif kind == "pretrained":
            params = self._start(pool.experts[0])
        elif kind == "expert":
            params = self._read(random_cell(pool.epochs))
        else:
            last, low, high = (True, 0.2, 0.5) if kind == "weighted_sum" else (False, 0.1, 0.9)
            cell = random_cell(pool.epochs[-1:] if last else pool.epochs)
            drawn = low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))
            anchor = self._start(cell.expert if self.options.partners == "same_expert" else pool.experts[0])
            params = merging.interpolated(anchor, self._read(cell), drawn if share is None else share)
        for name, p in self._trained.items():
            p.copy_(params[name])

    def _mixed(self, random: torch.Generator) -> Params:
        pool, options = self.pool, self.options
        within = options.partners == "same_expert"
        first, second = merging.draw_two(pool.experts, pool.epochs, random, within=within)
        anchor = self._start(first.expert if within else pool.experts[0])
        checkpoints = self._read(first), self._read(second)
        return merging.merge(anchor, *checkpoints, options.alpha, positive=options.positive_cosine)

    def _read(self, cell: merging.Cell) -> Params:
        return {n: p.to(self.device, non_blocking=True) for n, p in self.pool.read(cell).items()}

    def _start(self, expert: int) -> Params:
        """Return the parameters of `expert` at epoch 0; with `partners: any`, repeat the result of the first call."""
        if self.options.partners == "same_expert":
            return self._read(merging.Cell(expert, 0))
        if self._anchor is None:
            self._anchor = self._read(merging.Cell(expert, 0))
        return self._anchor


class MDMObjective:
    """Loss of MDM for one draw: a teacher, a batch of real pairs, a batch of distilled pairs. It trains no model."""

    def __init__(
        self, method: MDM, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ):
        self.run, self.options, self.phase, self.seed = method.run, method.options, phase, method.seed
        self.teacher = Teacher(method, phase, store, model, device)
        self.model, self.train, self.device = model, train, device
        self.temperature = method.rule.temperature or method.run.model.temperature

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        self.teacher.load_draw(iteration, draw)
        place = (self.phase, iteration, draw)
        random, options = generator(self.seed, "mdm batches", *place), self.options
        total = len(self.train.split.captions)
        real = torch.randperm(total, generator=random)[: options.real_batch].numpy()
        most = min(len(real), options.synthetic_batch, synthetic.pairs)
        rows = torch.randperm(synthetic.pairs, generator=random)[:most].to(self.device)
        leaves = [t[rows].detach().requires_grad_() for t in (synthetic.images, synthetic.texts)]
        with self._masks(derive(self.seed, "mdm dropout", *place)), self._precision():
            with torch.no_grad():
                texts = torch.from_numpy(np.array(self.train.texts[real]))
                pictures = self.train.pictures(self.train.split.image_of[real], self.device)
                real_features = self._embed(pictures.to(leaves[0]), texts.to(leaves[1]))
            features = self._embed(enlarged(leaves[0], self.run.data.image_size), leaves[1])
        terms = self.terms(real_features, features)
        loss = options.contrastive * terms["loss_nce"]
        loss = loss + options.agreement * terms["loss_agreement"] + options.discrepancy * terms["loss_discrepancy"]
        grads = torch.autograd.grad(loss, leaves)
        zero = zeros_like(synthetic)
        named = {n: t.index_copy(0, rows, g) for n, t, g in zip(("images", "texts"), _both(zero), grads, strict=True)}
        values = dict(zip(["loss", *terms], torch.stack([loss, *terms.values()]).tolist(), strict=True))
        return zero.with_tensors(zero.tensors() | named), values

    def terms(self, real: tuple[Tensor, Tensor], distilled: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the unweighted loss terms. Each argument is a tuple of image and text embeddings of unit length."""
        o = self.options
        terms = {"loss_nce": sphere.contrastive(*distilled, self.temperature)}
        for name, joint in (("agreement", sphere.agreement), ("discrepancy", sphere.discrepancy)):
            terms[f"loss_{name}"] = sphere.energy(
                joint(*real), joint(*distilled), o.sigma, o.kernel, o.statistic, o.root
            )
        return terms

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        pass

    def _embed(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(texts.dtype, torch.float32)
        return self.model.embed_images(images).to(dtype), self.model.embed_texts(texts).to(dtype)

    @contextlib.contextmanager
    def _masks(self, seed: int) -> Iterator[None]:
        """Apply the teacher's dropout with masks drawn from `seed`, if `teacher_dropout` is set."""
        if not self.options.teacher_dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context in which the towers run.

        Compute kernels outside this context, in float32, because bfloat16 rounds a cosine of 1 - 1e-6 to 1.
        """
        low = self.run.distill.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()


def _both(synthetic: Synthetic) -> tuple[Tensor, Tensor]:
    return synthetic.images, synthetic.texts
