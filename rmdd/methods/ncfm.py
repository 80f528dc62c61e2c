"""NCFM: neural characteristic function matching (CVPR 2025), on pairs by clusters in the place of classes.

Real pairs are clustered by k-means of their joint features f = [v ; t] / sqrt 2 (unit v, t of a final expert). Each of
C clusters gets ipc pairs, and these should have its whole distribution of features, compared by characteristic
functions at T frequencies (`rmdd.distill.distribution.characteristic`):

    encoder    (1 - b) theta_0 + b theta_n of one expert, b ~ U(0,1), anew for every draw
    maximise   psi, which makes the frequencies, takes a step on -NCFD            (network: true)
    minimise   the pairs take one on  scale * sum over clusters of NCFD(R_c, S_c) + InfoNCE of all pairs in a final
               expert, for nothing else here separates clusters
    halve      both rates, each by its own, when the loss has not fallen for `patience` steps

From the appendix of PTM-ST (arXiv 2603.25388, E), the only published attempt on pairs, at the level of random pairs.
Where paper and code of the original differ: rows of psi scale fresh noise (`repeat` as released), two forwards with
psi first, a scheduler of psi's own. psi moves between the steps of the set, on the batch and encoder of the next one,
so the first step sees it as drawn. With one pair a cluster this is little more than matching of means: no modulus can
change.
"""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rmdd import config
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.core.arrays import in_chunks
from rmdd.core.device import local_device
from rmdd.core.seeding import derive, generator
from rmdd.distill.distribution.characteristic import FrequencyNet, frequency_count_error, ncfd
from rmdd.distill.distribution.chunks import LossOf, gradient_in_chunks
from rmdd.distill.distribution.classes import clusters_of, initial_pairs
from rmdd.distill.distribution.learned import load_tensors, tensors_of
from rmdd.distill.synthetic import Synthetic, enlarged, zeros_like
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.methods.distribution import DistributionMethod, Effort
from rmdd.models.dual import DualEncoder, Params
from rmdd.models.losses import infonce
from rmdd.models.prepared import PreparedSplit

_logger = logging.getLogger(__name__)

LABELS, PLATEAU = "labels", "plateau"
KEPT = 8
"""Checkpoints of experts held in memory."""


class NCFM(DistributionMethod):
    needs = ("experts",)
    card = "CVPR 2025"
    verified = "losses and gradients equal slow float64 ones, network and resume checked. Open: published figures"
    defaults = {
        "experts": {"keep": "endpoints"},
        "distill": {
            "phases": [{"pairs": 100, "iterations": 2000}],
            "similarity": {"kind": "identity"},
            "loss": "infonce",
            "lr_image": 0.1,
            "lr_text": 0.1,
            "momentum": 0.5,
            "ema": 0.0,
        },
    }

    class Options(DistributionMethod.Options):
        clusters: PositiveInt | None = Field(
            None, description="C, each with pairs / C of the pairs; null: one for every pair; 1: no clusters"
        )
        pick: Literal["nearest", "random"] = Field(
            "nearest", description="initial pairs of a cluster: nearest to its centre, or drawn as published"
        )
        frequencies: PositiveInt = Field(512, description="T, of a draw; the original: 1024 and 4096")
        network: bool = Field(False, description="frequencies by a min-max network; false: from N(0, I)")
        network_norm: Literal["layer", "batch"] = Field(
            "layer", description="of the network; batch, as released, needs at least 32 frequencies"
        )
        network_optimiser: Literal["adam", "sgd"] = Field("adam", description="of the network")
        lr_network: NonNegativeFloat = Field(1e-3, description="rate of the network")
        repeat: bool = Field(False, description="each row of the network 16 times without noise, as released")
        learned_scale: bool = Field(False, description="one learned factor on all frequencies of the network")
        w_amplitude: NonNegativeFloat = Field(0.5, description="weight of the difference of moduli")
        w_phase: NonNegativeFloat = Field(0.5, description="weight of the difference of angles")
        scale: PositiveFloat = Field(300.0, description="of the discrepancy; belongs with the rates")
        real_batch: Annotated[int, Field(ge=2)] = Field(1024, description="real pairs of a cluster in a draw, at most")
        subset: PositiveInt | None = Field(
            None, description="clusters drawn for a step, whose loss counts for all; null: all of them"
        )
        project: PositiveInt | None = Field(
            None, description="width of a random projection of the features; null: as they are"
        )
        calibration: NonNegativeFloat = Field(1.0, description="weight of InfoNCE of the pairs in a final expert")
        calibration_batch: Annotated[int, Field(ge=2)] = Field(128, description="pairs that it is taken of, at most")
        patience: PositiveInt | None = Field(
            500, description="steps without a lower loss after which rates are halved; null: never"
        )
        chunk: PositiveInt = Field(64, description="pairs that go through the towers at once")

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options, found = cls.Options(**run.distill.options), []
        for p, plan in enumerate(run.distill.phases):
            clusters = options.clusters or plan.pairs
            if plan.pairs % clusters:
                found.append(
                    f"distill.phases.{p}.pairs {plan.pairs} cannot be shared by distill.options.clusters {clusters}; "
                    "make it a multiple"
                )
            if options.subset and options.subset > clusters:
                found.append(f"distill.options.subset {options.subset} is more than the {clusters} clusters; lower it")
        if options.network and (wrong := frequency_count_error(options.frequencies, options.network_norm)):
            found.append(f"distill.options.frequencies: {wrong}")
        if not options.network and (options.repeat or options.learned_scale):
            found.append("distill.options.repeat and learned_scale are of the network; set network: true")
        if options.w_amplitude == options.w_phase == 0:
            found.append("distill.options: w_amplitude and w_phase are both 0; set one of them above")
        if run.distill.init == "prototypes":
            found.append("distill.init: prototypes is a choice of its own; set distill.options.pick: nearest instead")
        if run.distill.precision != "float32":
            found.append("distill.method ncfm takes cosines of large angles; set distill.precision: float32")
        return found

    def shape(self, phase: int) -> tuple[int, int]:
        """Clusters and pairs of each."""
        pairs = self.rule.phases[phase].pairs
        clusters = self.options.clusters or pairs
        return clusters, pairs // clusters

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]:
        assert store is not None, "clusters are those of an expert's features"
        clusters, ipc = self.shape(phase)
        points, labels = self.clustered(phase, train, store)
        seed = derive(self.seed, "clusters", phase)
        return initial_pairs(points, train.split.image_of, labels, clusters, ipc, self.options.pick, seed)

    def clustered(self, phase: int, train: PreparedSplit, store: Store) -> tuple[np.ndarray, np.ndarray]:
        """The joint features of all records in the first final expert, and the cluster of each."""
        device, expert = local_device(self.run.runtime), store.complete()[0]
        model = (
            expert_model(
                self.run.model, self.run.data.image_size, self.run.seed_of("experts"), expert, train.texts.shape[1]
            )
            .to(device)
            .eval()
        )
        model.load_trained(store.read(expert, store.epochs))
        clusters, ipc = self.shape(phase)
        projection = self.projection(phase, model, device)
        points = np.empty((len(train.texts), self.width(model)), dtype=np.float32)
        with torch.no_grad():
            every = np.arange(len(train.split))
            images = in_chunks(lambda rows: model.embed_images(train.pictures(rows, device)), every, self.options.chunk)
            for rows in np.array_split(np.arange(len(points)), max(1, len(points) // 4096)):
                texts = model.embed_texts(torch.tensor(train.texts[rows]).to(device))
                points[rows] = joint(images[train.split.image_of[rows]], texts, projection).cpu().numpy()
        seed = derive(self.seed, "clusters", phase)
        return points, clusters_of(points, train.split.image_of, clusters, ipc, seed)

    def width(self, model: DualEncoder) -> int:
        """Of what is compared."""
        return self.options.project or self._joint_width(model)

    def _joint_width(self, model: DualEncoder) -> int:
        own, rule = int(model.image_tower.width), self.run.model  # type: ignore[arg-type]
        return 2 * (own if rule.image.projection == "none" else rule.width or own)

    def projection(self, phase: int, model: DualEncoder, device: torch.device) -> Tensor | None:
        """A random one that keeps lengths on average, or None."""
        if (width := self.options.project) is None:
            return None
        drawn = torch.randn(self._joint_width(model), width, generator=generator(self.seed, "projection", phase))
        return (drawn / width**0.5).to(device)

    def effort(self, phase: int, records: int) -> Effort:
        options, chunk = self.options, self.options.chunk
        clusters, ipc = self.shape(phase)
        seen = min(options.subset or clusters, clusters)
        real, made = seen * min(options.real_batch, -(-records // clusters)), seen * ipc
        other = min(options.calibration_batch, clusters * ipc) if options.calibration else 0
        forward = options.draws * (real + sum(n for n in (made, other) if n > chunk))
        if options.network or options.patience:
            forward += made  # of the next step, whose first draw sees these real features too
        at_once = min(chunk, max(made, other))
        return Effort(forward, options.draws * (made + other), at_once, models=1 + min(KEPT, 2 * self.run.experts.num))

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> CharacteristicMatching:
        return CharacteristicMatching(self, phase, store, train, model, device)


def joint(images: Tensor, texts: Tensor, projection: Tensor | None) -> Tensor:
    """Unit features of images and texts side by side, unit length again, projected."""
    both = torch.cat([images, texts], dim=1) / 2**0.5
    return both if projection is None else both @ projection


class Plateau:
    """Counts steps since the lowest loss; every `patience` of them is a halving."""

    def __init__(self, patience: int | None):
        self.patience, self.best, self.since, self.halvings = patience, float("inf"), 0, 0

    def see(self, loss: float) -> None:
        self.since += 1
        if loss < self.best:
            self.best, self.since = loss, 0
        if self.patience is not None and self.since >= self.patience:
            self.since, self.halvings = 0, self.halvings + 1
            _logger.info("no lower loss for %d steps; rates halved", self.patience)

    def tensor(self) -> Tensor:
        return torch.tensor([self.best, self.since, self.halvings], dtype=torch.float64)

    def load(self, kept: Tensor) -> None:
        self.best, self.since, self.halvings = float(kept[0]), int(kept[1]), int(kept[2])


class CharacteristicMatching:
    """The objective of one phase: encoders to look through, clusters to match, and the network psi."""

    def __init__(
        self, method: NCFM, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ):
        self.method, self.rule, self.seed, self.phase = method, method.options, method.seed, phase
        self.store, self.train, self.device = store, train, device
        self.model = model.to(device).eval()
        self.clusters, self.ipc = method.shape(phase)
        self.projection, self.width = method.projection(phase, model, device), method.width(model)
        self.plateau = Plateau(self.rule.patience)
        self._labels: np.ndarray | None = None
        self._ends: dict[tuple[int, int], Params] = {}
        self._ahead: tuple[int, list[Tensor]] | None = None
        """An iteration, and the real features that its first draw sees."""
        self.temperature = method.run.distill.temperature or method.run.model.temperature
        self.psi: FrequencyNet | None = None
        if self.rule.network:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(self.seed, "frequency network", phase))
                rule = self.rule
                self.psi = FrequencyNet(
                    self.width, rule.network_norm, repeat=rule.repeat, learned_scale=rule.learned_scale
                )
            self.psi.to(device)
            trained = [p for p in self.psi.parameters() if p.requires_grad]
            kind = torch.optim.Adam if self.rule.network_optimiser == "adam" else torch.optim.SGD
            self.optimiser = kind(trained, lr=self.rule.lr_network)

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            self._labels = self.method.clustered(self.phase, self.train, self.store)[1]
        return self._labels

    def _load(self, what: str, iteration: int, draw: int) -> None:
        """Make the model a blend of an expert's two ends, or a final expert."""
        random = generator(self.seed, what, self.phase, iteration, draw)
        experts = self.store.complete()[: self.method.run.experts.num]
        expert = experts[int(torch.randint(len(experts), (), generator=random))]
        end = self._read(expert, self.store.epochs)
        if what == "blend":
            share, begin = float(torch.rand((), generator=random)), self._read(expert, 0)
            end = {name: (1 - share) * begin[name] + share * p for name, p in end.items()}
        self.model.load_trained(end)

    def _read(self, expert: int, epoch: int) -> Params:
        if (expert, epoch) not in self._ends:
            while len(self._ends) >= KEPT:
                self._ends.pop(next(iter(self._ends)))
            self._ends[expert, epoch] = self.store.read(expert, epoch)
        return self._ends[expert, epoch]

    def _frequencies(self, iteration: int, draw: int) -> Tensor:
        random = generator(self.seed, "frequencies", self.phase, iteration, draw)
        if self.psi is not None:
            return self.psi(self.rule.frequencies, random)
        return torch.randn(self.rule.frequencies, self.width, generator=random).to(self.device)

    def _subset(self, iteration: int, draw: int) -> list[int]:
        """The clusters of a draw."""
        if self.rule.subset is None:
            return list(range(self.clusters))
        random = generator(self.seed, "clusters of a step", self.phase, iteration, draw)
        return sorted(torch.randperm(self.clusters, generator=random)[: self.rule.subset].tolist())

    def _real(self, clusters: list[int], iteration: int, draw: int) -> list[Tensor]:
        """Joint features of a real batch of each cluster."""
        batches = []
        for c in clusters:
            random = generator(self.seed, "real batch", self.phase, iteration, draw, c)
            own = np.flatnonzero(self.labels == c)
            batches.append(
                own[torch.randperm(len(own), generator=random)[: self.rule.real_batch].sort().values.numpy()]
            )

        def embedded(rows: np.ndarray) -> Tensor:
            pixels = self.train.pictures(self.train.split.image_of[rows], self.device)
            texts = torch.tensor(self.train.texts[rows]).to(self.device)
            return joint(*self._encode(pixels, texts), self.projection)

        with torch.no_grad():
            found = in_chunks(embedded, np.concatenate(batches), self.rule.chunk)
        return list(found.split([len(b) for b in batches]))

    def _encode(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        pixels = enlarged(images, self.method.run.data.image_size)
        return self.model.embed_images(pixels), self.model.embed_texts(texts)

    def _rows(self, clusters: list[int]) -> Tensor:
        """The synthetic pairs of some clusters."""
        index = torch.arange(self.clusters * self.ipc).view(self.clusters, self.ipc)
        return index[clusters].flatten().to(self.device)

    def _discrepancy(self, real: list[Tensor], points: Tensor, frequencies: Tensor) -> Tensor:
        """The mean over the clusters given; `points` are those of the set, cluster by cluster."""
        weights = self.rule.w_amplitude, self.rule.w_phase
        each = [ncfd(r, s, frequencies, *weights) for r, s in zip(real, points.split(self.ipc), strict=True)]
        return torch.stack(each).mean()

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        self._load("blend", iteration, draw)
        clusters = self._subset(iteration, draw)
        with torch.no_grad():
            ahead = self._ahead if draw == 0 and self._ahead and self._ahead[0] == iteration else None
            real = ahead[1] if ahead else self._real(clusters, iteration, draw)
            frequencies = self._frequencies(iteration, draw)

        def matched(images: Tensor, texts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            each = self._discrepancy(real, joint(images, texts, self.projection), frequencies)
            loss = self.rule.scale * self.clusters * each
            return loss, {"loss_ncfd": loss, "discrepancy": each}

        found = zeros_like(synthetic)
        parts = self._add(found, synthetic, self._rows(clusters), matched)
        total = parts["loss_ncfd"]
        if self.rule.calibration:
            self._load("calibration", iteration, draw)
            random = generator(self.seed, "calibration batch", self.phase, iteration, draw)
            rows = torch.randperm(synthetic.pairs, generator=random)[: self.rule.calibration_batch]

            def apart(u: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss = self.rule.calibration * infonce(u @ v.T / self.temperature, torch.eye(len(u), device=u.device))
                return loss, {"loss_calibration": loss}

            parts |= self._add(found, synthetic, rows.sort().values.to(self.device), apart)
            total = total + parts["loss_calibration"]
        told = {name: float(value) for name, value in {"loss": total, **parts}.items()}
        return found, told | {"pace": 0.5**self.plateau.halvings}

    def _add(self, total: Synthetic, synthetic: Synthetic, rows: Tensor, loss_of: LossOf) -> dict[str, Tensor]:
        """Add the gradient by the pairs at `rows` to `total`, in place; the parts of the loss."""
        by_images, by_texts, parts = gradient_in_chunks(
            self._encode, synthetic.images[rows], synthetic.texts[rows], loss_of, self.rule.chunk
        )
        total.images.index_add_(0, rows, by_images)
        total.texts.index_add_(0, rows, by_texts)
        return parts

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """psi's step uphill, on what the first draw of the next step will see; and whether rates are halved."""
        if self.psi is None and self.rule.patience is None:
            return
        ahead = iteration + 1
        self._load("blend", ahead, 0)
        clusters = self._subset(ahead, 0)
        rows = self._rows(clusters)
        with torch.no_grad():
            real = self._real(clusters, ahead, 0)
            self._ahead = (ahead, real)
            pairs = (synthetic.images[rows].split(self.rule.chunk), synthetic.texts[rows].split(self.rule.chunk))
            seen = [self._encode(*part) for part in zip(*pairs, strict=True)]
            points = torch.cat([joint(*part, self.projection) for part in seen])
        with torch.set_grad_enabled(self.psi is not None):
            found = self._discrepancy(real, points, self._frequencies(ahead, 0))
        self.plateau.see(float(found.detach()))
        if self.psi is None:
            return
        for group in self.optimiser.param_groups:
            group["lr"] = self.rule.lr_network / 2**self.plateau.halvings
        self.optimiser.zero_grad(set_to_none=True)
        (-found).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        found = {LABELS: torch.from_numpy(self.labels.copy()), PLATEAU: self.plateau.tensor()}
        return found if self.psi is None else found | tensors_of(self.psi, self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._labels = tensors[LABELS].cpu().numpy()
        self.plateau.load(tensors[PLATEAU])
        if self.psi is not None:
            load_tensors(self.psi, self.optimiser, tensors)
