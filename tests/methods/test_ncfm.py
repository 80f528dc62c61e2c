"""NCFM on toy pairs: clusters, loss and gradient compared with a slow float64 version, and the frequency network."""

import cmath
import logging
import math

import numpy as np
import pytest
import torch
from objectives import descend, objective_of, opened, prepared_split, run_of
from toy import same_tensors

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.methods.ncfm import NCFM, Plateau

SMALL = {"frequencies": 32, "clusters": 2, "patience": None}


@pytest.fixture(scope="module")
def train():
    return prepared_split()


def slow_discrepancy(real, distilled, frequencies, w_amplitude, w_phase):
    total = 0.0
    for t in frequencies.tolist():
        phi = []
        for points in (real, distilled):
            angles = [sum(x * y for x, y in zip(a, t, strict=True)) for a in points.tolist()]
            phi.append(sum(cmath.exp(1j * angle) for angle in angles) / len(angles))
        r, s = phi
        phase_gap = 2 * abs(r) * abs(s) * (1 - math.cos(cmath.phase(r) - cmath.phase(s)))
        total += math.sqrt(w_amplitude * (abs(r) - abs(s)) ** 2 + w_phase * phase_gap)
    return total / len(frequencies)


def slow_parts(objective, train, synthetic, iteration):
    """Compute both loss terms slowly, in float64 and pair by pair, from the random draws that `objective` uses."""
    store, rule, seed, run = objective.store, objective.rule, objective.seed, objective.method.run
    random = generator(seed, "blend", 0, iteration, 0)
    expert = store.complete()[int(torch.randint(run.experts.num, (), generator=random))]
    b = float(torch.rand((), generator=random))
    ends = [store.read(expert, epoch) for epoch in (0, store.epochs)]
    objective.model.load_trained({n: (1 - b) * ends[0][n] + b * ends[1][n] for n in ends[0]})
    model = objective.model.double()

    def features(image, text):
        with torch.no_grad():
            v, t = model.embed_images(image[None].double())[0], model.embed_texts(text[None].double())[0]
        h = torch.cat([v / v.norm(), t / t.norm()])
        h = h / h.norm()
        return h if objective.projection is None else h @ objective.projection.double()

    draws = generator(seed, "frequencies", 0, iteration, 0)
    frequencies = torch.randn(rule.frequencies, objective.width, generator=draws).double()
    clusters = list(range(objective.clusters))
    if rule.subset:
        draws = generator(seed, "clusters of a step", 0, iteration, 0)
        clusters = torch.randperm(objective.clusters, generator=draws)[: rule.subset].tolist()
    each = []
    for c in clusters:
        members = np.flatnonzero(objective.labels == c)
        draws = generator(seed, "real batch", 0, iteration, 0, c)
        batch = members[torch.randperm(len(members), generator=draws)[: rule.real_batch].numpy()]
        pixels = normalise(torch.from_numpy(train.split.images[train.split.image_of[batch]]), train.mean, train.std)
        texts = torch.tensor(train.texts[batch])
        real = torch.stack([features(x, y) for x, y in zip(pixels, texts, strict=True)])
        pairs = range(c * objective.ipc, (c + 1) * objective.ipc)
        points = torch.stack([features(synthetic.images[i], synthetic.texts[i]) for i in pairs])
        each.append(slow_discrepancy(real, points, frequencies, rule.w_amplitude, rule.w_phase))
    ncfd = rule.scale * objective.clusters / len(clusters) * sum(each)

    random = generator(seed, "calibration", 0, iteration, 0)
    objective.model.float().load_trained(
        store.read(store.complete()[int(torch.randint(run.experts.num, (), generator=random))], store.epochs)
    )
    draws = generator(seed, "calibration batch", 0, iteration, 0)
    rows = torch.randperm(synthetic.pairs, generator=draws)[: rule.calibration_batch]
    joint = [(synthetic.images[i], synthetic.texts[i]) for i in rows.tolist()]
    objective.projection, projection = None, objective.projection
    model = objective.model.double()
    both = torch.stack([features(*pair) for pair in joint]) * 2**0.5
    objective.model.float()
    objective.projection = projection
    half = both.shape[1] // 2
    temperature = run.distill.temperature or model.temperature
    logits = (both[:, :half] @ both[:, half:].T / temperature).tolist()
    n, total = len(logits), 0.0
    for i in range(n):
        for line in (logits[i], [row[i] for row in logits]):
            total -= math.log(math.exp(line[i]) / sum(math.exp(x) for x in line)) / (2 * n)
    return ncfd, rule.calibration * total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"w_amplitude": 0.8, "w_phase": 0.2, "calibration": 0.5, "real_batch": 5, "chunk": 2},
        {"clusters": 1, "project": 4, "calibration_batch": 3},
        {"clusters": 3, "subset": 2, "real_batch": 4},
    ],
)
def test_the_loss_equals_the_slow_one(store, train, options):
    run = run_of("ncfm", {**SMALL, **options})
    _, begun, objective = opened(run, store, train)
    values = [objective.gradient(begun, i, 0)[1] for i in (0, 1)]
    for iteration, parts in enumerate(values):
        ncfd, calibration = slow_parts(objective, train, begun, iteration)
        assert parts["loss_ncfd"] == pytest.approx(ncfd, rel=1e-4)
        assert parts["loss_calibration"] == pytest.approx(calibration, rel=1e-4)
        assert parts["loss"] == pytest.approx(ncfd + calibration, rel=1e-4)
    assert values[0] != values[1]


def test_the_calibration_uses_the_temperature_of_the_students(store, train):
    run = run_of("ncfm", SMALL, temperature=0.2)
    _, begun, objective = opened(run, store, train)
    parts = objective.gradient(begun, 0, 0)[1]
    assert parts["loss_calibration"] == pytest.approx(slow_parts(objective, train, begun, 0)[1], rel=1e-4)


def test_real_features_computed_in_advance_are_reused_by_the_next_step(store, train, monkeypatch):
    """`after` encodes the real batch of the next step; that step must reuse the result and give the same bits."""
    _, begun, objective = opened(run_of("ncfm", {**SMALL, "patience": 3}), store, train)
    before, calls = objective._real, []
    monkeypatch.setattr(objective, "_real", lambda *args: calls.append(args) or before(*args))
    objective.gradient(begun, 0, 0)
    objective.after(begun, 0)
    ahead = objective.gradient(begun, 1, 0)
    assert [args[1:] for args in calls] == [(0, 0), (1, 0)]
    _, _, fresh = opened(run_of("ncfm", {**SMALL, "patience": 3}), store, train)
    alone = fresh.gradient(begun, 1, 0)
    assert torch.equal(ahead[0].images, alone[0].images) and ahead[1]["loss"] == alone[1]["loss"]


def test_the_gradient_is_that_of_the_loss(store, train):
    """Compare the gradient of the set with central differences of the loss along random directions, in float64."""
    _, begun, objective = opened(run_of("ncfm", {**SMALL, "chunk": 4, "calibration_batch": 4}), store, train)
    objective._load("blend", 2, 0)
    real, frequencies = objective._real([0, 1], 2, 0), objective._frequencies(2, 0).double()
    begun, objective.model = begun.map(torch.Tensor.double), objective.model.double()
    objective._real = lambda clusters, iteration, draw: [r.double() for r in real]
    objective._frequencies = lambda iteration, draw: frequencies
    gradient, _ = objective.gradient(begun, 2, 0)
    random = torch.Generator().manual_seed(7)
    for name in ("images", "texts"):
        direction = torch.randn(begun.tensors()[name].shape, generator=random, dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            moved = begun.with_tensors(begun.tensors() | {name: begun.tensors()[name] + sign * 1e-6 * direction})
            sides.append(objective.gradient(moved, 2, 0)[1]["loss"])
        slope = float((gradient.tensors()[name] * direction).sum())
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_the_chunk_size_does_not_change_the_gradient(store, train):
    gradients = []
    for chunk in (1, 64):
        _, begun, objective = opened(run_of("ncfm", {**SMALL, "chunk": chunk}), store, train)
        gradients.append(objective.gradient(begun, 0, 0)[0])
    for name in ("images", "texts"):
        a, b = (g.tensors()[name] for g in gradients)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert b.abs().max() > 0
    assert all(float(g.lr_image) == float(g.lr_text) == 0 for g in gradients)


def test_clusters_that_are_not_drawn_get_no_gradient(store, train):
    run = run_of("ncfm", {**SMALL, "clusters": 6, "subset": 2, "calibration": 0})
    _, begun, objective = opened(run, store, train)
    gradient, parts = objective.gradient(begun, 0, 0)
    moved = gradient.images.flatten(1).abs().amax(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == objective._subset(0, 0) and "loss_calibration" not in parts
    drawn = {tuple(objective._subset(i, 0)) for i in range(40)}
    assert len(drawn) > 8 and all(len(set(d)) == 2 for d in drawn)


def test_the_initial_pairs_of_a_cluster_are_its_members(store, train):
    method, begun, objective = opened(run_of("ncfm", {**SMALL, "clusters": 3}), store, train)
    records = method.records(0, train, store)
    assert objective.labels[records].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(train.split.image_of[records].tolist())) == 6
    assert torch.equal(begun.texts, torch.tensor(train.texts[records]))
    assert np.array_equal(method.clustered(0, train, store)[1], objective.labels)


def test_the_set_comes_closer_to_real_features(store, train):
    _, begun, objective = opened(run_of("ncfm", {**SMALL, "calibration": 0, "scale": 1}, pairs=8), store, train)
    after, _ = descend(objective, begun, 40, lr=1.0)
    losses = [np.mean([objective.gradient(s, 900 + i, 0)[1]["loss"] for i in range(8)]) for s in (begun, after)]
    assert losses[1] < 0.8 * losses[0]


NETWORK = {**SMALL, "network": True, "lr_network": 0.01, "patience": 1}


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_the_network_increases_the_loss_of_the_next_step(store, train, optimiser):
    run = run_of("ncfm", {**NETWORK, "calibration": 0, "patience": None, "network_optimiser": optimiser})
    _, begun, objective = opened(run, store, train)
    before = objective.gradient(begun, 1, 0)[1]["loss"]
    for _ in range(3):
        objective.after(begun, 0)
    assert objective.gradient(begun, 1, 0)[1]["loss"] > before
    assert all(p.grad is None for p in objective.psi.parameters())


@pytest.mark.parametrize("extra", [{}, {"network_optimiser": "sgd"}, {"network_norm": "batch", "learned_scale": True}])
def test_a_resumed_objective_gives_the_same_bits(store, train, extra):
    run = run_of("ncfm", {**NETWORK, **extra})
    method, begun, unbroken = opened(run, store, train)
    uninterrupted, losses = descend(unbroken, begun, 6)
    assert 0.5**unbroken.plateau.halvings < losses[0]["pace"] == 1 and losses[-1]["pace"] < 1
    first = objective_of(method, store, train)
    half, _ = descend(first, begun, 3)
    state = {n: t.clone() for n, t in first.tensors().items()}
    descend(first, half, 1, start=3)
    for second in (
        objective_of(method, store, train),
        first,
    ):  # `load` must also work for `first`, which has a later state
        second.load(state)
        rest, more = descend(second, half, 3, start=3)
        assert same_tensors(rest.tensors(), uninterrupted.tensors()) and more == losses[3:]
        assert same_tensors(second.tensors(), unbroken.tensors())


def test_rates_are_halved_on_a_plateau(caplog):
    caplog.set_level(logging.INFO)
    plateau = Plateau(3)
    for loss, halvings in [(5, 0), (4, 0), (4, 0), (6, 0), (4, 1), (5, 1), (3, 1), (9, 1), (9, 1), (9, 2)]:
        plateau.update(float(loss))
        assert plateau.halvings == halvings
    again = Plateau(3)
    again.load(plateau.tensor())
    assert vars(again) == vars(plateau) and "learning rates are halved" in caplog.text
    never = Plateau(None)
    for _ in range(9):
        never.update(1.0)
    assert never.halvings == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 4}, r"phases.0.pairs 6 is not a multiple of distill.options.clusters 4"),
        ({"clusters": 2, "subset": 3}, r"options.subset 3 is more than the 2 clusters"),
        ({"network": True, "network_norm": "batch", "frequencies": 16}, r"frequencies: found 16 .* at least 32"),
        ({"repeat": True}, r"repeat and learned_scale need the frequency network"),
        ({"w_amplitude": 0, "w_phase": 0}, r"w_amplitude and w_phase are both 0"),
        ({"scale": -1}, r"distill.options.scale"),
    ],
)
def test_invalid_settings_are_rejected(options, words):
    with pytest.raises(config.ConfigError, match=words):
        run_of("ncfm", options)


def test_too_few_images_are_refused(store, train):
    run = run_of("ncfm", {"clusters": 20}, pairs=20)
    with pytest.raises(ValueError, match=r"20 clusters of 1 pairs each need at least 40 images"):
        NCFM(run).records(0, train, store)
