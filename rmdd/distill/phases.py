"""The random draws and the initial synthetic set of a phase. No phase reads the files of another phase.

Symbols: M pairs of the phase, B pairs in a mini-batch, K inner steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from rmdd import config
from rmdd.core.seeding import derive, generator
from rmdd.data.augment import augment
from rmdd.data.decode import decode_as
from rmdd.data.images import normalise
from rmdd.distill import similarity
from rmdd.distill.starts import mean_captions
from rmdd.distill.synthetic import Synthetic, reduced
from rmdd.models.prepared import PreparedSplit

# Mean and standard deviation of real pixels in each channel; synthetic images that start from noise have the same.
NOISE_PIXEL_MEAN, NOISE_PIXEL_STD = (-0.0626, -0.0221, 0.0680), (1.0451, 1.0752, 1.0539)


Ranges = dict[str, tuple[int | float, int | float]]
"""Range [start, stop) of start epochs of each tower, by tower name."""


class Window(NamedTuple):
    """Range [low, stop) of real-valued start epochs, and `endpoint`; `phases: adaptive` moves range and endpoint."""

    low: float
    stop: float
    endpoint: int


@dataclass(frozen=True)
class Draw:
    """All random choices of one outer iteration."""

    expert: int
    """Index of the expert in the list of finished experts, from 0."""
    start: int | float
    """Epoch on the expert's path at which the image tower of the student starts."""
    start_text: int | float
    """Epoch on the expert's path at which the text tower of the student starts."""
    batches: Int[Tensor, "K B"]
    """Indices of the synthetic pairs in each mini-batch of the K inner steps."""
    dropout_seeds: tuple[int, ...]
    """One dropout seed per inner step of the student."""


def draw(
    rule: config.Distill,
    phase: int,
    iteration: int,
    experts: int,
    seed: int,
    ranges: Mapping[str, tuple[int | float, int | float]] | None = None,
    *,
    real: bool = False,
    apart: bool = False,
) -> Draw:
    """Return the random choices of one outer iteration; they depend only on the seed, the phase and the iteration.

    Each of the `experts` is drawn once, in shuffled order; then all are drawn again in a new order. Start epochs are
    uniform over the half-open `ranges` of the two towers (default: the ranges of the phase). They are integers, or real
    numbers if `real`. Both towers share one start epoch; if `apart`, each tower has its own.
    """
    plan = rule.phases[phase]
    ranges = plan.ranges if ranges is None else ranges
    turn, position = divmod(iteration, experts)
    order = torch.randperm(experts, generator=generator(seed, "expert turn", phase, turn))
    random = generator(seed, "iteration", phase, iteration)
    start = _start(rule, ranges["image"], random, real)
    batches = mini_batches(plan.pairs, rule.batch, rule.steps, random, independent=rule.batches == "independent")
    text = start
    if apart:
        text = _start(rule, ranges["text"], generator(seed, "text start", phase, iteration), real)
    return Draw(
        expert=int(order[position]),
        start=start,
        start_text=text,
        batches=batches,
        dropout_seeds=tuple(derive(seed, "inner dropout", phase, iteration, k) for k in range(rule.steps)),
    )


def _start(
    rule: config.Distill, span: tuple[int | float, int | float], random: torch.Generator, real: bool
) -> int | float:
    low, stop = span
    if real:
        return low + (stop - low) * float(torch.rand((), generator=random, dtype=torch.float64))
    return int(torch.randint(int(low), int(stop) + (rule.start_rule == "inclusive"), (1,), generator=random))


def mini_batches(
    pairs: int, batch: int, steps: int, random: torch.Generator, *, independent: bool = False
) -> Int[Tensor, "K B"]:
    """Return mini-batches cut from a permutation of the pairs.

    When too few pairs remain for a batch, they are dropped and a new permutation is drawn. With `independent` (MTT-VL),
    the batches are drawn independently, each from all pairs. A batch is never larger than the number of pairs.
    """
    if independent:
        return torch.stack([torch.randperm(pairs, generator=random)[:batch] for _ in range(steps)])
    rows: list[Tensor] = []
    order, cursor = torch.randperm(pairs, generator=random), 0
    for _ in range(steps):
        if cursor + batch > pairs:
            order, cursor = torch.randperm(pairs, generator=random), 0
        rows.append(order[cursor : cursor + batch])
        cursor += batch
    return torch.stack(rows)


def initial(run: config.Run, phase: int, train: PreparedSplit, records: list[int]) -> Synthetic:
    """Return the initial set of a phase: the pairs of caption `records`, or noise with mean and spread of real data.

    With `mean_captions`, the text of a pair is the mean embedding of all captions of its image.
    """
    rule, seed = run.distill, run.seed_of("distill")
    random = generator(seed, "initial tensors", phase)
    if rule.init == "noise":
        shape = (len(records), 3, run.stored_size, run.stored_size)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (NOISE_PIXEL_MEAN, NOISE_PIXEL_STD))
        images = torch.randn(shape, generator=random) * std + mean
        level, spread = float(train.texts.mean()), float(train.texts.std())
        texts = torch.randn((len(records), train.texts.shape[1]), generator=random) * spread + level
    else:
        images = normalise(
            _pixels(train, records, run.data, run.experts.augment if rule.init_augment else None, seed),
            train.mean,
            train.std,
        )
        images = reduced(images, run.stored_size)
        texts = mean_captions(records, train) if rule.init == "mean_captions" else torch.tensor(train.texts[records])
    return Synthetic(
        images=images,
        texts=texts,
        lr_image=torch.tensor(float(rule.inner_lr)),
        lr_text=torch.tensor(float(rule.inner_lr_text or rule.inner_lr)),
        similarity=similarity.initial(rule.similarity, len(records), random),
        alpha=rule.similarity.alpha,
    )


def _pixels(
    train: PreparedSplit, records: list[int], data: config.Data, augmentation: config.Augment | None, seed: int
) -> Tensor:
    """Return the images of caption records, uint8 (M,3,S,S): augmented if `augmentation` is given, else resized."""
    image_rows = train.split.image_of[records]
    if augmentation is None:
        return torch.from_numpy(train.split.some_images(image_rows))
    images = []
    for row, record in zip(image_rows, records, strict=True):
        image = decode_as(train.split.encoded(int(row)), data)
        random = generator(seed, "initial augment", record)
        images.append(torch.from_numpy(augment(image, augmentation, data.image_size, random)))
    return torch.stack(images)
