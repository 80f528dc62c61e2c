"""Compare every statistic of trajectories with a slow, simple implementation in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from slow import plain_loss, shortcut, two_passes, wbce
from toy import EPOCHS, PAIRS, encoder, method_run

from rmdd.distill.trajectory import statistics
from rmdd.distill.trajectory.statistics import cosine_matrix, off_diagonal, principal, probe, probing
from rmdd.experts.store import Store, Writer

RUN = method_run("ptm_st", inner_dropout="off", estimator="exact")  # probed gradients are first-order nevertheless


def steps_of(store, expert):
    """Return the step length of every epoch and layer, computed from the checkpoints."""
    walk = [store.read(expert, t) for t in range(store.epochs + 1)]
    return [
        {n: math.sqrt(sum(((b[n] - a[n]) ** 2).double().flatten().tolist())) for n in a}
        for a, b in itertools.pairwise(walk)
    ]


def test_arc_lengths_are_those_of_the_joint_steps(store):
    expected = np.zeros(EPOCHS)
    for expert in (0, 1):
        for t, step in enumerate(steps_of(store, expert)):
            expected[t] += math.sqrt(sum(s**2 for s in step.values())) / 2
    np.testing.assert_allclose(statistics.arc_lengths(store, [0, 1]), expected, rtol=1e-6)


@pytest.mark.parametrize("endpoint", [1, 2, 3])
def test_straightness_is_chord_over_path(store, endpoint):
    chords, lengths = 0.0, 0.0
    for expert in (0, 1):
        steps, ends = steps_of(store, expert), [store.read(expert, t) for t in (0, endpoint)]
        layers = statistics.layer_straightness(store, expert, endpoint)
        for name in ends[0]:
            chord = float((ends[1][name] - ends[0][name]).double().norm())
            path = sum(step[name] for step in steps[:endpoint])
            assert layers[name] == pytest.approx(chord / path, rel=1e-6)
            chords, lengths = chords + chord, lengths + path
    assert statistics.straightness(store, [0, 1], endpoint) == pytest.approx(chords / lengths, rel=1e-6)
    assert endpoint > 1 or chords / lengths == pytest.approx(1, rel=1e-6)


def test_the_teachers_gain():
    val, arc = np.array([1.0, 41.0, 51.0, 49.0, 51.5]), np.array([4.0, 2.0, 0.0, 0.5])
    assert statistics.gain_per_arc(val, arc).tolist() == [10, 5, 0, 5]
    assert statistics.share_reached(val) == pytest.approx([0, 40 / 50.5, 50 / 50.5, 50 / 50.5, 1])
    assert statistics.share_reached(np.array([3.0, 2.0])).tolist() == [1, 1], "without any gain, the share is 1"


def test_val_curves_are_averaged_and_required(store, tmp_path):
    theta = encoder().trained()
    shapes = {n: tuple(p.shape) for n, p in theta.items()}
    other = Store.create(tmp_path, shapes, shared={}, epochs=1, keep=None, dtype="float32", facts={})
    for expert, val in enumerate(([1.0, 30.0], [3.0, 50.0])):
        writer = Writer(other, expert)
        for v in val:
            writer.add(theta, {"val": v})
        writer.finish()
    assert statistics.val_curve(other, [0, 1]).tolist() == [2, 40]
    with pytest.raises(ValueError, match=r"no val R@mean per epoch.*distill.phases by hand"):
        statistics.val_curve(store, [0])


@pytest.mark.parametrize("trajectory", ["original", "shortcut"])
def test_probed_gradients_are_those_of_two_passes(make, trajectory):
    made = make(probing(RUN, EPOCHS, trajectory, PAIRS))
    starts = [0, 2] if trajectory == "original" else [0, 0.5, 2]
    result = probe(made.matcher, made.begun, starts, draws=2)
    assert result.images.shape[:2] == (len(starts), 4)
    samples = list(itertools.product((0, 1), (0, 1)))
    for i, start in enumerate(starts):
        for j, (expert, draw) in enumerate(samples):
            ends = [
                shortcut(made.store, expert, EPOCHS, t) if trajectory == "shortcut" else made.store.read(expert, t)
                for t in (start, start + 1)
            ]
            leaves = {n: t.clone().requires_grad_() for n, t in made.begun.tensors().items()}
            batches = made.matcher.draw(draw).batches
            slow = two_passes(plain_loss(made.model, wbce), *ends, leaves, 1.0, batches)
            for part in ("images", "texts"):
                wanted = slow[part].flatten().detach()
                torch.testing.assert_close(getattr(result, part)[i, j], wanted, rtol=1e-9, atol=1e-12)


def test_cosines_are_between_mean_gradients(make):
    made = make(probing(RUN, EPOCHS, "shortcut", PAIRS))
    result = probe(made.matcher, made.begun, range(3))
    means = [[sum(s) / 2 for s in zip(*result.images[t].tolist(), strict=True)] for t in range(3)]
    matrix = result.cosine("images")
    for a, b in itertools.product(range(3), repeat=2):
        dot = sum(x * y for x, y in zip(means[a], means[b], strict=True))
        size = math.sqrt(sum(x * x for x in means[a]) * sum(y * y for y in means[b]))
        assert float(matrix[a, b]) == pytest.approx(dot / size, rel=1e-9)
    both = (result.cosine("images") + result.cosine("texts")) / 2
    torch.testing.assert_close(result.agreement(), both)
    averages = off_diagonal(matrix)
    assert averages["adjacent"] == pytest.approx(float(matrix[0, 1] + matrix[1, 2]) / 2)
    assert averages["all"] == pytest.approx(float(matrix[0, 1] + matrix[1, 2] + matrix[0, 2]) / 3)


def test_known_cosines():
    rows = torch.tensor([[3.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(cosine_matrix(rows), expected)


def test_principal_components_are_those_of_the_covariance():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places, shares = principal(rows)
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    for c, k in enumerate((-1, -2)):
        along = centred @ vectors[:, k]
        torch.testing.assert_close(places[:, c].abs(), along.abs())
        assert float(shares[c]) == pytest.approx(float(values[k] / values.sum()))


@pytest.mark.parametrize("trajectory", ["original", "shortcut"])
@pytest.mark.parametrize(("method", "options"), [("mct", {}), ("ptm_st", {}), ("amd", {"ranges": "stated"})])
def test_every_draw_of_a_probed_run_lies_on_its_path(make, trajectory, method, options):
    """Check that draws lie on the path whatever the run's ranges are; the engine options depend on such a draw."""
    run = method_run(method, trajectory="shortcut", start_rule="inclusive", steps=2, options=options)
    made = make(probing(run, EPOCHS, trajectory, PAIRS))
    for i in range(20):
        drawn = made.matcher.draw(i)
        assert drawn.start == drawn.start_text
        made.matcher.segment(drawn)
    assert torch.isfinite(probe(made.matcher, made.begun, [0, 2], experts=1).images).all()


def test_the_shortcut_of_a_run_with_anchors_is_the_straight_one(make):
    phases = [{"pairs": PAIRS, "stop": 2, "endpoint": EPOCHS}]
    run = method_run("mct", options={"anchors": 3, "smooth_anchors": True}, phases=phases)
    made = make(probing(run, EPOCHS, "shortcut", PAIRS))
    for t in (1, 2.5):
        slow = shortcut(made.store, 0, EPOCHS, t)
        for name, result in made.matcher.path(0).at(t).items():
            torch.testing.assert_close(result, slow[name], rtol=1e-9, atol=1e-12)


def test_an_averaged_probe_holds_one_gradient_per_start(make):
    made = make(probing(RUN, EPOCHS, "shortcut", PAIRS))
    every, means = (probe(made.matcher, made.begun, range(3), 2, averaged=a) for a in (False, True))
    assert means.images.shape[1] == means.texts.shape[1] == means.miss.shape[1] == 1 and every.images.shape[1] == 4
    for part in ("images", "texts"):
        torch.testing.assert_close(means.mean(part), every.mean(part))
    torch.testing.assert_close(means.miss[:, 0], every.miss.mean(dim=1))


@pytest.mark.parametrize("width", [1, 4, 100])
def test_products_of_wide_rows_are_computed_in_blocks(monkeypatch, width):
    monkeypatch.setattr(statistics, "COLUMNS", width)
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosine_matrix(rows), unit @ unit.T)
    places, _ = principal(rows, 3)
    apart = torch.cdist(rows, rows)
    torch.testing.assert_close(torch.cdist(places, places), apart)


def test_a_probed_run_uses_the_first_experts():
    run = probing(method_run("ptm_st", estimator="exact"), 3, "original", PAIRS, 1)
    assert (run.experts.num, run.distill.trajectory) == (1, "original")
    assert [p.endpoint for p in run.distill.phases] == [3] and RUN.experts.num == 2
