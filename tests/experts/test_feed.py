"""Check in which order an epoch visits the caption records, and that cached and streamed images are equal."""

import numpy as np
import pytest
import torch

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.ingest import ingest
from rmdd.evaluate.students import score
from rmdd.experts.feed import Epoch, order, pictures, prepare
from rmdd.experts.store import Store
from rmdd.experts.train import begin_store, train_expert
from rmdd.models.prepared import prepare_split

PAIRS = 70
WINDOWED = config.Shuffle(kind="windowed", block=8, window=2)


def run_of(*, cached=True, augment=False, shuffle=WINDOWED, **data):
    return config.Run(
        data=config.Data(image_size=12, scenes=config.Scenes(train=PAIRS, val=6, test=5, size=16), **data),
        model=config.Model(
            image=config.ImageTower(name="convnet", weights="random", widths=(4,), groups=2, projection="linear"),
            text=config.TextTower(name="hashing", width=8),
            width=6,
        ),
        experts=config.Experts(
            num=1, epochs=2, batch=16, augment=config.Augment() if augment else config.NO_AUGMENT, shuffle=shuffle
        ),
        distill=config.Distill(phases=(config.Phase(pairs=20, stop=1, endpoint=1),)),
        runtime=config.Runtime(cache_gb=20 if cached else 0),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    data = run_of().data.model_copy(update={"shard_mb": 1})
    return ingest(data, tmp_path_factory.mktemp("data"))


def prepared_of(run, dataset, path):
    return prepare_split(run.data, run.model, dataset, "train", path)


def fed(run, dataset, path, epoch=1, **how):
    prepared = prepared_of(run, dataset, path)
    plan = Epoch.of(run.experts, run.seed_of("experts"), prepared.split.image_of, 3, epoch)
    return plan, torch.stack(list(pictures(prepared, plan, run.data, run.experts.augment, run.runtime.cache_gb, **how)))


def by_hand(look, parts, width):
    """A `Stream` that reads the parts one by one in this process; the stream of Ray uses several processes."""
    assert width >= 1
    for part in parts:
        yield from look(part)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("shuffle", [config.Shuffle(block=8, window=2), WINDOWED])
def test_cache_shards_and_stream_give_equal_images(dataset, tmp_path, augment, shuffle):
    run = {cached: run_of(cached=cached, augment=augment, shuffle=shuffle) for cached in (True, False)}
    plan, cached = fed(run[True], dataset, tmp_path / "cache")
    for how in ({}, {"workers": 2}, {"stream": by_hand}):
        again, streamed = fed(run[False], dataset, tmp_path / "none", **how)
        assert np.array_equal(plan.records, again.records) and torch.equal(cached, streamed), how
    assert not list((tmp_path / "none").glob("train-*")) and not list((tmp_path / "none").glob("*.bin"))


def test_streamed_and_cached_images_train_the_same_expert(dataset, tmp_path):
    for cached in (True, False):
        run = run_of(cached=cached, augment=True)
        train, val = prepared_of(run, dataset, tmp_path), prepare_split(run.data, run.model, dataset, "val", tmp_path)
        store = begin_store(run, tmp_path / str(cached), 8, {})
        stream, cpu = None if cached else by_hand, torch.device("cpu")
        assert train_expert(run, 0, store, train, lambda model: score(model, val, cpu).mean, cpu, stream=stream)  # noqa: B023
    a, b = (Store.open(tmp_path / name).read(0, 2) for name in ("True", "False"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_global_order_is_one_permutation():
    image_of = np.repeat(np.arange(PAIRS), 3)
    records, _ = order(config.Shuffle(), image_of, (4, 2, 1))
    expected = torch.randperm(3 * PAIRS, generator=generator(4, "expert order", 2, 1))
    assert records.tolist() == expected.tolist()


def test_the_windowed_order_mixes_blocks_and_reads_each_once():
    image_of = np.repeat(np.arange(PAIRS), 3)
    records, begins = order(WINDOWED, image_of, (0, 0, 0))
    assert sorted(records.tolist()) == list(range(3 * PAIRS))
    windows = np.split(records, begins[1:])
    blocks = [set((image_of[w] // WINDOWED.block).tolist()) for w in windows]
    assert [len(b) for b in blocks] == [2, 2, 2, 2, 1], "nine blocks make four windows of two blocks and one of one"
    assert not any(a & b for i, a in enumerate(blocks) for b in blocks[:i])
    assert [w.tolist() for w in windows] != [sorted(w.tolist()) for w in windows]
    assert set().union(*blocks[:1]) != {0, 1}, "blocks come in random order"


@pytest.mark.parametrize("shuffle", [config.Shuffle(), WINDOWED])
def test_orders_differ_by_epoch_expert_and_seed_and_agree_between_runs(shuffle):
    image_of = np.repeat(np.arange(PAIRS), 2)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    orders = [tuple(order(shuffle, image_of, key)[0].tolist()) for key in keys]
    assert len(set(orders)) == len(keys)
    assert orders == [tuple(order(shuffle, image_of, key)[0].tolist()) for key in keys]


def test_the_order_does_not_depend_on_the_shards(tmp_path):
    run = run_of(cached=False)
    result = []
    for size in (1, 64):
        dataset = ingest(run.data.model_copy(update={"shard_mb": size}), tmp_path / str(size))
        result.append(fed(run, dataset, tmp_path / f"cache-{size}")[1])
    assert torch.equal(*result)


def test_a_worker_group_shares_every_batch():
    run = run_of()
    image_of = np.repeat(np.arange(PAIRS), 3)
    full = Epoch.of(run.experts, run.seed_of("experts"), image_of, 0, 0)
    shares = [full.share(rank, 3) for rank in range(3)]
    assert [s.records.shape[1] for s in shares] == [6, 5, 5]
    assert np.array_equal(np.concatenate([s.records for s in shares], axis=1), full.records)


def test_the_cache_limit_decides_how_images_are_read(dataset, tmp_path):
    run = run_of()
    train = prepared_of(run, dataset, tmp_path)
    size = train.split.cache_bytes(encoded=False)
    assert size == PAIRS * 3 * 12 * 12
    for gigabytes, built in ((0.9 * size / 1e9, 0), (1.1 * size / 1e9, 1)):
        prepare(train, run.experts.augment, gigabytes)
        assert len(list(tmp_path.glob("train-*.npy"))) == built


def test_the_hash_has_the_order_but_not_the_way_of_reading():
    run = run_of(shuffle=config.Shuffle())
    assert run.hash_of() == run_of(cached=False, shuffle=config.Shuffle(block=2)).hash_of()
    assert run.hash_of() != run_of().hash_of() != run_of(shuffle=WINDOWED.model_copy(update={"block": 9})).hash_of()
    assert "shuffle" not in run.hashed("experts", "experts") and "worker_group" not in run.hashed("experts", "experts")
