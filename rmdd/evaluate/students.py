"""Students: fresh models trained on a distilled set, and the protocols they are scored by.

A student is trained on the subsets in order with the same weights. The headline protocol fixes the number of
passes, gives every subset its own learned rates, optimiser and schedule, chooses on val and reads test once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmdd import config
from rmdd.data.images import normalise
from rmdd.data.material import Material
from rmdd.evaluate.retrieval import Recalls, recalls
from rmdd.models.dual import TOWERS, DualEncoder, tower_of
from rmdd.models.losses import LOSSES
from rmdd.seeding import derive, generator


class Diverged(FloatingPointError):
    """A student cannot be trained or scored with these rates."""


@dataclass(frozen=True)
class Lesson:
    """What a student learns from one subset: M pairs with target similarities and its two rates."""

    images: Float[Tensor, "M 3 H W"]
    texts: Float[Tensor, "M F"]
    similarity: Float[Tensor, "M M"]
    lr_image: float
    lr_text: float


def score(model: DualEncoder, material: Material, device: torch.device, chunk: int = 256) -> Recalls:
    """Retrieval recalls of `model` on a split, in eval mode; leaves the mode as it was.

    Raises `Diverged` when its embeddings are not finite or zero.
    """
    was_training = model.training
    model.eval()
    split = material.split
    with torch.no_grad():
        images = torch.cat(
            [
                model.embed_images(
                    normalise(torch.tensor(split.images[i : i + chunk]).to(device), material.mean, material.std)
                )
                for i in range(0, len(split.images), chunk)
            ]
        )
        texts = torch.cat(
            [
                model.embed_texts(torch.tensor(material.texts[i : i + 4 * chunk]).to(device))
                for i in range(0, len(material.texts), 4 * chunk)
            ]
        )
    model.train(was_training)
    for side, embeddings in (("image", images), ("text", texts)):
        if not (torch.isfinite(embeddings).all() and (embeddings != 0).any(dim=1).all()):
            raise Diverged(f"the {side} embeddings collapsed: some are zero or not finite")
    return recalls(images, texts, torch.from_numpy(split.image_of).to(device), chunk=chunk)


def train_student(
    model: DualEncoder,
    lessons: Sequence[Lesson],
    rule: config.Evaluate,
    loss: str,
    seed: int,
    student: int,
    at: Callable[[int, int], None] = lambda subset, passes: None,
) -> None:
    """Train `model` in place on the lessons in order. `at(subset, passes)` is called after every pass.

    Each pass takes ceil(M/B) steps and each step a fresh random batch, as the published code does. The rate
    drops after half of the passes: of every subset (`per_subset`), or once, of the first (`shared`).
    Raises `Diverged` for a rate that is not positive and when the loss is not finite.
    """
    device = next(model.parameters()).device
    optimiser = None
    model.train()
    for s, lesson in enumerate(lessons):
        rates = lessons[-1] if rule.lr == "last" else lesson
        if optimiser is None or rule.schedule == "per_subset":
            optimiser = _optimiser(model, rates, rule, s)
        images, texts = lesson.images.to(device), lesson.texts.to(device)
        similarity = lesson.similarity.to(device)
        pairs, batch = len(images), min(rule.batch, len(images))
        for epoch in range(rule.epochs):
            if epoch == (rule.epochs + 1) // 2 and (rule.schedule == "per_subset" or s == 0):
                for group in optimiser.param_groups:
                    group["lr"] *= rule.lr_drop
            draw = generator(seed, "student batches", student, s, epoch)
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                torch.manual_seed(derive(seed, "student dropout", student, s, epoch))
                for _ in range(-(-pairs // rule.batch)):
                    index = torch.randperm(pairs, generator=draw)[:batch].to(device)
                    value = LOSSES[loss](model(images[index], texts[index]), similarity[index][:, index])
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()
                    optimiser.step()
            if not torch.isfinite(value):
                raise Diverged(
                    f"student {student} diverged on subset {s} in pass {epoch}: loss {value.item()} at rates "
                    f"{rates.lr_image:.4g} (image) and {rates.lr_text:.4g} (text)"
                )
            at(s, epoch + 1)


def _optimiser(model: DualEncoder, rates: Lesson, rule: config.Evaluate, subset: int) -> torch.optim.SGD:
    by_tower = {"image": rates.lr_image, "text": rates.lr_image if rule.text_lr == "image" else rates.lr_text}
    for tower, lr in by_tower.items():
        if not lr > 0:
            raise Diverged(
                f"subset {subset} has the learned {tower} rate {lr:.4g}, which trains nothing; set "
                "distill.min_inner_lr and lower distill.lr_lr"
            )
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if tower_of(n) == t], "lr": by_tower[t]} for t in TOWERS]
    return torch.optim.SGD(groups, lr=rates.lr_image, momentum=rule.momentum, weight_decay=rule.weight_decay)


def reference_rule(rule: config.Evaluate) -> config.Evaluate:
    """The released evaluation of LoRS and PTM-ST, used for every method: 101 passes a subset, one optimiser and one
    drop for all, the last subset's rates.

    Departures: rates are the averaged ones, a projection on a frozen image tower is trained too, and the temperature is
    that of the distillation. Batch, momentum and decay stay those of `rule`, which the presets named after the paper
    set to the paper's. MTT-VL trained 51 passes and scored once, RepBlend scored every 20 passes.
    """
    return rule.model_copy(update={"epochs": 101, "schedule": "shared", "lr": "last", "lr_drop": 0.1, "eval_every": 10})
