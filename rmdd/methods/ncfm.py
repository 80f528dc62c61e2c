"""NCFM: neural characteristic function matching (CVPR 2025), adapted to pairs with clusters instead of classes.

Real pairs are clustered by k-means on their joint features f = [v ; t] / sqrt 2, where v and t are unit embeddings of
image and text by a fully trained expert. Each cluster c gets ipc distilled pairs, S_c. Their features should have the
same distribution as those of the cluster's real pairs, R_c. NCFD compares the characteristic functions of R_c and S_c
at T frequencies (`rmdd.distill.distribution.characteristic`). Each step:

    encoder    (1 - b) theta_0 + b theta_n of one random expert, b ~ U(0, 1), drawn again for every draw
    maximise   with `network: true`: a network psi generates the frequencies and takes one step that increases NCFD
    minimise   one step of the pairs on  scale * sum over c of NCFD(R_c, S_c) + InfoNCE of all pairs in an expert; the
               InfoNCE term keeps the clusters apart, because NCFD compares pairs only within a cluster
    halve      the learning rates of the set and of psi, if the loss has not fallen for `patience` steps

The only published attempt on image-text pairs (PTM-ST, arXiv 2603.25388, appendix E) scored like random pairs. The
original paper and its code differ. Here, psi scales new noise for every frequency (`repeat` reproduces the code), psi
and the set use two separate forward passes, and psi has its own learning-rate scheduler. After each step of the set,
psi is updated on the batch and encoder of the next step; the first step of the set uses the initial psi. With one
distilled pair per cluster, the method does little more than match means: the characteristic function of a single point
has modulus 1 at every frequency.
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
"""Largest number of expert checkpoints held in memory."""


class NCFM(DistributionMethod):
    needs = ("experts",)
    card = "CVPR 2025"
    verified = (
        "Tests: the losses and gradients equal those of a slow float64 implementation, the frequency network learns, "
        "and a resumed run gives the same bits. Not verified: the published numbers, which need a GPU."
    )
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
            None,
            description="number of clusters C, each with pairs / C pairs of the set; null: one cluster per pair; 1: "
            "no clustering",
        )
        pick: Literal["nearest", "random"] = Field(
            "nearest",
            description="choice of the initial pairs of a cluster; nearest: those nearest to its centre; random: "
            "drawn at random, as in the paper",
        )
        frequencies: PositiveInt = Field(
            512, description="number of frequencies T in a draw; 1024 and 4096 in the published settings"
        )
        network: bool = Field(
            False, description="true: a min-max network psi generates the frequencies; false: draw them from N(0, I)"
        )
        network_norm: Literal["layer", "batch"] = Field(
            "layer", description="normalisation layer of psi; batch, as released, needs at least 32 frequencies"
        )
        network_optimiser: Literal["adam", "sgd"] = Field("adam", description="optimiser of psi")
        lr_network: NonNegativeFloat = Field(1e-3, description="learning rate of psi")
        repeat: bool = Field(False, description="repeat each output row of psi 16 times without noise, as released")
        learned_scale: bool = Field(False, description="multiply all frequencies from psi by one learned factor")
        w_amplitude: NonNegativeFloat = Field(
            0.5, description="weight of the difference of moduli of the characteristic functions in NCFD"
        )
        w_phase: NonNegativeFloat = Field(
            0.5, description="weight of the difference of phase angles of the characteristic functions in NCFD"
        )
        scale: PositiveFloat = Field(
            300.0, description="factor of the NCFD term; tune it together with lr_image and lr_text"
        )
        real_batch: Annotated[int, Field(ge=2)] = Field(
            1024, description="largest number of real pairs per cluster in a draw"
        )
        subset: PositiveInt | None = Field(
            None,
            description="number of clusters per draw; their mean loss stands for all clusters; null: use all clusters",
        )
        project: PositiveInt | None = Field(
            None, description="width of the features after a random projection; null: no projection"
        )
        calibration: NonNegativeFloat = Field(1.0, description="weight of the InfoNCE term")
        calibration_batch: Annotated[int, Field(ge=2)] = Field(
            128, description="largest number of pairs in the InfoNCE term"
        )
        patience: PositiveInt | None = Field(
            500,
            description="number of steps without a lower loss, after which learning rates are halved; null: never "
            "halve",
        )
        chunk: PositiveInt = Field(64, description="largest number of pairs that go through the towers at once")

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        options, mistakes = cls.Options(**run.distill.options), []
        for p, plan in enumerate(run.distill.phases):
            clusters = options.clusters or plan.pairs
            if plan.pairs % clusters:
                mistakes.append(
                    f"distill.phases.{p}.pairs {plan.pairs} is not a multiple of distill.options.clusters {clusters}; "
                    "change one of them"
                )
            if options.subset and options.subset > clusters:
                mistakes.append(
                    f"distill.options.subset {options.subset} is more than the {clusters} clusters; lower it"
                )
        if options.network and (wrong := frequency_count_error(options.frequencies, options.network_norm)):
            mistakes.append(f"distill.options.frequencies: {wrong}")
        if not options.network and (options.repeat or options.learned_scale):
            mistakes.append(
                "distill.options.repeat and learned_scale need the frequency network; set distill.options.network: true"
            )
        if options.w_amplitude == options.w_phase == 0:
            mistakes.append("distill.options: w_amplitude and w_phase are both 0; set one of them above 0")
        if run.distill.init in ("prototypes", "mean_captions"):
            mistakes.append(
                f"distill.init: {run.distill.init} is not available for ncfm; set distill.options.pick: nearest instead"
            )
        if run.distill.precision != "float32":
            mistakes.append("distill.method ncfm needs exact cosines of large angles; set distill.precision: float32")
        return mistakes

    def shape(self, phase: int) -> tuple[int, int]:
        """Return the number of clusters C and the number of pairs per cluster, ipc."""
        pairs = self.rule.phases[phase].pairs
        clusters = self.options.clusters or pairs
        return clusters, pairs // clusters

    def records(self, phase: int, train: PreparedSplit, store: Store | None = None) -> list[int]:
        assert store is not None, "clustering needs an expert to compute features"
        clusters, ipc = self.shape(phase)
        points, labels = self.clustered(phase, train, store)
        seed = derive(self.seed, "clusters", phase)
        return initial_pairs(points, train.split.image_of, labels, clusters, ipc, self.options.pick, seed)

    def clustered(self, phase: int, train: PreparedSplit, store: Store) -> tuple[np.ndarray, np.ndarray]:
        """Return the joint features of all real pairs, embedded by the first expert, and their cluster labels."""
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
            index = np.arange(len(train.split))
            images = in_chunks(lambda rows: model.embed_images(train.pictures(rows, device)), index, self.options.chunk)
            for rows in np.array_split(np.arange(len(points)), max(1, len(points) // 4096)):
                texts = model.embed_texts(torch.tensor(train.texts[rows]).to(device))
                points[rows] = joint(images[train.split.image_of[rows]], texts, projection).cpu().numpy()
        seed = derive(self.seed, "clusters", phase)
        return points, clusters_of(points, train.split.image_of, clusters, ipc, seed)

    def width(self, model: DualEncoder) -> int:
        """Return the width of the features that NCFD compares, after the random projection."""
        return self.options.project or self._joint_width(model)

    def _joint_width(self, model: DualEncoder) -> int:
        tower_width, rule = int(model.image_tower.width), self.run.model  # type: ignore[arg-type]
        return 2 * (tower_width if rule.image.projection == "none" else rule.width or tower_width)

    def projection(self, phase: int, model: DualEncoder, device: torch.device) -> Tensor | None:
        """Return a random matrix (joint width, `project`) that keeps lengths on average; None means no projection."""
        if (width := self.options.project) is None:
            return None
        drawn = torch.randn(self._joint_width(model), width, generator=generator(self.seed, "projection", phase))
        return (drawn / width**0.5).to(device)

    def effort(self, phase: int, records: int) -> Effort:
        options, chunk = self.options, self.options.chunk
        clusters, ipc = self.shape(phase)
        drawn = min(options.subset or clusters, clusters)
        real, matched = drawn * min(options.real_batch, -(-records // clusters)), drawn * ipc
        calibrated = min(options.calibration_batch, clusters * ipc) if options.calibration else 0
        forward = options.draws * (real + sum(n for n in (matched, calibrated) if n > chunk))
        if options.network or options.patience:
            forward += matched  # `after` embeds pairs for the next step; that step reuses the real features
        at_once = min(chunk, max(matched, calibrated))
        models = 1 + min(KEPT, 2 * self.run.experts.num)
        return Effort(forward, options.draws * (matched + calibrated), at_once, models=models)

    def objective(
        self, phase: int, store: Store, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> CharacteristicMatching:
        return CharacteristicMatching(self, phase, store, train, model, device)


def joint(images: Tensor, texts: Tensor, projection: Tensor | None) -> Tensor:
    """Return the joint features [images ; texts] / sqrt 2 of unit embeddings, projected by `projection` if given."""
    both = torch.cat([images, texts], dim=1) / 2**0.5
    return both if projection is None else both @ projection


class Plateau:
    """Counter of steps without a new lowest loss; after every `patience` such steps, learning rates are halved."""

    def __init__(self, patience: int | None):
        self.patience, self.best, self.since, self.halvings = patience, float("inf"), 0, 0

    def update(self, loss: float) -> None:
        """Count one step with the loss `loss`; after `patience` steps without a lower loss, increase `halvings`."""
        self.since += 1
        if loss < self.best:
            self.best, self.since = loss, 0
        if self.patience is not None and self.since >= self.patience:
            self.since, self.halvings = 0, self.halvings + 1
            _logger.info("the loss has not fallen for %d steps; learning rates are halved", self.patience)

    def tensor(self) -> Tensor:
        return torch.tensor([self.best, self.since, self.halvings], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.best, self.since, self.halvings = float(state[0]), int(state[1]), int(state[2])


class CharacteristicMatching:
    """NCFM loss of one phase. It loads encoders, draws batches of clusters, and trains the frequency network psi."""

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
        """Index of the next iteration and real features of its first draw; `after` computes the features in advance."""
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

    def _load(self, purpose: str, iteration: int, draw: int) -> None:
        """Load the last checkpoint of a random expert; for the purpose "blend", blend it with the first checkpoint."""
        random = generator(self.seed, purpose, self.phase, iteration, draw)
        experts = self.store.complete()[: self.method.run.experts.num]
        expert = experts[int(torch.randint(len(experts), (), generator=random))]
        end = self._read(expert, self.store.epochs)
        if purpose == "blend":
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
        """Return the indices of the clusters that are compared in one draw."""
        if self.rule.subset is None:
            return list(range(self.clusters))
        random = generator(self.seed, "clusters of a step", self.phase, iteration, draw)
        return sorted(torch.randperm(self.clusters, generator=random)[: self.rule.subset].tolist())

    def _real(self, clusters: list[int], iteration: int, draw: int) -> list[Tensor]:
        """Return, for each cluster, the joint features of a random batch of its real pairs."""
        batches = []
        for c in clusters:
            random = generator(self.seed, "real batch", self.phase, iteration, draw, c)
            members = np.flatnonzero(self.labels == c)
            batches.append(
                members[torch.randperm(len(members), generator=random)[: self.rule.real_batch].sort().values.numpy()]
            )

        def embedded(rows: np.ndarray) -> Tensor:
            pixels = self.train.pictures(self.train.split.image_of[rows], self.device)
            texts = torch.tensor(self.train.texts[rows]).to(self.device)
            return joint(*self._encode(pixels, texts), self.projection)

        with torch.no_grad():
            features = in_chunks(embedded, np.concatenate(batches), self.rule.chunk)
        return list(features.split([len(b) for b in batches]))

    def _encode(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        pixels = enlarged(images, self.method.run.data.image_size)
        return self.model.embed_images(pixels), self.model.embed_texts(texts)

    def _rows(self, clusters: list[int]) -> Tensor:
        """Return the row indices of the pairs of `clusters` in the set."""
        index = torch.arange(self.clusters * self.ipc).view(self.clusters, self.ipc)
        return index[clusters].flatten().to(self.device)

    def _discrepancy(self, real: list[Tensor], points: Tensor, frequencies: Tensor) -> Tensor:
        """Return NCFD averaged over clusters; `points` holds the features of the set, `ipc` rows per cluster."""
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

        def matching_loss(images: Tensor, texts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            each = self._discrepancy(real, joint(images, texts, self.projection), frequencies)
            loss = self.rule.scale * self.clusters * each
            return loss, {"loss_ncfd": loss, "discrepancy": each}

        gradient = zeros_like(synthetic)
        parts = self._add(gradient, synthetic, self._rows(clusters), matching_loss)
        total = parts["loss_ncfd"]
        if self.rule.calibration:
            self._load("calibration", iteration, draw)
            random = generator(self.seed, "calibration batch", self.phase, iteration, draw)
            rows = torch.randperm(synthetic.pairs, generator=random)[: self.rule.calibration_batch]

            def calibration_loss(u: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss = self.rule.calibration * infonce(u @ v.T / self.temperature, torch.eye(len(u), device=u.device))
                return loss, {"loss_calibration": loss}

            parts |= self._add(gradient, synthetic, rows.sort().values.to(self.device), calibration_loss)
            total = total + parts["loss_calibration"]
        values = {name: float(value) for name, value in {"loss": total, **parts}.items()}
        return gradient, values | {"pace": 0.5**self.plateau.halvings}

    def _add(self, total: Synthetic, synthetic: Synthetic, rows: Tensor, loss_of: LossOf) -> dict[str, Tensor]:
        """Add the gradient of `loss_of` for the pairs `rows` to `total`, in place; return the loss terms."""
        by_images, by_texts, parts = gradient_in_chunks(
            self._encode, synthetic.images[rows], synthetic.texts[rows], loss_of, self.rule.chunk
        )
        total.images.index_add_(0, rows, by_images)
        total.texts.index_add_(0, rows, by_texts)
        return parts

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """Take one ascent step of psi on the first draw of the next iteration; pass that draw's loss to `Plateau`."""
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
            features = [self._encode(*part) for part in zip(*pairs, strict=True)]
            points = torch.cat([joint(*part, self.projection) for part in features])
        with torch.set_grad_enabled(self.psi is not None):
            discrepancy = self._discrepancy(real, points, self._frequencies(ahead, 0))
        self.plateau.update(float(discrepancy.detach()))
        if self.psi is None:
            return
        for group in self.optimiser.param_groups:
            group["lr"] = self.rule.lr_network / 2**self.plateau.halvings
        self.optimiser.zero_grad(set_to_none=True)
        (-discrepancy).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {LABELS: torch.from_numpy(self.labels.copy()), PLATEAU: self.plateau.tensor()}
        return tensors if self.psi is None else tensors | tensors_of(self.psi, self.optimiser)

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._labels = tensors[LABELS].cpu().numpy()
        self.plateau.load(tensors[PLATEAU])
        if self.psi is not None:
            load_tensors(self.psi, self.optimiser, tensors)
