"""CovMatch: cross-covariance matching with a trainable text tower (arXiv 2510.18583, NeurIPS 2025).

With linear heads the contrastive problem depends on the data through one matrix, the cross-covariance C of image and
text features before the heads. So a set should have that of real data, and no student is unrolled:

    L = || rho C_T - C_S ||_F^2 + lambda (L_v + L_l),   L_m = || mean G_m h_m(real) - mean G_m h_m(set) ||^2

C_S is of all pairs; its gradient is exact, in two passes over chunks. After every step the online model (both towers
and linear heads G) takes one contrastive step on a real batch, and every 50 steps it begins anew from pretrained
towers and random heads, so that features are those of models along training.

    texts: frozen   learns (M,F) embeddings of the frozen tower; only image tower and heads are online (ours, to be
                    compared with the other methods)
    texts: tokens   learns (M,L,d) token embeddings, read in place of word embeddings under the masks of the initial
                    captions, and trains the text tower too; students get what the frozen tower makes of them

From notes on the paper, whose code could not be read: features are not normalised, masks are fixed, real batches of
128 are ours. A batch far smaller than the features are wide makes C_T noise; `average` takes the mean over batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rmdd import config
from rmdd.config.numbers import NonNegativeFloat, PositiveFloat, PositiveInt
from rmdd.core.device import local_device
from rmdd.core.seeding import generator
from rmdd.distill.distribution.chunks import gradient_in_chunks
from rmdd.distill.distribution.covariance import covariance_loss, cross_covariance, mean_loss
from rmdd.distill.distribution.learned import load_tensors, tensors_of
from rmdd.distill.synthetic import Synthetic, enlarged, zeros_like
from rmdd.experts.store import Store
from rmdd.methods.distribution import DistributionMethod, Effort
from rmdd.models.dual import DualEncoder
from rmdd.models.image import build_image_tower
from rmdd.models.losses import infonce
from rmdd.models.prepared import PreparedSplit
from rmdd.models.tokens import TokenTower, mask_of

AVERAGE = "covariance"
TURN = "turn"


class CovMatch(DistributionMethod):
    needs = ()
    card = "2510.18583"
    verified = (
        "losses and chunked gradients equal slow float64 ones, both kinds of texts on small towers. "
        "Open: published figures, students that train the text tower"
    )
    defaults = {
        "experts": {"num": 1, "keep": "endpoints"},
        "distill": {
            "phases": [{"pairs": 100, "iterations": 10_000}],
            "similarity": {"kind": "identity"},
            "loss": "infonce",
            "lr_image": 1.0,
            "lr_text": 1.0,
            "momentum": 0.5,
            "ema": 0.0,
        },
    }

    class Options(DistributionMethod.Options):
        texts: Literal["frozen", "tokens"] = Field(
            "frozen", description="learn embeddings of the frozen tower, or of tokens and train the tower too"
        )
        rho: PositiveFloat = Field(2.0, description="scale of the real covariance; the paper: 2 for 100 pairs, else 1")
        mean_weight: NonNegativeFloat = Field(0.1, description="lambda, of the matching of means")
        real_batch: Annotated[int, Field(ge=2)] = Field(128, description="real pairs of a draw and of an online step")
        average: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.0, description="share of the mean over past batches in the real covariance, since the last reset; 0: none"
        )
        reset: PositiveInt = Field(50, description="steps after which the online model begins anew")
        lr_tower: NonNegativeFloat = Field(0.01, description="rate of the online towers")
        lr_head: NonNegativeFloat = Field(0.1, description="rate of the online heads")
        online_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of the online SGD")
        weight_decay: NonNegativeFloat = Field(5e-4, description="of the online SGD")
        head_width: PositiveInt | None = Field(None, description="rows k of the heads; null: the joint width")
        chunk: PositiveInt = Field(64, description="pairs that go through the towers at once")

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        found = []
        if run.distill.precision != "float32":
            found.append("distill.method covmatch compares covariances; set distill.precision: float32")
        if run.distill.options.get("texts", "frozen") == "frozen":
            return found
        if run.model.text.name == "hashing":
            found.append(
                "distill.options.texts: tokens needs a tower with tokens; set model.text.name to a transformers encoder"
            )
        if run.distill.init == "noise":
            found.append("distill.options.texts: tokens begins from the masks of captions; set distill.init: real")
        return found

    @functools.cached_property
    def tower(self) -> TokenTower:
        """The frozen text tower, as pretrained."""
        return TokenTower(self.run.model.text, local_device(self.run.runtime)).requires_grad_(False)

    def uncounted(self) -> list[str]:
        tokens = self.options.texts == "tokens"
        return ["the text tower, which learns along, is not counted"] if tokens else []

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
        begun = super().initial(phase, train, records)
        if self.options.texts == "frozen":
            return begun
        words = self.tower.words([train.split.captions[r] for r in records])
        return dataclasses.replace(begun, texts=words.cpu())

    def exported(self, synthetic: Synthetic) -> Synthetic:
        """Its texts as the frozen tower embeds them."""
        if synthetic.texts.ndim == 2:
            return synthetic
        words, device = synthetic.texts, self.tower.model.device
        with torch.no_grad():
            texts = [self.tower(part.to(device)) for part in words.split(self.options.chunk)]
        return dataclasses.replace(synthetic, texts=torch.cat(texts).to(words.device))

    def effort(self, phase: int, records: int) -> Effort:
        draws, real = self.options.draws, min(self.options.real_batch, records)
        pairs, chunk = self.rule.phases[phase].pairs, self.options.chunk
        twice = pairs if pairs > chunk else 0
        at_once = max(real, min(pairs, chunk))
        # the online model, its gradients and momentum, and how it begins
        return Effort(draws * (real + twice), draws * pairs, at_once, trained=real, models=4)

    def objective(
        self, phase: int, store: Store | None, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> CovarianceMatching:
        tower = TokenTower(self.run.model.text, device) if self.options.texts == "tokens" else None
        online = Online(model.image_tower, tower, train.texts.shape[1], self.options.head_width or self.run.model.width)
        return CovarianceMatching(self, phase, train, online.to(device), device)


class Online(nn.Module):
    """Towers and linear heads. Without a text tower, texts are its embeddings already."""

    def __init__(self, image_tower: nn.Module, text_tower: TokenTower | None, text_width: int, width: int | None):
        super().__init__()
        image_width = int(image_tower.width)  # type: ignore[arg-type]
        self.image_tower, self.text_tower = image_tower, text_tower
        self.head_image = nn.Linear(image_width, width or image_width, bias=False)
        self.head_text = nn.Linear(text_width, width or image_width, bias=False)
        if text_tower is not None and getattr(text_tower.model, "pooler", None) is not None:
            text_tower.model.pooler.requires_grad_(False)  # which nothing here reads
        self.eval()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features before the heads."""
        return self.image_tower(images), texts if self.text_tower is None else self.text_tower(texts)

    def scores(self, images: Tensor, texts: Tensor, temperature: float) -> Tensor:
        """Of features."""
        u = nn.functional.normalize(self.head_image(images), dim=1)
        return u @ nn.functional.normalize(self.head_text(texts), dim=1).T / temperature


class CovarianceMatching:
    """The objective of one phase: the online model, and what it has seen since its last reset."""

    def __init__(self, method: CovMatch, phase: int, train: PreparedSplit, online: Online, device: torch.device):
        self.run, self.rule, self.seed = method.run, method.options, method.seed
        self.phase, self.train, self.model, self.device = phase, train, online, device
        towers = [p for n, p in online.named_parameters() if p.requires_grad and not n.startswith("head_")]
        heads = [*online.head_image.parameters(), *online.head_text.parameters()]
        rates = (self.rule.lr_tower, self.rule.lr_head)
        groups = [{"params": ps, "lr": lr} for ps, lr in zip((towers, heads), rates, strict=True) if ps]
        momentum, decay = self.rule.online_momentum, self.rule.weight_decay
        self.optimiser = torch.optim.SGD(groups, momentum=momentum, weight_decay=decay)
        self.pretrained = {n: t.clone() for n, t in online.state_dict().items() if not n.startswith("head_")}
        self.temperature = self.run.distill.temperature or self.run.model.temperature
        self.mean: Tensor | None = None
        """Of the real covariance over past batches."""
        self.taken = 0
        """Steps of the online model since its last reset."""
        self.reset(0)

    def reset(self, turn: int) -> None:
        """Begin anew: towers as pretrained, and heads, and a tower without weights, as drawn for this turn."""
        self.turn, self.taken, self.mean = turn, 0, None
        self.optimiser.state.clear()
        self.model.load_state_dict(self.pretrained, strict=False)
        if self.run.model.image.weights == "random":
            draw = generator(self.seed, "online tower", self.phase, turn)
            fresh = build_image_tower(self.run.model.image, draw, self.run.data.image_size)
            self.model.image_tower.load_state_dict(fresh.state_dict())
        for side, head in enumerate((self.model.head_image, self.model.head_text)):
            reach = head.in_features**-0.5
            drawn = torch.rand(head.weight.shape, generator=generator(self.seed, "online head", self.phase, turn, side))
            head.weight.data.copy_((2 * drawn - 1) * reach)

    def _real(self, what: str, *index: int) -> tuple[Tensor, Tensor]:
        """Pictures and texts of a real batch."""
        total = len(self.train.split.captions)
        drawn = generator(self.seed, what, self.phase, *index)
        records = torch.randperm(total, generator=drawn)[: self.rule.real_batch].sort().values.numpy()
        images = self.train.pictures(self.train.split.image_of[records], self.device)
        return images, self._texts(records.tolist())

    def _texts(self, records: Sequence[int]) -> Tensor:
        if self.model.text_tower is None:
            return torch.tensor(self.train.texts[list(records)]).to(self.device)
        return self.model.text_tower.words([self.train.split.captions[r] for r in records])

    def _encode(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(enlarged(images, self.run.data.image_size), texts)

    def gradient(self, synthetic: Synthetic, iteration: int, draw: int) -> tuple[Synthetic, dict[str, float]]:
        with torch.no_grad():
            images, texts = self._real("real batch", iteration, draw)
            chunks = zip(images.split(self.rule.chunk), texts.split(self.rule.chunk), strict=True)
            real_v, real_l = (torch.cat(side) for side in zip(*(self._encode(*c) for c in chunks), strict=True))
            covariance = cross_covariance(real_v, real_l)
            if self.mean is not None:
                covariance = self.rule.average * self.mean + (1 - self.rule.average) * covariance

        def loss_of(image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            of_covariance = covariance_loss(covariance, cross_covariance(image, text), self.rule.rho)
            heads = self.model.head_image, self.model.head_text
            sides = zip(heads, (real_v, real_l), (image, text), strict=True)
            of_means = torch.stack([mean_loss(head(real), head(own)) for head, real, own in sides]).sum()
            total = of_covariance + self.rule.mean_weight * of_means
            return total, {"loss": total, "loss_covariance": of_covariance, "loss_mean": of_means}

        by_images, by_texts, parts = gradient_in_chunks(
            self._encode, synthetic.images, synthetic.texts, loss_of, self.rule.chunk
        )
        if by_texts.ndim == 3:
            by_texts = by_texts * mask_of(synthetic.texts)[..., None]
        found = dataclasses.replace(zeros_like(synthetic), images=by_images, texts=by_texts)
        parts["covariance_norm"] = covariance.norm()
        return found, {name: float(part) for name, part in parts.items()}

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """One contrastive step of the online model, or its reset."""
        if (iteration + 1) % self.rule.reset == 0:
            self.reset((iteration + 1) // self.rule.reset)
            return
        images, texts = self._real("online batch", iteration)
        features = self._encode(images, texts)
        if self.rule.average:
            new = cross_covariance(*(f.detach() for f in features))
            old = self.mean
            self.mean = new if old is None else self.rule.average * old + (1 - self.rule.average) * new
        loss = infonce(self.model.scores(*features, self.temperature), torch.eye(len(images), device=self.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.taken += 1

    def tensors(self) -> dict[str, Tensor]:
        """The online model with its optimiser; just after a reset the number of its turn says all."""
        found: dict[str, Tensor] = {TURN: torch.tensor(self.turn)}
        if self.taken:
            found |= tensors_of(self.model, self.optimiser) | {"taken": torch.tensor(self.taken)}
        return found if self.mean is None else found | {AVERAGE: self.mean.clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.reset(int(tensors[TURN]))
        if "taken" in tensors:
            load_tensors(self.model, self.optimiser, tensors)
            self.taken = int(tensors["taken"])
        if AVERAGE in tensors:
            self.mean = tensors[AVERAGE].to(self.device)
