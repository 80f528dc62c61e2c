"""MCT: updates compared with LoRS on a straight path, real-valued start epochs, and paths through several anchors."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from slow import assert_equals_slow, plain_loss, shortcut, two_passes, wbce
from toy import EPOCHS, method_run, same_tensors, store_of

from rmdd import config
from rmdd.methods.mct import anchored

FIVE = 5


def store_of_five_epochs(path):
    """Return a store with one expert of five epochs, and the list of its checkpoints."""
    theta = {"image_tower.w": torch.ones(4, 3), "text_head.w": torch.ones(3, 2), "text_head.b": torch.ones(2)}
    store = store_of(path, theta, epochs=FIVE, experts=1)
    return store, [store.read(0, t) for t in range(FIVE + 1)]


def test_equals_the_two_passes_of_lors_on_a_straight_path(make):
    setup = make(method_run("mct"))

    def gradient_of(leaves, drawn):
        assert drawn.start != int(drawn.start)
        expert = setup.matcher.experts[drawn.expert]
        start, target = (shortcut(setup.store, expert, EPOCHS, drawn.start + ahead) for ahead in (0, 1))
        return two_passes(plain_loss(setup.model, wbce), start, target, leaves, setup.begun.alpha, drawn.batches)

    assert_equals_slow(setup, gradient_of)


def test_starts_are_spread_evenly_over_the_real_numbers_of_the_range(make):
    plan = {"pairs": 6, "start": 1, "stop": 2, "endpoint": EPOCHS, "iterations": 4}
    matcher = make(method_run("mct", phases=[plan])).matcher
    starts = torch.tensor([matcher.draw(i).start for i in range(400)], dtype=torch.float64)
    assert starts.min() >= 1 and starts.max() < 2 and len(starts.unique()) == 400
    assert torch.histc(starts, bins=4, min=1, max=2).min() > 70
    assert matcher.draw(5).start == starts[5]


@pytest.mark.parametrize("smooth", [False, True])
def test_anchors_in_between_are_on_the_path(make, smooth):
    """With three epochs, all checkpoints are anchors; a smoothed anchor is the mean of itself and its neighbours."""
    setup = make(method_run("mct", options={"anchors": 4, "smooth_anchors": smooth}))
    path = setup.matcher.path(1)
    walk = [setup.store.read(1, t) for t in range(EPOCHS + 1)]
    near = {0: [0], 1: [0, 1, 2], 2: [1, 2, 3], 3: [2, 3]} if smooth else {t: [t] for t in range(4)}
    for epoch, few in near.items():
        for name, p in path.at(epoch).items():
            torch.testing.assert_close(p, sum(walk[t][name] for t in few) / len(few), rtol=1e-12, atol=1e-12)
    drawn = setup.matcher.draw(0)
    assert torch.isfinite(setup.matcher.gradient(setup.begun, drawn).loss)


def test_targets_past_the_last_epoch_are_refused():
    plan = [{"pairs": 6, "start": 0, "stop": EPOCHS, "endpoint": EPOCHS}]
    with pytest.raises(
        config.ConfigError, match=r"needs epoch 4, but the path ends at experts.epochs 3; set .*stop to 2"
    ):
        method_run("mct", phases=plan)


@pytest.mark.parametrize(("anchors", "epochs"), [(3, [0, 2, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_anchors_are_evenly_spaced_checkpoints_on_the_path(tmp_path, anchors, epochs):
    store, walk = store_of_five_epochs(tmp_path)
    path = anchored(store, 0, anchors, smooth=False)
    assert path.epochs == epochs and path.endpoint == FIVE
    for t in epochs:
        assert same_tensors(path.at(t), walk[t])


def test_more_anchors_than_epochs_are_all_epochs(tmp_path):
    store, walk = store_of_five_epochs(tmp_path)
    path = anchored(store, 0, 11, smooth=False)
    assert path.epochs == list(range(FIVE + 1)) and all(same_tensors(path.at(t), walk[t]) for t in path.epochs)


@pytest.mark.parametrize("smooth", [False, True])
def test_an_anchored_path_is_continuous_and_straight_between_anchors(tmp_path, smooth):
    store, _ = store_of_five_epochs(tmp_path)
    path = anchored(store, 0, 4, smooth=smooth)
    lengths = store.norms(0)
    for t in path.epochs[1:-1]:
        for near in (path.at(t - 1e-9), path.at(t + 1e-9)):
            torch.testing.assert_close(near, path.at(t), rtol=0, atol=1e-6)
    for a, b in pairwise(path.epochs):
        first, last = path.at(a), path.at(b)
        for t in np.linspace(a, b, 5):
            for name, p in path.at(float(t)).items():
                covered = [min(max(t - e, 0), 1) * lengths[name][e] for e in range(a, b)]
                share = sum(covered) / (sum(lengths[name][a:b]) or 1)
                torch.testing.assert_close(p, torch.lerp(first[name], last[name], share), rtol=1e-5, atol=1e-6)


def test_smoothed_anchors_are_means_of_their_neighbours(tmp_path):
    store, walk = store_of_five_epochs(tmp_path)
    path = anchored(store, 0, 4, smooth=True)
    for t, near in {0: [0], 2: [1, 2, 3], 3: [2, 3, 4], 5: [4, 5]}.items():
        for name, p in path.at(t).items():
            torch.testing.assert_close(p, sum(walk[i][name] for i in near) / len(near))
    both = anchored(store, 0, 2, smooth=True)
    assert both.epochs == [0, 5] and same_tensors(both.at(0), walk[0])
    torch.testing.assert_close(both.at(5), path.at(5))
