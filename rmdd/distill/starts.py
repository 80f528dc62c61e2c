"""Choice of the real pairs that a phase starts from: random pairs, random images, or k-means prototypes (from AMD).

Symbols: M pairs of the phase, F text feature width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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


def choose_images(phase: int, pairs: Sequence[int], train: PreparedSplit, seed: int) -> list[int]:
    """Draw the images that a phase starts from, of which none is in another phase; `pairs` lists the pairs of all
    phases. Return the first caption record of each image."""
    first_records = np.unique(train.split.image_of, return_index=True)[1]
    if sum(pairs) > len(first_records):
        raise ValueError(
            f"distill.init: mean_captions wants {sum(pairs)} different images but the train split has "
            f"{len(first_records)}; lower the pairs of the phases, or set distill.init: real"
        )
    order = torch.randperm(len(first_records), generator=generator(seed, "initial images"))
    chosen = order[sum(pairs[:phase]) : sum(pairs[: phase + 1])].tolist()
    return [int(first_records[i]) for i in chosen]


def mean_captions(records: Sequence[int], train: PreparedSplit) -> Float[Tensor, "M F"]:
    """Return for each caption record the mean embedding of all captions of its image."""
    image_of = train.split.image_of
    means = [train.texts[image_of == image_of[r]].mean(axis=0, dtype=np.float64) for r in records]
    return torch.tensor(np.array(means), dtype=torch.float32)


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
