"""CovMatch: cross-covariance matching with a trainable text tower (arXiv 2510.18583, NeurIPS 2025).

With linear heads, the contrastive loss depends on the data only through the cross-covariance C of image and text
features h before the heads. CovMatch therefore moves the set until its cross-covariance C_S equals C_T, the
cross-covariance of real data. No student is unrolled. With heads G_v for images and G_l for texts, the loss is

    L = || rho C_T - C_S ||_F^2 + lambda (L_v + L_l),   L_m = || mean G_m h_m(real) - mean G_m h_m(set) ||^2

C_S covers all M pairs; two passes over chunks of pairs give its exact gradient. The features come from an online model
(two towers and the linear heads). After each step of the set, the online model takes one contrastive step on a real
batch. Every `reset` = 50 steps, the online model restarts from pretrained towers and random heads, so that the set is
matched at all stages of training.

    texts: frozen   learns (M, F) text embeddings of the frozen text tower; only the image tower and the heads are
                    trained online (our variant, for comparison with the other methods)
    texts: tokens   learns (M, L, d) token embeddings, masked like the initial captions, and also trains the text tower
                    online; students get the output of the frozen text tower

We could not read the released code and follow notes on the paper. We chose unnormalised features, fixed masks of
tokens, and real batches of 128 pairs. If a batch has far fewer pairs than the features have dimensions, C_T is mostly
noise; `average` then uses a moving average over batches.
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
        "Tests: the losses and chunked gradients of small towers equal those of a slow float64 implementation, for "
        "both `texts` options. Not verified (needs a GPU): the published numbers, students that train the text tower."
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
            "frozen",
            description="frozen: learn text embeddings and keep the text tower frozen; tokens: learn token embeddings "
            "and train the text tower as part of the online model",
        )
        rho: PositiveFloat = Field(
            2.0, description="factor of the covariance of real pairs; in the paper 2 for 100 pairs, 1 for more pairs"
        )
        mean_weight: NonNegativeFloat = Field(
            0.1, description="lambda, weight of the loss terms that match the means of the features"
        )
        real_batch: Annotated[int, Field(ge=2)] = Field(
            128,
            description="number of real pairs in each draw of the loss and in each training step of the online model",
        )
        average: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.0, description="weight of past batches in a moving average of the covariance of real pairs; 0: no average"
        )
        reset: PositiveInt = Field(50, description="number of updates of the set between resets of the online model")
        lr_tower: NonNegativeFloat = Field(0.01, description="learning rate of the towers of the online model")
        lr_head: NonNegativeFloat = Field(0.1, description="learning rate of the heads of the online model")
        online_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.9, description="momentum of the SGD that trains the online model"
        )
        weight_decay: NonNegativeFloat = Field(5e-4, description="weight decay of the SGD that trains the online model")
        head_width: PositiveInt | None = Field(
            None, description="output width of the heads of the online model; null: the width of the joint embedding"
        )
        chunk: PositiveInt = Field(64, description="largest number of pairs that go through the towers at once")

    options: Options

    @classmethod
    def clashes(cls, run: config.Run) -> list[str]:
        mistakes = []
        if run.distill.precision != "float32":
            mistakes.append("distill.method covmatch needs float32 covariances; set distill.precision: float32")
        if run.distill.options.get("texts", "frozen") == "frozen":
            return mistakes
        if run.model.text.name == "hashing":
            mistakes.append(
                "distill.options.texts: tokens needs a text tower that reads tokens; set model.text.name to a "
                "transformers encoder"
            )
        if run.distill.init in ("noise", "mean_captions"):
            mistakes.append("distill.options.texts: tokens needs the masks of real captions; set distill.init: real")
        return mistakes

    @functools.cached_property
    def tower(self) -> TokenTower:
        """Pretrained text tower that turns learned token embeddings into text embeddings; it is never trained."""
        return TokenTower(self.run.model.text, local_device(self.run.runtime)).requires_grad_(False)

    def uncounted(self) -> list[str]:
        tokens = self.options.texts == "tokens"
        return ["the cost of training the text tower is not counted"] if tokens else []

    def initial(self, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
        initial = super().initial(phase, train, records)
        if self.options.texts == "frozen":
            return initial
        words = self.tower.words([train.split.captions[r] for r in records])
        return dataclasses.replace(initial, texts=words.cpu())

    def exported(self, synthetic: Synthetic) -> Synthetic:
        """Return the set for students: the frozen text tower turns token embeddings into (M, F) text embeddings."""
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
        # memory holds 4 copies of the parameters: the online model, its gradients, momentum and initial values
        return Effort(draws * (real + twice), draws * pairs, at_once, trained=real, models=4)

    def objective(
        self, phase: int, store: Store | None, train: PreparedSplit, model: DualEncoder, device: torch.device
    ) -> CovarianceMatching:
        tower = TokenTower(self.run.model.text, device) if self.options.texts == "tokens" else None
        online = Online(model.image_tower, tower, train.texts.shape[1], self.options.head_width or self.run.model.width)
        return CovarianceMatching(self, phase, train, online.to(device), device)


class Online(nn.Module):
    """The online model of CovMatch: two towers with linear heads. Without a text tower, text inputs are embeddings."""

    def __init__(self, image_tower: nn.Module, text_tower: TokenTower | None, text_width: int, width: int | None):
        super().__init__()
        image_width = int(image_tower.width)  # type: ignore[arg-type]
        self.image_tower, self.text_tower = image_tower, text_tower
        self.head_image = nn.Linear(image_width, width or image_width, bias=False)
        self.head_text = nn.Linear(text_width, width or image_width, bias=False)
        if text_tower is not None and getattr(text_tower.model, "pooler", None) is not None:
            text_tower.model.pooler.requires_grad_(False)  # the features do not use the pooler's output
        self.eval()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image and text features of the towers, before the linear heads."""
        return self.image_tower(images), texts if self.text_tower is None else self.text_tower(texts)

    def scores(self, images: Tensor, texts: Tensor, temperature: float) -> Tensor:
        """Return the cosine similarities of image and text features after the heads, divided by `temperature`."""
        u = nn.functional.normalize(self.head_image(images), dim=1)
        return u @ nn.functional.normalize(self.head_text(texts), dim=1).T / temperature


class CovarianceMatching:
    """Covariance-matching loss of one phase, computed with the online model, which this class trains and resets."""

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
        """Moving average of the real covariance; None if `average` is 0 or before the first batch after a reset."""
        self.steps_since_reset = 0
        """Number of training steps of the online model since its last reset."""
        self.reset(0)

    def reset(self, turn: int) -> None:
        """Load the pretrained towers into the online model and draw new heads. The seed is `turn`, the count of resets.

        An image tower without pretrained weights gets new random weights.
        """
        self.turn, self.steps_since_reset, self.mean = turn, 0, None
        self.optimiser.state.clear()
        self.model.load_state_dict(self.pretrained, strict=False)
        if self.run.model.image.weights == "random":
            draw = generator(self.seed, "online tower", self.phase, turn)
            fresh = build_image_tower(self.run.model.image, draw, self.run.data.image_size)
            self.model.image_tower.load_state_dict(fresh.state_dict())
        for side, head in enumerate((self.model.head_image, self.model.head_text)):
            bound = head.in_features**-0.5
            drawn = torch.rand(head.weight.shape, generator=generator(self.seed, "online head", self.phase, turn, side))
            head.weight.data.copy_((2 * drawn - 1) * bound)

    def _real(self, purpose: str, *index: int) -> tuple[Tensor, Tensor]:
        """Return images and texts of a random batch of real pairs; `purpose` and `index` seed the draw."""
        total = len(self.train.split.captions)
        drawn = generator(self.seed, purpose, self.phase, *index)
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
            of_means = torch.stack([mean_loss(head(real), head(learned)) for head, real, learned in sides]).sum()
            total = of_covariance + self.rule.mean_weight * of_means
            return total, {"loss": total, "loss_covariance": of_covariance, "loss_mean": of_means}

        by_images, by_texts, parts = gradient_in_chunks(
            self._encode, synthetic.images, synthetic.texts, loss_of, self.rule.chunk
        )
        if by_texts.ndim == 3:
            by_texts = by_texts * mask_of(synthetic.texts)[..., None]
        gradient = dataclasses.replace(zeros_like(synthetic), images=by_images, texts=by_texts)
        parts["covariance_norm"] = covariance.norm()
        return gradient, {name: float(part) for name, part in parts.items()}

    def after(self, synthetic: Synthetic, iteration: int) -> None:
        """Train the online model for one step. After every `reset`-th update of the set, reset the model instead."""
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
        self.steps_since_reset += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors for the checkpoint: the online model, its optimiser, and the number of resets so far.

        Directly after a reset the number of resets is enough, since it seeds all new weights.
        """
        tensors: dict[str, Tensor] = {TURN: torch.tensor(self.turn)}
        if self.steps_since_reset:
            tensors |= tensors_of(self.model, self.optimiser) | {"taken": torch.tensor(self.steps_since_reset)}
        return tensors if self.mean is None else tensors | {AVERAGE: self.mean.clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.reset(int(tensors[TURN]))
        if "taken" in tensors:
            load_tensors(self.model, self.optimiser, tensors)
            self.steps_since_reset = int(tensors["taken"])
        if AVERAGE in tensors:
            self.mean = tensors[AVERAGE].to(self.device)
