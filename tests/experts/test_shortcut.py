from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd import config
from rmdd.experts import shortcut
from rmdd.experts.shortcut import ShortcutPath, arc_positions
from rmdd.experts.store import Store, Writer

EPOCHS = 5
REST = "image_tower.at_rest"


def trajectory(seed=0, dtype=torch.float32):
    """Return a random walk of four layers that move at different speeds; one of them never moves."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"image_tower.w": (4, 3), REST: (5,), "text_head.w": (3, 2), "text_head.b": (2,)}
    theta = {n: torch.randn(shape, generator=random).to(dtype) for n, shape in shapes.items()}
    walk = [theta]
    for _ in range(EPOCHS):
        theta = {
            n: p
            if n == REST
            else p + float(torch.rand((), generator=random)) * torch.randn(p.shape, generator=random).to(dtype)
            for n, p in theta.items()
        }
        walk.append(theta)
    return walk


def norms_of(walk):
    return {n: np.array([(b[n] - a[n]).double().norm().item() for a, b in pairwise(walk)]) for n in walk[0]}


def shortcut_of(walk, endpoint):
    return ShortcutPath(walk[0], walk[endpoint], norms_of(walk), endpoint)


def rule(trajectory, **change):
    return config.Distill(trajectory=trajectory, **change)


def stored(tmp_path, walk):
    shapes = {n: tuple(p.shape) for n, p in walk[0].items()}
    store = Store.create(tmp_path, shapes, shared={}, epochs=EPOCHS, keep=None, dtype="float32", facts={})
    writer = Writer(store, 0)
    for theta in walk:
        writer.add(theta, {})
    writer.finish()
    return store


@pytest.mark.parametrize("endpoint", [1, 3, EPOCHS])
def test_ends_of_a_shortcut_are_checkpoints(endpoint):
    walk = trajectory()
    path = shortcut_of(walk, endpoint)
    for epoch in (0, endpoint):
        assert all(torch.equal(p, walk[epoch][n]) for n, p in path.at(epoch).items())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), endpoint=st.integers(1, EPOCHS))
def test_every_step_shrinks_by_the_same_factor_per_layer(seed, endpoint):
    walk = trajectory(seed, torch.float64)
    path, lengths = shortcut_of(walk, endpoint), norms_of(walk)
    points = [path.at(t) for t in range(endpoint + 1)]
    for name, straight in path.straightness().items():
        chord = walk[endpoint][name] - walk[0][name]
        assert 0 <= straight <= 1 + 1e-12
        for t in range(endpoint):
            step = points[t + 1][name] - points[t][name]
            assert step.norm().item() == pytest.approx(straight * lengths[name][t], rel=1e-9, abs=1e-12)
            assert (step * chord).sum().item() == pytest.approx(
                (step.norm() * chord.norm()).item(), rel=1e-9, abs=1e-12
            )


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.just(0.0) | st.floats(1e-30, 1e6), min_size=1, max_size=8))
def test_beta_rises_from_zero_to_one(steps):
    beta = arc_positions(np.array(steps))
    assert len(beta) == len(steps) + 1 and beta[0] == 0 and list(beta) == sorted(beta)
    assert beta[-1] == (1 if sum(steps) > 0 else 0)


def test_beta_is_the_share_of_the_path_length():
    assert list(arc_positions(np.array([1.0, 3.0, 0.0, 4.0]))) == [0, 1 / 8, 1 / 2, 1 / 2, 1]


@pytest.mark.parametrize("endpoint", [2, EPOCHS])
def test_the_shortcut_of_a_shortcut_is_itself(endpoint):
    path = shortcut_of(trajectory(dtype=torch.float64), endpoint)
    again = shortcut_of([path.at(t) for t in range(endpoint + 1)], endpoint)
    for t in range(endpoint + 1):
        torch.testing.assert_close(again.at(t), path.at(t), rtol=1e-13, atol=1e-13)
    moving = [s for n, s in again.straightness().items() if n != REST]
    assert moving == pytest.approx([1] * len(moving))


def test_a_straight_trajectory_is_its_own_shortcut():
    first, last = trajectory()[0], trajectory()[-1]
    pace = (0.0, 0.1, 0.5, 0.6, 0.9, 1.0)
    walk = [{n: (1 - s) * first[n].double() + s * last[n].double() for n in first} for s in pace]
    path = shortcut_of(walk, EPOCHS)
    for t in range(EPOCHS + 1):
        torch.testing.assert_close(path.at(t), walk[t], rtol=1e-12, atol=1e-12)


def test_a_layer_at_rest_stays_exactly_constant():
    walk = trajectory()
    path = shortcut_of(walk, EPOCHS)
    assert all(torch.equal(path.at(t)[REST], walk[0][REST]) for t in range(EPOCHS + 1))
    assert path.straightness()[REST] == 0


def test_steps_below_float_resolution_count_as_rest():
    assert list(arc_positions(np.array([1e-9, 2e-9]), size=1.0)) == [0, 0, 0]
    assert list(arc_positions(np.array([1e-9, 3e-9]), size=0.0)) == [0, 0.25, 1]
    assert list(arc_positions(np.array([1e-3, 3e-3]), size=1.0)) == [0, 0.25, 1]


def test_only_norms_up_to_the_endpoint_count():
    walk = trajectory()
    norms = {n: np.where(np.arange(EPOCHS) < 3, s, np.nan) for n, s in norms_of(walk).items()}
    full, cut = shortcut_of(walk, 3), ShortcutPath(walk[0], walk[3], norms, 3)
    assert all(torch.equal(full.at(2)[n], cut.at(2)[n]) for n in walk[0])


def test_paths_of_a_store(tmp_path):
    walk = trajectory()
    store = stored(tmp_path, walk)
    paths = {kind: shortcut.open_path(store, 0, rule(kind), 3) for kind in ("original", "shortcut", "convexified")}
    last = shortcut.open_path(store, 0, rule("shortcut"), EPOCHS)
    assert {kind: path.endpoint for kind, path in paths.items()} == {"original": 5, "shortcut": 3, "convexified": 5}
    for t in range(EPOCHS + 1):
        assert all(torch.equal(p, walk[t][n]) for n, p in paths["original"].at(t).items())
        assert all(torch.equal(p, last.at(t)[n]) for n, p in paths["convexified"].at(t).items())
    for t in range(4):
        assert all(torch.equal(p, shortcut_of(walk, 3).at(t)[n]) for n, p in paths["shortcut"].at(t).items())


def test_positions_are_linear_between_epochs():
    beta = arc_positions(np.array([1.0, 3.0, 0.0, 4.0]))
    assert [beta.at(t) for t in range(5)] == list(beta)
    assert (beta.at(0.5), beta.at(1.25), beta.at(2.75), beta.at(3.5)) == (1 / 16, 1 / 8 + 3 / 32, 1 / 2, 3 / 4)
    assert beta.at(4.0) == 1


@settings(deadline=None, max_examples=25)
@given(epoch=st.floats(0, EPOCHS))
def test_a_real_epoch_lies_between_its_neighbours(epoch):
    walk = trajectory(dtype=torch.float64)
    path, low = shortcut_of(walk, EPOCHS), int(epoch)
    before, after = path.at(low), path.at(min(low + 1, EPOCHS))
    for name, p in path.at(epoch).items():
        torch.testing.assert_close(p, torch.lerp(before[name], after[name], epoch - low), rtol=1e-12, atol=1e-12)


def test_a_trajectory_as_trained_has_whole_epochs_only(tmp_path):
    path = shortcut.open_path(stored(tmp_path, trajectory()), 0, rule("original"), 3)
    assert same(path.at(2.0), path.at(2))
    with pytest.raises(ValueError, match="asked for epoch 1.5 of a trajectory that has whole epochs only"):
        path.at(1.5)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_errors(tmp_path):
    store = stored(tmp_path, trajectory())
    with pytest.raises(
        ValueError, match="ends at epoch 7 but the store .* holds epochs 0-5.*train experts with epochs: 7"
    ):
        shortcut.open_path(store, 0, rule("shortcut"), 7)
    for kind, beyond in (("shortcut", 4), ("original", 6)):
        path = shortcut.open_path(store, 0, rule(kind), 3)
        for epoch in (-1, beyond):
            with pytest.raises(
                ValueError, match=f"asked for epoch {epoch} of a path that covers epochs 0-{beyond - 1}"
            ):
                path.at(epoch)
