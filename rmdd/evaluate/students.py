"""Students: fresh models trained on a distilled set, and the protocols they are scored by.

A student is trained on the subsets in order with the same weights. The headline protocol fixes the number of
passes, gives every subset its own learned rates, optimiser and schedule, chooses on val and reads test once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmdd import config
from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import derive, generator
from rmdd.data.images import normalise
from rmdd.evaluate.augment import augmentation
from rmdd.evaluate.retrieval import Ranks, Recalls, ranks
from rmdd.models.dual import TOWERS, DualEncoder, tower_of
from rmdd.models.losses import LOSSES
from rmdd.models.prepared import PreparedSplit


class Diverged(FloatingPointError):
    """A student cannot be trained or scored with these rates."""


@dataclass(frozen=True)
class TrainingPairs:
    """What a student learns from one subset: M pairs with target similarities and its two rates."""

    images: Float[Tensor, "M 3 H W"]
    texts: Float[Tensor, "M F"]
    similarity: Float[Tensor, "M M"]
    lr_image: float
    lr_text: float


@dataclass(frozen=True)
class StudentSchedule:
    """How a student is trained on the subsets of a set, in order."""

    epochs: int
    """Passes over each subset."""
    batch: int
    momentum: float
    weight_decay: float
    drop_after: int | None
    """Passes of a subset after which rates are multiplied by `drop`; None: never."""
    drop: float = 0.1
    chain: bool = False
    """One optimiser for all subsets, whose momentum carries over, and one drop, in the first."""
    rates: Literal["own", "last"] = "own"
    """Each subset's rates, or the last one's for all."""
    text_rate: Literal["own", "image"] = "own"
    batches: Literal["drawn", "cut", "cut_full"] = "drawn"
    """drawn: each of a pass's ceil(M / B) steps takes B pairs of a fresh shuffle, as code with a similarity does, so
    that no batch is short; cut: one shuffle per pass, the last batch short; cut_full: without a short one."""
    augment: str = "none"
    trains: Literal["all", "heads", "text head"] = "all"
    """What of the parameters that the model trains."""
    mean: tuple[float, ...] | None = None
    """Pixel constants of the pictures, for augmentations that need 8 bits."""
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, rule: config.Evaluate) -> "StudentSchedule":
        """The schedule of our own protocol: the rate drops after half of the passes."""
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
        )

    def on(self, mean: Sequence[float], std: Sequence[float]) -> "StudentSchedule":
        """The same schedule for pictures that were normalised with these constants."""
        return replace(self, mean=tuple(mean), std=tuple(std))


def score(model: DualEncoder, prepared: PreparedSplit, device: torch.device, chunk: int = 256) -> Recalls:
    """Retrieval recalls of `rank`."""
    return rank(model, prepared, device, chunk).recalls()


def rank(model: DualEncoder, prepared: PreparedSplit, device: torch.device, chunk: int = 256) -> Ranks:
    """What every query of a split finds with `model`, in eval mode; leaves the mode as it was.

    Raises `Diverged` when its embeddings are not finite or zero.
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
            raise Diverged(f"the {side} embeddings collapsed: some are zero or not finite")
    return ranks(images, texts, torch.from_numpy(split.image_of).to(device), chunk=chunk)


def train_student(
    model: DualEncoder,
    subsets: Sequence[TrainingPairs],
    schedule: StudentSchedule,
    loss: str,
    seed: int,
    student: int,
    at: Callable[[int, int], None] = lambda subset, passes: None,
) -> None:
    """Train `model` in place on the pairs of each subset in order. `at(subset, passes)` is called after every pass.

    Batches, dropout and augmentation are drawn by (seed, student, subset, pass) alone: student i meets the same draws
    whatever it learns from, so that methods are compared on the same students.
    Raises `Diverged` for a rate that is not positive and when the loss is not finite.
    """
    device = next(model.parameters()).device
    optimiser = None
    augmented = None if schedule.augment == "none" else augmentation(schedule.augment, schedule.mean, schedule.std)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and _is_trained(name, schedule))
    model.train()
    for s, pairs in enumerate(subsets):
        rates = subsets[-1] if schedule.rates == "last" else pairs
        if optimiser is None or not schedule.chain:
            optimiser = _optimiser(model, rates, schedule, s)
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
                    value = LOSSES[loss](model(pictures, texts[index]), similarity[index][:, index])
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()
                    optimiser.step()
            if not torch.isfinite(value):
                raise Diverged(
                    f"student {student} diverged on subset {s} in pass {epoch}: loss {value.item()} at rates "
                    f"{rates.lr_image:.4g} (image) and {rates.lr_text:.4g} (text)"
                )
            at(s, epoch + 1)


def batches(pairs: int, schedule: StudentSchedule, random: torch.Generator) -> list[Int[Tensor, " b"]]:
    """The batches of one pass. A subset smaller than a batch is one batch."""
    if schedule.batches == "drawn":
        return [torch.randperm(pairs, generator=random)[: schedule.batch] for _ in range(-(-pairs // schedule.batch))]
    cut = torch.randperm(pairs, generator=random).split(schedule.batch)
    whole = schedule.batches == "cut" or len(cut) == 1 or len(cut[-1]) == schedule.batch
    return list(cut if whole else cut[:-1])


def _optimiser(model: DualEncoder, rates: TrainingPairs, schedule: StudentSchedule, subset: int) -> torch.optim.SGD:
    by_tower = {"image": rates.lr_image, "text": rates.lr_image if schedule.text_rate == "image" else rates.lr_text}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for tower in TOWERS:
        lr, params = by_tower[tower], [p for n, p in named if tower_of(n) == tower]
        if params and not lr > 0:
            raise Diverged(
                f"subset {subset} has the learned {tower} rate {lr:.4g}, which trains nothing; set "
                "distill.min_inner_lr and lower distill.lr_lr"
            )
        groups += [{"params": params, "lr": lr}] if params else []
    return torch.optim.SGD(groups, lr=rates.lr_image, momentum=schedule.momentum, weight_decay=schedule.weight_decay)


def _is_trained(name: str, schedule: StudentSchedule) -> bool:
    if schedule.trains == "all":
        return True
    return name.startswith("text_head.") or (schedule.trains == "heads" and name.startswith("image_head."))
