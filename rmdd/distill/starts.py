"""Where a phase and its students start: real pairs, bounds that grow (DATM), ranges from drift, prototypes (AMD).

The ideas are told in `rmdd.methods.datm` and `rmdd.methods.amd`.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from rmdd import config
from rmdd.core.arrays import in_chunks
from rmdd.core.device import device_here
from rmdd.core.seeding import derive, generator
from rmdd.data.images import normalise
from rmdd.experts.store import Store
from rmdd.models.dual import TOWERS, Params, build, tower_of
from rmdd.models.prepared import PreparedSplit

_logger = logging.getLogger(__name__)


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


def growing_stop(phase: config.Phase, stop: int | float, iteration: int) -> int | float:
    """The exclusive upper bound U(i) of the start epochs at an iteration counted from 0; `stop` where none grows."""
    if phase.grow_from is None or phase.grow_until is None:
        return stop
    return min(stop, phase.grow_from + max(0, stop - phase.grow_from) * iteration // phase.grow_until)


def drift_ranges(store: Store, experts: Sequence[int], last: int) -> dict[str, tuple[int, int]]:
    """The half-open range of start epochs per tower, up to the start `last`; the whole of it where all ratios agree."""
    drift = mean_drift(store, experts)
    ratio = drift["image"] / (drift["text"] + np.finfo(np.float64).eps)
    above = ratio > np.median(ratio)
    epochs = np.arange(1, store.epochs + 1)
    reach = {
        "image": int(epochs[above].min()) if above.any() else last,
        "text": int(epochs[~above].max()) if above.any() else last,
    }
    for tower, found in reach.items():
        if found > last:
            _logger.warning("%s starts up to epoch %d are cut at %d, where the path ends", tower, found, last)
    return {tower: (0, min(r, last) + 1) for tower, r in reach.items()}


def mean_drift(store: Store, experts: Sequence[int]) -> dict[str, np.ndarray]:
    """Per tower, how far the mean of the experts moves in each epoch, (epochs,)."""
    squares = {tower: np.zeros(store.epochs) for tower in TOWERS}
    before = _mean(store, experts, 0)
    for epoch in range(1, store.epochs + 1):
        now = _mean(store, experts, epoch)
        for name in now:
            squares[tower_of(name)][epoch - 1] += float((now[name] - before[name]).square().sum())
        before = now
    return {tower: np.sqrt(s) for tower, s in squares.items()}


def _mean(store: Store, experts: Sequence[int], epoch: int) -> Params:
    total: Params = {}
    for expert in experts:
        for name, p in store.read(expert, epoch).items():
            total[name] = total.get(name, 0) + p.double() / len(experts)
    return total


def prototypes(run: config.Run, phase: int, pairs: int, train: PreparedSplit) -> list[int]:
    """The caption records nearest to the `pairs` k-means centres of image and text embeddings, unit length each.

    Unit lengths, so that neither side outweighs the other, and k-means by mini-batches, for the sake of COCO, are ours.
    """
    from sklearn.cluster import MiniBatchKMeans

    seed = run.seed_of("distill")
    check_enough(phase, pairs, train)
    device = device_here(run.runtime)
    model = build(run.model, train.texts.shape[1], run.data.image_size, run.seed_of("experts"), "expert", 0)
    tower = model.to(device).eval()
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
