"""What the phases are: their draws, and the real pairs they start from. Phases never read one another.

M pairs of the phase, B pairs in a mini-batch, K inner steps.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from rmdd import config
from rmdd.data.augment import augment
from rmdd.data.images import decode, normalise
from rmdd.data.material import Material
from rmdd.distill import similarity
from rmdd.distill.synthetic import Synthetic
from rmdd.seeding import derive, generator

# Mean and deviation of normalised pixels and of BERT embeddings, for starts from noise.
NOISE_PIXEL_MEAN, NOISE_PIXEL_STD = (-0.0626, -0.0221, 0.0680), (1.0451, 1.0752, 1.0539)


@dataclass(frozen=True)
class Draw:
    """Everything random about one outer iteration."""

    expert: int
    """Position in the list of experts."""
    start: int
    """Epoch of the path at which the student starts."""
    batches: Int[Tensor, "K B"]
    dropout_seeds: tuple[int, ...]
    """One per inner step."""


def draw(rule: config.Distill, phase: int, iteration: int, experts: int, seed: int) -> Draw:
    """The draws of one outer iteration, a function of (seed, phase, iteration) alone.

    Experts come in shuffled order, each once before any comes again. Starts are uniform over the phase's range.
    """
    plan = rule.phases[phase]
    turn, place = divmod(iteration, experts)
    order = torch.randperm(experts, generator=generator(seed, "expert turn", phase, turn))
    random = generator(seed, "iteration", phase, iteration)
    stop = plan.stop + (rule.start_rule == "inclusive")
    start = int(torch.randint(plan.start, stop, (1,), generator=random))
    return Draw(
        expert=int(order[place]),
        start=start,
        batches=mini_batches(plan.pairs, rule.batch, rule.steps, random),
        dropout_seeds=tuple(derive(seed, "inner dropout", phase, iteration, k) for k in range(rule.steps)),
    )


def mini_batches(pairs: int, batch: int, steps: int, random: torch.Generator) -> Int[Tensor, "K B"]:
    """Batches cut from permutations of the pairs; a new permutation when too few are left, their tail unused."""
    rows: list[Tensor] = []
    order, cursor = torch.randperm(pairs, generator=random), 0
    for _ in range(steps):
        if cursor + batch > pairs:
            order, cursor = torch.randperm(pairs, generator=random), 0
        rows.append(order[cursor : cursor + batch])
        cursor += batch
    return torch.stack(rows)


def choose_records(phase: int, pairs: int, train: Material, seed: int) -> list[int]:
    """Caption records that a phase starts from: uniform without replacement, so two may share an image."""
    total = len(train.split.captions)
    if pairs > total:
        raise ValueError(
            f"phase {phase} wants {pairs} pairs but the train split has {total} caption records; lower "
            f"distill.phases.{phase}.pairs or ingest more data"
        )
    return torch.randperm(total, generator=generator(seed, "initial records", phase))[:pairs].tolist()


def initial(run: config.Run, phase: int, train: Material, records: list[int]) -> Synthetic:
    """The synthetic set that a phase starts from: real records, or noise of the same statistics."""
    rule, seed = run.distill, run.seed_of("distill")
    random = generator(seed, "initial tensors", phase)
    if rule.init == "noise":
        shape = (len(records), 3, run.data.image_size, run.data.image_size)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (NOISE_PIXEL_MEAN, NOISE_PIXEL_STD))
        images = torch.randn(shape, generator=random) * std + mean
        level, spread = float(train.texts.mean()), float(train.texts.std())
        texts = torch.randn((len(records), train.texts.shape[1]), generator=random) * spread + level
    else:
        images = normalise(real_images(run, train, records, augmented=rule.init_augment), train.mean, train.std)
        texts = torch.tensor(train.texts[records])
    return Synthetic(
        images=images,
        texts=texts,
        lr_image=torch.tensor(float(rule.inner_lr)),
        lr_text=torch.tensor(float(rule.inner_lr_text or rule.inner_lr)),
        similarity=similarity.initial(rule.similarity, len(records), random),
        alpha=rule.similarity.alpha,
    )


def real_images(run: config.Run, train: Material, records: list[int], *, augmented: bool = False) -> Tensor:
    """The pictures of caption records as uint8 (M,3,S,S), squashed, or augmented as the experts saw them."""
    pictures = train.split.image_of[records]
    if not augmented:
        return torch.from_numpy(train.split.images[pictures])
    data, seed = run.data, run.seed_of("distill")
    drawn = []
    for picture, record in zip(pictures, records, strict=True):
        image = decode(
            train.split.encoded(int(picture)),
            max_pixels=data.max_pixels,
            background=data.background,
            exif_orientation=data.exif_orientation,
        )
        drawn.append(
            torch.from_numpy(
                augment(image, run.experts.augment, data.image_size, generator(seed, "initial augment", record))
            )
        )
    return torch.stack(drawn)
