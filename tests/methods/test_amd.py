"""AMD: drift ranges, independent start epochs, prototypes, and training steps compared with slow float64 code."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from slow import assert_equals_slow, plain_loss, two_passes, wbce
from toy import EPOCHS, method_run

from rmdd import config
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.distill.starts import prototypes
from rmdd.experts.store import Store, Writer
from rmdd.experts.train import expert_model
from rmdd.methods.amd import drift_ranges, mean_drift
from rmdd.models.prepared import PreparedSplit

NAMES = {"image_tower.w": (2, 3), "image_head.b": (4,), "text_head.w": (3, 2)}


def store_with_drifts(path, image, text, experts=3):
    """Return a store of experts whose mean parameters move by `image[t]` and `text[t]` in epoch t."""
    epochs = len(image)
    store = Store.create(path, NAMES, shared={}, epochs=epochs, keep=None, dtype="float32", facts={})
    random = torch.Generator().manual_seed(0)
    noise = [
        [{n: torch.randn(s, generator=random) for n, s in NAMES.items()} for _ in range(epochs + 1)]
        for _ in range(experts)
    ]
    direction = {n: torch.randn(s, generator=random) for n, s in NAMES.items()}
    for tower in ("image", "text"):
        names = [n for n in NAMES if n.startswith(tower)]
        size = sum(direction[n].square().sum() for n in names).sqrt()
        direction |= {n: direction[n] / size for n in names}
    for expert in range(experts):
        writer = Writer(store, expert)
        for t in range(epochs + 1):
            length = {n: sum((text if n.startswith("text") else image)[:t]) for n in NAMES}
            mean = {n: sum(s[t][n] for s in noise) / experts for n in NAMES}
            writer.add({n: length[n] * direction[n] + noise[expert][t][n] - mean[n] for n in NAMES}, {})
        writer.finish()
    return store


def test_drift_is_of_the_mean_and_not_of_the_experts(tmp_path):
    image, text = [3.0, 2.0, 1.0, 0.5], [1.0, 2.0, 4.0, 0.25]
    drift = mean_drift(store_with_drifts(tmp_path, image, text), [0, 1, 2])
    np.testing.assert_allclose(drift["image"], image, rtol=1e-5)
    np.testing.assert_allclose(drift["text"], text, rtol=1e-5)


@pytest.mark.parametrize(
    ("image", "text", "expected"),
    [
        # Drift ratios 1/4, 1/2, 2, 4 have median 1.25: epoch 3 is the first above it, epoch 2 is the last below it.
        ([1, 1, 2, 4], [4, 2, 1, 1], {"image": (0, 4), "text": (0, 3)}),
        # Drift ratios 4, 2, 1/2, 1/4: epoch 1 is the first above the median; epoch 4 is the last below, cut to 3.
        ([4, 2, 1, 1], [1, 1, 2, 4], {"image": (0, 2), "text": (0, 4)}),
        # Drift ratios 1/2, 4, 1/4, 2, 1 have median 1: epoch 2 is the first above it; epoch 5 equals it, cut to 4.
        ([1, 4, 1, 2, 1], [2, 1, 4, 1, 1], {"image": (0, 3), "text": (0, 5)}),
    ],
)
def test_known_drifts_give_the_ranges_of_the_paper(tmp_path, image, text, expected):
    store = store_with_drifts(tmp_path, image, text)
    assert drift_ranges(store, [0, 1, 2], store.epochs - 1) == expected


def test_equal_drifts_give_equal_ranges(tmp_path):
    """The towers have the same parameters, so every drift ratio is 1; both must get the full start range."""
    names = {"image_tower.w": (3, 2), "text_head.w": (3, 2)}
    store = Store.create(tmp_path, names, shared={}, epochs=4, keep=None, dtype="float32", facts={})
    random = torch.Generator().manual_seed(0)
    for expert in range(2):
        writer = Writer(store, expert)
        for _ in range(5):
            writer.add(dict.fromkeys(names, torch.randn(3, 2, generator=random)), {})
        writer.finish()
    assert drift_ranges(store, [0, 1], 3) == {"image": (0, 4), "text": (0, 4)}


def test_starts_are_independent_and_reproducible(make):
    plan = {"pairs": 6, "start": 0, "stop": 3, "start_text": 1, "stop_text": 3, "endpoint": EPOCHS, "iterations": 4}
    matcher = make(method_run("amd", options={"ranges": "stated"}, phases=[plan])).matcher
    starts = np.array([(d.start, d.start_text) for d in map(matcher.draw, range(2000))])
    assert set(starts[:, 0]) == {0, 1, 2} and set(starts[:, 1]) == {1, 2}
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.06
    counts = [(starts == pair).all(axis=1).sum() for pair in itertools.product((0, 1, 2), (1, 2))]
    assert min(counts) > 250, "each of the six pairs of epochs should be drawn about 333 times"
    again = matcher.draw(11)
    assert (again.start, again.start_text) == tuple(starts[11])


def test_starts_together_are_the_image_towers(make):
    plan = {"pairs": 6, "start": 0, "stop": 3, "endpoint": EPOCHS, "iterations": 4}
    together, independent = (
        make(method_run("amd", options={"ranges": "stated", "starts": starts}, phases=[plan])).matcher
        for starts in ("together", "independent")
    )
    drawn = [(together.draw(i), independent.draw(i)) for i in range(30)]
    assert all(d.start == d.start_text == alone.start for d, alone in drawn)
    assert any(alone.start != alone.start_text for _, alone in drawn)


def test_phases_are_planned_for_starts_together_of_stated_ranges():
    options = {"starts": "together", "ranges": "stated"}
    assert method_run("amd", options=options, phases="auto").distill.plan.kind == "auto"
    for name, value in options.items():
        with pytest.raises(config.ConfigError, match="plans one range"):
            method_run("amd", options={name: value}, phases="auto")


def test_drift_ranges_need_independent_starts():
    with pytest.raises(config.ConfigError, match="set distill.options.starts: independent"):
        method_run("amd", options={"starts": "together"})


def test_a_range_of_the_text_tower_needs_independent_starts():
    plan = {"pairs": 6, "stop": 2, "stop_text": 3, "endpoint": EPOCHS, "iterations": 4}
    with pytest.raises(
        config.ConfigError,
        match="only if each tower draws its own start epoch; remove",
    ):
        method_run("amd", options={"starts": "together", "ranges": "stated"}, phases=[plan])


def test_each_tower_starts_at_its_own_epoch(make):
    setup = make(method_run("amd"))
    wide = {"image": (0, 3), "text": (0, 3)}
    setup.matcher.ranges = wide  # for random experts, the computed ranges may hold one epoch only
    different = set()

    def gradient_of(leaves, drawn):
        different.add(drawn.start != drawn.start_text)
        expert = setup.matcher.experts[drawn.expert]
        epoch_of = {n: drawn.start_text if n.startswith("text_head.") else drawn.start for n in setup.store.shapes}
        start, target = (
            {n: setup.store.read(expert, epoch + ahead)[n] for n, epoch in epoch_of.items()} for ahead in (0, 1)
        )
        loss = plain_loss(setup.model, wbce)
        return two_passes(loss, start, target, leaves, setup.begun.alpha, drawn.batches)

    assert_equals_slow(setup, gradient_of, iterations=4)
    assert any(different)


def test_a_matcher_computes_the_ranges_from_its_experts(make):
    setup = make(method_run("amd"))
    assert setup.matcher.ranges == drift_ranges(setup.store, [0, 1], EPOCHS - 1)


def prepared_split(images=30, width=toy.TEXT_WIDTH):
    """Return a prepared split: images of three colours, two texts per image, and one text direction per colour."""
    random = np.random.default_rng(0)
    colour = np.array([(250, 20, 20), (20, 250, 20), (20, 20, 250)])[np.arange(images) % 3]
    pictures = np.clip(colour[:, :, None, None] + random.integers(-9, 9, (images, 3, toy.SIZE, toy.SIZE)), 0, 255)
    image_of = np.repeat(np.arange(images), 2)
    texts = np.eye(width)[image_of % 3] + 0.05 * random.standard_normal((2 * images, width))
    names, captions = [str(i) for i in range(images)], [f"caption {i}" for i in range(2 * images)]
    pictures = pictures.astype(np.uint8)
    split = Split("train", pictures, captions, image_of, names, {}, Dataset(Path(), {}), np.arange(9), Path())
    return PreparedSplit(split, texts.astype(np.float32), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))


@pytest.mark.parametrize("pairs", [3, 12])
def test_prototypes_are_the_records_nearest_to_the_centres(pairs, monkeypatch):
    import sklearn.cluster

    fitted = []
    kmeans = sklearn.cluster.MiniBatchKMeans

    class Watched(kmeans):
        def fit(self, points):
            fitted.append((points, super().fit(points)))
            return self

    monkeypatch.setattr(sklearn.cluster, "MiniBatchKMeans", Watched)
    run, train = method_run("amd"), prepared_split()
    width, cpu = train.texts.shape[1], torch.device("cpu")

    def drawn():
        model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, width)
        return prototypes(model, cpu, run.seed_of("distill"), 0, pairs, train)

    chosen = drawn()
    points, means = fitted[0]

    unit = torch.nn.functional.normalize
    tower = toy.build(run.model, toy.TEXT_WIDTH, toy.SIZE, run.seed, "expert", 0).eval().image_tower
    embedded = unit(tower(normalise(torch.tensor(train.split.images), train.mean, train.std)), dim=1).detach()
    for record in range(len(points)):
        side = torch.cat([embedded[train.split.image_of[record]], unit(torch.tensor(train.texts[record]), dim=0)])
        np.testing.assert_allclose(points[record], side.numpy(), rtol=1e-4, atol=1e-6)

    free = list(range(len(points)))
    for centre, record in zip(means.cluster_centers_, chosen, strict=True):
        distances = {r: sum((a - b) ** 2 for a, b in zip(points[r], centre, strict=True)) for r in free}
        assert distances[record] <= min(distances.values()) + 1e-9
        free.remove(record)
    if pairs == 3:
        assert {train.split.image_of[r] % 3 for r in chosen} == {0, 1, 2}, (
            "each of the three colours must have one prototype"
        )
    assert drawn() == chosen
