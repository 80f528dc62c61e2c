"""Train and score students: newly initialised models that learn from a distilled set or from real pairs.

One student is trained on all subsets of a set in stages: one subset after the other, or several subsets joined (see
`rmdd.config.order`). By default the number of passes is fixed, and every stage has its own learned learning rates,
optimiser and schedule.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd import config
from rmdd.config.order import Between, Order, stages
from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import derive, generator
from rmdd.data.images import normalise
from rmdd.evaluate.augment import augmentation
from rmdd.evaluate.retrieval import Ranks, Recalls, ranks
from rmdd.models.dual import TOWERS, DualEncoder, tower_of
from rmdd.models.losses import LOSSES
from rmdd.models.prepared import PreparedSplit


class Diverged(FloatingPointError):
    """Raised when the training of a student diverges or its embeddings cannot be scored."""


@dataclass(frozen=True)
class TrainingPairs:
    """The training data of one stage: M pairs, their target similarities, and a learning rate per tower."""

    images: Float[Tensor, "M 3 H W"]
    texts: Float[Tensor, "M F"]
    similarity: Float[Tensor, "M M"]
    lr_image: float
    lr_text: float
    subset_of: Int[Tensor, " M"] | None = None
    """Subset of each pair, if only images and texts of the same subset are compared; None: all are compared."""


def joined(subsets: Sequence[TrainingPairs], between: str) -> TrainingPairs:
    """Join subsets to one training set with a block-diagonal similarity; a single subset is returned as it is.

    The learning rates are the means of those of the subsets, weighted by their numbers of pairs. With `between: masked`
    images and texts of different subsets are not compared.
    """
    if len(subsets) == 1:
        return subsets[0]
    pairs = [len(subset.images) for subset in subsets]
    return TrainingPairs(
        torch.cat([subset.images for subset in subsets]),
        torch.cat([subset.texts for subset in subsets]),
        torch.block_diag(*(subset.similarity for subset in subsets)),
        statistics.fmean((subset.lr_image for subset in subsets), weights=pairs),
        statistics.fmean((subset.lr_text for subset in subsets), weights=pairs),
        torch.arange(len(pairs)).repeat_interleave(torch.tensor(pairs)) if between == "masked" else None,
    )


@dataclass(frozen=True)
class StudentSchedule:
    """The training schedule of a student that learns the subsets of a distilled set in stages (see `order`)."""

    epochs: int
    """Number of passes over the pairs of each stage."""
    batch: int
    momentum: float
    weight_decay: float
    drop_after: int | None
    """Number of passes of a stage after which learning rates are multiplied by `drop`; None: never."""
    drop: float = 0.1
    """Factor by which learning rates are multiplied after `drop_after` passes."""
    chain: bool = False
    """True: all stages share one optimiser with its momentum, and the learning rates drop only in the first stage."""
    rates: Literal["own", "last"] = "own"
    """own: each stage uses the learned learning rates of its subsets; last: all stages use those of the last subset."""
    text_rate: Literal["own", "image"] = "own"
    """own: the text head has its own learning rate; image: the text head uses the learning rate of the image tower."""
    batches: Literal["drawn", "cut", "cut_full"] = "drawn"
    """How a pass over M pairs is split into batches of B pairs. drawn: ceil(M / B) batches are drawn independently, as
    in the released code of methods that learn a similarity. cut: the pairs are shuffled and cut into batches; the last
    one may be shorter. cut_full: as cut, but a shorter last batch is left out."""
    augment: str = "none"
    """Name of the image augmentation (see `rmdd.evaluate.augment`), or none."""
    trains: Literal["all", "heads", "text head"] = "all"
    """Which parameters are trained: all trainable ones, the image and text heads, or the text head."""
    mean: tuple[float, ...] | None = None
    """Pixel mean with which images were normalised, for augmentations of 8-bit images."""
    std: tuple[float, ...] | None = None
    """Pixel standard deviation with which images were normalised."""
    order: Order = "sequence"
    """Which subsets form the stages (see `rmdd.config.order`)."""
    between: Between = "zeros"
    """Target of images and texts of different subsets of a stage: similarity 0 (zeros), or none (masked)."""

    @classmethod
    def of(cls, rule: config.Evaluate) -> "StudentSchedule":
        """Return the schedule set by the section `evaluate` of a run; learning rates drop after half of the passes."""
        return cls(
            epochs=rule.epochs,
            batch=rule.batch,
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            drop_after=(rule.epochs + 1) // 2,
            drop=rule.lr_drop,
            chain=rule.schedule == "shared",
            rates=rule.lr,
            text_rate=rule.text_lr,
            augment=rule.augment,
            order=rule.order,
            between=rule.between,
        )

    def on(self, mean: Sequence[float], std: Sequence[float]) -> "StudentSchedule":
        """Return a copy of this schedule for images normalised with the given pixel mean and standard deviation."""
        return replace(self, mean=tuple(mean), std=tuple(std))


def score(model: DualEncoder, prepared: PreparedSplit, device: torch.device, chunk: int = 256) -> Recalls:
    """Return the retrieval recalls of `model` on the split `prepared`; see `rank`."""
    return rank(model, prepared, device, chunk).recalls()


def rank(model: DualEncoder, prepared: PreparedSplit, device: torch.device, chunk: int = 256) -> Ranks:
    """Return the retrieval ranks of all queries of a split; see `embedded`."""
    images, texts = embedded(model, prepared, device, chunk)
    return ranks(images, texts, torch.from_numpy(prepared.split.image_of).to(device), chunk=chunk)


def embedded(
    model: DualEncoder, prepared: PreparedSplit, device: torch.device, chunk: int = 256
) -> tuple[Float[Tensor, "I D"], Float[Tensor, "T D"]]:
    """Return the embeddings of all images and captions of a split. The train or eval mode of `model` is restored.

    Raise `Diverged` if embeddings are zero or not finite.
    """
    was_training = model.training
    model.eval()
    split = prepared.split
    with torch.no_grad():
        images = in_chunks(
            lambda rows: model.embed_images(normalise(torch.tensor(rows).to(device), prepared.mean, prepared.std)),
            split.images,
            chunk,
        )
        texts = in_chunks(lambda rows: model.embed_texts(torch.tensor(rows).to(device)), prepared.texts, 4 * chunk)
    model.train(was_training)
    for side, embeddings in (("image", images), ("text", texts)):
        if not (torch.isfinite(embeddings).all() and (embeddings != 0).any(dim=1).all()):
            raise Diverged(f"{side} embeddings collapsed: some are zero or not finite")
    return images, texts


def train_student(
    model: DualEncoder,
    subsets: Sequence[TrainingPairs],
    schedule: StudentSchedule,
    loss: str,
    seed: int,
    student: int,
    after_pass: Callable[[int, int], None] = lambda stage, passes: None,
) -> None:
    """Train `model` in place on each stage in order; call `after_pass(stage, passes)` after every pass.

    Batches, dropout and augmentation depend only on (seed, student, stage, pass). Student i therefore gets the same
    random draws for every training set, which makes methods comparable. Raise `Diverged` for a learning rate that is
    not positive, or a loss that is not finite.
    """
    device = next(model.parameters()).device
    optimiser = None
    augmented = None if schedule.augment == "none" else augmentation(schedule.augment, schedule.mean, schedule.std)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and _is_trained(name, schedule))
    model.train()
    for s, stage in enumerate(stages(schedule.order, len(subsets))):
        pairs, name = joined([subsets[k] for k in stage], schedule.between), " + ".join(map(str, stage))
        rates = subsets[-1] if schedule.rates == "last" else pairs
        if optimiser is None or not schedule.chain:
            optimiser = _optimiser(model, rates, schedule, name)
        images, texts = pairs.images.to(device), pairs.texts.to(device)
        similarity = pairs.similarity.to(device)
        for epoch in range(schedule.epochs):
            if epoch == schedule.drop_after and (s == 0 or not schedule.chain):
                for group in optimiser.param_groups:
                    group["lr"] *= schedule.drop
            draw = generator(seed, "student batches", student, s, epoch)
            views = generator(seed, "student augment", student, s, epoch)
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                torch.manual_seed(derive(seed, "student dropout", student, s, epoch))
                for chosen in batches(len(images), schedule, draw):
                    index = chosen.to(device)
                    pictures = images[index] if augmented is None else augmented(images[index], views)
                    logits, targets = model(pictures, texts[index]), similarity[index][:, index]
                    subset_of = None if pairs.subset_of is None else pairs.subset_of[chosen]
                    value = _loss(loss, logits, targets, subset_of)
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()
                    optimiser.step()
            if not torch.isfinite(value):
                raise Diverged(
                    f"student {student} diverged on subset {name} in pass {epoch}: loss {value.item()} at learning "
                    f"rates {rates.lr_image:.4g} (image) and {rates.lr_text:.4g} (text)"
                )
            after_pass(s, epoch + 1)


def batches(pairs: int, schedule: StudentSchedule, random: torch.Generator) -> list[Int[Tensor, " b"]]:
    """Return the pair indices of each batch of one pass; fewer pairs than a batch form one batch."""
    if schedule.batches == "drawn":
        return [torch.randperm(pairs, generator=random)[: schedule.batch] for _ in range(-(-pairs // schedule.batch))]
    cut = torch.randperm(pairs, generator=random).split(schedule.batch)
    keep_last = schedule.batches == "cut" or len(cut) == 1 or len(cut[-1]) == schedule.batch
    return list(cut if keep_last else cut[:-1])


def _loss(
    name: str, logits: Float[Tensor, "b b"], targets: Float[Tensor, "b b"], subset_of: Int[Tensor, " b"] | None
) -> Float[Tensor, ""]:
    """Return the loss of a batch. `subset_of` numbers the subset of each pair; only pairs of one subset are compared.

    The loss is then the mean of the losses of the subsets in the batch, weighted by their numbers of pairs.
    """
    if subset_of is None:
        return LOSSES[name](logits, targets)
    parts = [(subset_of == k).nonzero()[:, 0].to(logits.device) for k in subset_of.unique()]
    losses = [len(rows) * LOSSES[name](logits[rows][:, rows], targets[rows][:, rows]) for rows in parts]
    return torch.stack(losses).sum() / len(subset_of)


def _optimiser(model: DualEncoder, rates: TrainingPairs, schedule: StudentSchedule, stage: str) -> torch.optim.SGD:
    by_tower = {"image": rates.lr_image, "text": rates.lr_image if schedule.text_rate == "image" else rates.lr_text}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for tower in TOWERS:
        lr, params = by_tower[tower], [p for n, p in named if tower_of(n) == tower]
        if params and not lr > 0:
            raise Diverged(
                f"the learned {tower} learning rate of subset {stage} is {lr:.4g}, but it must be positive; set "
                "distill.min_inner_lr and lower distill.lr_lr"
            )
        groups += [{"params": params, "lr": lr}] if params else []
    return torch.optim.SGD(groups, lr=rates.lr_image, momentum=schedule.momentum, weight_decay=schedule.weight_decay)


def _is_trained(name: str, schedule: StudentSchedule) -> bool:
    if schedule.trains == "all":
        return True
    return name.startswith("text_head.") or (schedule.trains == "heads" and name.startswith("image_head."))
