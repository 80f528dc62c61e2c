"""MDM: multimodal distribution matching on the unit hypersphere (arXiv 2605.23482, CVPR 2026).

No student is unrolled: the set is moved so that its features lie as real ones do under a teacher that is another one in
every step. M pairs, B_r and B_s real and synthetic pairs of a batch, v and t unit embeddings of image and text.

    start    k-means (cosine, K = M) on [v ; t] of all real pairs; per cluster the pair nearest to its centre
    teacher  w* = w_0 + alpha c/(1+c) (d_1 + d_2) per tensor, of two random checkpoints (`distribution.merging`)
    loss     nce + lambda_agr GKE(u real, u synthetic) + lambda_dis GKE(g real, g synthetic), with the directions in
             which image and text agree, u = (v + t)/|v + t|, and differ, g = (v - t)/|v - t|, and GKE the energy of a
             Gaussian kernel of angles (`distribution.sphere`); nce, the contrastive loss of the synthetic pairs
    step     joint gradient cut to norm 1, SGD with momentum 0.5 on images and texts; the set has no other tensors

Paper where paper and code differ (V-statistic, teacher in eval mode, 64 real pairs), but for three traps: c is kept
above 0, below which the ratio blows up; the anchor w_0 is one fixed start, that of the store's first expert, where the
code draws a new text head in every iteration; and pairs to begin with are found by a merged teacher, as in the code.
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
"""Checkpoints held in memory at most."""


class MDM(DistributionMethod):
    class Options(DistributionMethod.Options):
        clip: PositiveFloat | None = Field(1.0, description="joint norm that the gradient is cut to; null: none")
        real_batch: PositiveInt = Field(64, description="real pairs B_r of a step; fewer where there are fewer")
        synthetic_batch: PositiveInt = Field(64, description="pairs of the set in a step, B_s; never more than B_r")
        cluster: Literal["joint", "image", "text", "random"] = Field(
            "joint",
            description="embeddings that the pairs to begin with are found by; distill.init: noise begins without",
        )
        teacher: Literal["mixed", "weighted_sum", "naive", "expert", "pretrained"] = Field(
            "mixed",
            description="mixed; or a checkpoint's weighted sum with the anchor (weighted_sum: the last, share in [0.2, "
            "0.5]; naive: any, in [0.1, 0.9]), a checkpoint, or the anchor alone",
        )
        partners: Literal["any", "same_expert"] = Field(
            "any",
            description="mixed: two checkpoints of the pool, around the first expert's start; or two of one expert, "
            "around its own, where heads start apart. Sums: whose start the anchor is",
        )
        alpha: NonNegativeFloat = Field(0.5, description="mixed: share of the way from the anchor")
        positive_cosine: bool = Field(
            True, description="mixed: count opposed displacements as orthogonal; false: as coded"
        )
        first_epoch: PositiveInt = Field(1, description="of the checkpoints drawn from")
        resample_every: PositiveInt = Field(1, description="iterations with one teacher")
        teacher_dropout: bool = Field(False, description="keep the heads' dropout on, as coded")
        agreement: NonNegativeFloat = Field(0.8, description="weight of the energy of agreement features")
        discrepancy: NonNegativeFloat = Field(0.8, description="weight of the energy of discrepancy features")
        contrastive: NonNegativeFloat = Field(1.0, description="weight of the contrastive term")
        kernel: sphere.Kernel = Field("geodesic", description="of both energies; chordal: Gaussian of the chord")
        sigma: PositiveFloat = Field(0.5, description="width of the kernel, in radians")
        statistic: sphere.Statistic = Field("v", description="u leaves the diagonal out, as coded")
        root: bool = Field(True, description="of the energies, as printed; false: squared")

        def clashes(self) -> list[Clash]:
            small = [n for n in ("real_batch", "synthetic_batch") if getattr(self, n) < 2]
            return [Clash(f"{n} is 1: a pair alone has no negatives; give at least 2", n) for n in small]

    options: Options

    reference = "mdm"
    card = "2605.23482"
    verified = "terms against slow versions, resuming, emoji pairs; the published numbers need NFNet, BERT and a GPU"
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
                "distill.method mdm averages experts, but model.image.weights: random starts every tower elsewhere; "
                "set random:SEED, pretrained or a weights file, or distill.options.partners: same_expert"
            )
        if options.first_epoch > run.experts.epochs:
            mistakes.append(
                f"distill.options.first_epoch {options.first_epoch} lies past the last of experts.epochs "
                f"{run.experts.epochs}; lower it"
            )
        elif options.teacher == "mixed":
            kept = kept_epochs(run.experts, run.endpoints) or range(1, run.experts.epochs + 1)
            epochs = sum(e >= options.first_epoch for e in kept)
            if epochs * (1 if options.partners == "same_expert" else run.experts.num) < 2:
                mistakes.append(
                    "distill.method mdm mixes two checkpoints of its experts and would find one; raise experts.num, or "
                    "set experts.keep: all"
                )
        if run.distill.init == "prototypes":
            mistakes.append(
                "distill.init: prototypes is a choice of its own; set distill.options.cluster: joint instead"
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
        Teacher(self, phase, store, model, device).begin()
        embedded = Embedded.by(model, train, device, _side(side))
        return nearest_pairs(embedded, pairs, generator(self.seed, "mdm clusters", phase))

    def effort(self, phase: int, records: int) -> Effort:
        draws, real = self.options.draws, min(self.options.real_batch, records)
        made = min(real, self.options.synthetic_batch, self.rule.phases[phase].pairs)
        return Effort(draws * real, draws * made, made, models=5)  # anchor, two checkpoints, their mean, the teacher

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> "MDMObjective":
        return MDMObjective(self, phase, store, train, model, device)


def _side(name: str) -> Side:
    return "image" if name == "image" else "text" if name == "text" else "joint"


class Teacher:
    """The model of a step, whose trained parameters are set in place; it takes no gradient itself."""

    def __init__(self, method: MDM, phase: int, store: Store, model: DualEncoder, device: torch.device):
        self.options, self.phase, self.seed = method.options, phase, method.seed
        num = method.run.experts.num
        experts = [e for e in store.complete() if e < num]
        if len(experts) < num:
            raise ValueError(
                f"the run asks for {num} experts but the store at {store.path} holds {len(experts)} finished ones; "
                "train the rest with `rmdd experts`"
            )
        epochs = [e for e in store.kept_epochs if e >= self.options.first_epoch]
        self.pool = merging.Pool(store, experts, epochs, POOL_BYTES)
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self._own = {n: p for n, p in model.named_parameters() if n in store.shapes}
        self._anchor: Params | None = None
        self._now: tuple[int, int] | None = None

    def begin(self) -> None:
        """The teacher that the pairs to begin with are found by."""
        random = generator(self.seed, "mdm first teacher", self.phase)
        self._set(random, share=0.5)

    def turn(self, iteration: int, draw: int) -> None:
        """The teacher of a draw."""
        now = (iteration // self.options.resample_every, draw)
        if now != self._now:
            self._set(generator(self.seed, "mdm teacher", self.phase, *now))
            self._now = now

    def _set(self, random: torch.Generator, share: float | None = None) -> None:
        kind, pool = self.options.teacher, self.pool

        def one(epochs: list[int]) -> merging.Cell:
            places = [int(torch.randint(len(among), (1,), generator=random)) for among in (pool.experts, epochs)]
            return merging.Cell(pool.experts[places[0]], epochs[places[1]])

        if kind == "mixed":
            params = self._mixed(random)
        elif kind == "pretrained":
            params = self._start(pool.experts[0])
        elif kind == "expert":
            params = self._read(one(pool.epochs))
        else:
            last, low, high = (True, 0.2, 0.5) if kind == "weighted_sum" else (False, 0.1, 0.9)
            cell = one(pool.epochs[-1:] if last else pool.epochs)
            drawn = low + (high - low) * float(torch.rand((), generator=random, dtype=torch.float64))
            anchor = self._start(cell.expert if self.options.partners == "same_expert" else pool.experts[0])
            params = merging.interpolated(anchor, self._read(cell), drawn if share is None else share)
        for name, p in self._own.items():
            p.copy_(params[name])

    def _mixed(self, random: torch.Generator) -> Params:
        pool, options = self.pool, self.options
        within = options.partners == "same_expert"
        first, second = merging.draw_two(pool.experts, pool.epochs, random, within=within)
        anchor = self._start(first.expert if within else pool.experts[0])
        found = self._read(first), self._read(second)
        return merging.merge(anchor, *found, options.alpha, positive=options.positive_cosine)

    def _read(self, cell: merging.Cell) -> Params:
        return {n: p.to(self.device, non_blocking=True) for n, p in self.pool.read(cell).items()}

    def _start(self, expert: int) -> Params:
        """Where an expert began; the one anchor of all stays on the device."""
        if self.options.partners == "same_expert":
            return self._read(merging.Cell(expert, 0))
        if self._anchor is None:
            self._anchor = self._read(merging.Cell(expert, 0))
        return self._anchor


class MDMObjective:
    """The loss of one draw: a teacher, a real and a synthetic batch. It learns nothing itself."""

    def __init__(
        self, method: MDM, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ):
        self.run, self.options, self.phase, self.seed = method.run, method.options, phase, method.seed
        self.teacher = Teacher(method, phase, store, model, device)
        self.model, self.train, self.device = model, train, device
        self.temperature = method.rule.temperature or method.run.model.temperature

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        self.teacher.turn(iteration, draw)
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
                seen = self._embed(pictures.to(leaves[0]), texts.to(leaves[1]))
            made = self._embed(enlarged(leaves[0], self.run.data.image_size), leaves[1])
        parts = self.parts(seen, made)
        loss = options.contrastive * parts["loss_nce"]
        loss = loss + options.agreement * parts["loss_agreement"] + options.discrepancy * parts["loss_discrepancy"]
        moved = torch.autograd.grad(loss, leaves)
        zero = zeros_like(synthetic)
        named = {n: t.index_copy(0, rows, g) for n, t, g in zip(("images", "texts"), _both(zero), moved, strict=True)}
        told = dict(zip(["loss", *parts], torch.stack([loss, *parts.values()]).tolist(), strict=True))
        return zero.with_tensors(zero.tensors() | named), told

    def parts(self, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss from unit embeddings of images and texts."""
        o = self.options
        found = {"loss_nce": sphere.contrastive(*made, self.temperature)}
        for name, joint in (("agreement", sphere.agreement), ("discrepancy", sphere.discrepancy)):
            found[f"loss_{name}"] = sphere.energy(joint(*real), joint(*made), o.sigma, o.kernel, o.statistic, o.root)
        return found

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
        """Dropout of its own seed, or none."""
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
        """Kernels stay in float32: in bfloat16 a cosine of 1 - 1e-6 is 1."""
        low = self.run.distill.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()


def _both(synthetic: Synthetic) -> tuple[Tensor, Tensor]:
    return synthetic.images, synthetic.texts
