"""Choice of the real pairs that a phase starts from: random pairs, or k-means prototypes (from AMD)."""

import numpy as np
import torch

from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import derive, generator
from rmdd.data.images import normalise
from rmdd.models.dual import DualEncoder
from rmdd.models.prepared import PreparedSplit


def check_enough(phase: int, pairs: int, train: PreparedSplit) -> None:
    """Raise `ValueError` when a phase needs more pairs than the train split has caption records."""
    total = len(train.split.captions)
    if pairs > total:
        raise ValueError(
            f"phase {phase} wants {pairs} pairs but the train split has {total} caption records; lower "
            f"distill.phases.{phase}.pairs (or distill.budget, where phases are planned), or ingest more data"
        )


def choose_records(phase: int, pairs: int, train: PreparedSplit, seed: int) -> list[int]:
    """Draw the caption records that a phase starts from, without replacement; two records may share an image."""
    check_enough(phase, pairs, train)
    total = len(train.split.captions)
    return torch.randperm(total, generator=generator(seed, "initial records", phase))[:pairs].tolist()


def prototypes(
    model: DualEncoder, device: torch.device, seed: int, phase: int, pairs: int, train: PreparedSplit
) -> list[int]:
    """Return the caption records nearest to `pairs` k-means centres of concatenated image and text embeddings.

    The image tower of `model` (on `device`) computes the image embeddings. There are two differences from AMD. Both
    embeddings are scaled to unit length, so they have equal weight. Mini-batch k-means is used, because COCO is large.
    """
    from sklearn.cluster import MiniBatchKMeans

    check_enough(phase, pairs, train)
    tower = model.eval()
    with torch.no_grad():
        features = in_chunks(
            lambda rows: tower.image_tower(normalise(torch.tensor(rows).to(device), train.mean, train.std)).cpu(),
            train.split.images,
            256,
        )
    images = torch.nn.functional.normalize(features, dim=1).numpy()
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
