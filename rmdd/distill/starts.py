"""The real pairs that a phase starts from: drawn at random, or prototypes (the idea is AMD's, `rmdd.methods.amd`)."""

import numpy as np
import torch

from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import derive, generator
from rmdd.data.images import normalise
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit


def check_enough(phase: int, pairs: int, train: PreparedSplit) -> None:
    """Raise `ValueError` when a phase wants more pairs than there are caption records."""
    total = len(train.split.captions)
    if pairs > total:
        raise ValueError(
            f"phase {phase} wants {pairs} pairs but the train split has {total} caption records; lower "
            f"distill.phases.{phase}.pairs (or distill.budget, where phases are planned), or ingest more data"
        )


def choose_records(phase: int, pairs: int, train: PreparedSplit, seed: int) -> list[int]:
    """Caption records that a phase starts from: uniform without replacement, so two may share an image."""
    check_enough(phase, pairs, train)
    total = len(train.split.captions)
    return torch.randperm(total, generator=generator(seed, "initial records", phase))[:pairs].tolist()


def prototypes(
    model: DualEncoder, device: torch.device, seed: int, phase: int, pairs: int, train: PreparedSplit
) -> list[int]:
    """The caption records nearest to the `pairs` k-means centres of image and text embeddings, unit length each, as the
    image tower of `model` on `device` sees them.

    Unit lengths, so that neither side outweighs the other, and k-means by mini-batches, for the sake of COCO, are ours.
    """
    from sklearn.cluster import MiniBatchKMeans

    check_enough(phase, pairs, train)
    tower = model.eval()
    with torch.no_grad():
        seen = in_chunks(
            lambda rows: tower.image_tower(normalise(torch.tensor(rows).to(device), train.mean, train.std)).cpu(),
            train.split.images,
            256,
        )
    images = torch.nn.functional.normalize(seen, dim=1).numpy()
    texts = torch.nn.functional.normalize(torch.tensor(train.texts), dim=1).numpy()
    points = np.concatenate([images[train.split.image_of], texts], axis=1)
    means = MiniBatchKMeans(pairs, random_state=derive(seed, "prototypes", phase) % 2**32, n_init=1, batch_size=4096)
    centres = means.fit(points).cluster_centers_
    free = np.ones(len(points), dtype=bool)
    chosen = []
    for centre in centres:
        distance = np.where(free, ((points - centre) ** 2).sum(axis=1), np.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return chosen
