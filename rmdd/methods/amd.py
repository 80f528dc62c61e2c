"""AMD: asynchronous matching with dynamic sampling (ICLR 2026), on a LoRS loop.

Text heads move most in the first epochs, image towers later, so one start epoch for both is wrong for one of them.
Starts are drawn independently, t_V ~ U{0..R_V} and t_L ~ U{0..R_L}, from ranges found in the experts:

    drift   D_m(t) = | mean over experts of theta_m(t) - the same at t - 1 |,  m = image V, text L
    ratio   r(t) = D_V(t) / D_L(t), threshold T its median;  R_V = min{t: r(t) > T},  R_L = max{t: r(t) <= T}

and the set starts from prototypes: pairs nearest to the k-means centres of image and text embeddings side by side. From
notes on the paper, which has no code; its rule for R_V is an odd one, and `ranges: stated` takes ranges by hand.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from rmdd import config
from rmdd.config.runfile import filled
from rmdd.core.arrays import in_chunks
from rmdd.core.seeding import derive
from rmdd.data.images import normalise
from rmdd.distill.phases import check_enough
from rmdd.experts.store import Store
from rmdd.methods.lors import LoRS
from rmdd.models.dual import TOWERS, Params, build, tower_of
from rmdd.models.prepared import PreparedSplit

_logger = logging.getLogger(__name__)


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

    from rmdd.core.device import device_here

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


class AMD(LoRS):
    card = "ICLR 2026"
    verified = (
        "ranges of planted drifts, prototypes and steps equal slow float64 ones; as LoRS on emoji. "
        "Open: published figures"
    )
    defaults = filled({"distill": {"starts": "independent", "ranges": "drift", "init": "prototypes"}}, LoRS.defaults)
