"""Test that coreset methods select the same pairs with the features on several Ray actors and in one process."""

from functools import partial
from itertools import islice

import features as slow
import numpy as np
import pytest

from rmdd.comparisons.coreset import open_shard
from rmdd.coresets import clusters, greedy
from rmdd.coresets.rows import Rows, write_rows
from rmdd.coresets.shard import split_rows
from rmdd.execution.parts import PartLost
from rmdd.execution.ray.worker_parts import ActorParts, parts_on_actors

pytestmark = pytest.mark.ray
ROWS = slow.unit_rows(23, 6)


def chosen(ranks, k):
    mu = greedy.mean(ranks, greedy.checked(ranks).largest)
    herding = [(b.value, b.id) for b in islice(greedy.herding(ranks, mu), k)]
    ranks.call("release")
    start = greedy.start_of(ranks, "random", 0, mu)
    k_center = [(b.value, b.id) for b in islice(greedy.k_center(ranks, start), k)]
    ranks.call("release")
    return mu.tolist(), herding, k_center, clusters.medoids(ranks, 7, 0)


def test_workers_choose_the_same_rows_as_one_process(ray_local, tmp_path):
    write_rows(tmp_path / "f", [(np.arange(23), ROWS)], 6, "float32", {})
    alone = chosen(split_rows(Rows.of(ROWS)), 15)
    for size in (1, 2, 3):  # with 3 workers, each has fewer than 15 rows, and not all have the same number
        with parts_on_actors(partial(open_shard, tmp_path / "f"), size, 1.0, 1) as ranks:
            assert chosen(ranks, 15) == alone


def test_an_error_of_a_part_is_raised_unchanged_and_a_death_raises_part_lost(ray_local, tmp_path):
    rows = ROWS.copy()
    rows[20] = np.nan
    write_rows(tmp_path / "f", [(np.arange(23), rows)], 6, "float32", {})
    with parts_on_actors(partial(open_shard, tmp_path / "f"), 2, 0.5, 1) as ranks:
        with pytest.raises(ValueError, match=r"1 of 23 features are zero or not finite \(first ids: \[20\]\)"):
            greedy.checked(ranks)
        with pytest.raises(TypeError, match="missing"):
            ranks.call("take")
        ray_local.kill(ranks.actors[1])
        with pytest.raises(PartLost, match="a worker died"):
            ranks.call("check")


def test_a_coreset_is_the_same_after_the_death_of_a_worker(ray_local, tmp_path, monkeypatch):
    """If a worker dies, all workers start again, and the pairs that were already chosen and stored are kept."""
    import rmdd
    from rmdd import config
    from rmdd.core.progress import Progress

    raw = {
        "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 20, "val": 2, "test": 2, "size": 16}},
        "model": {
            "image": {"name": "convnet", "weights": "random", "widths": [4], "groups": 2, "projection": "linear"},
            "text": {"name": "hashing", "width": 16},
            "width": 8,
        },
        "runtime": {"workers": 2, "track": "none"},
    }
    runs = {ray: config.load(raw, [f"runtime.storage={tmp_path / ray}", f"runtime.ray={ray}"]) for ray in ("on", "off")}
    quiet = Progress(quiet=True)
    expected = rmdd.coreset(runs["off"], method="k_center", pairs=9, progress=quiet)
    before, calls = ActorParts.call, []

    def call(self, method, *arguments):
        calls.append(method)
        if method == "farthest" and calls.count(method) == 4:
            ray_local.kill(self.actors[1])
        return before(self, method, *arguments)

    monkeypatch.setattr(ActorParts, "call", call)
    coreset = rmdd.coreset(runs["on"], method="k_center", pairs=9, ranks=2, progress=quiet)
    assert calls.count("check") == 2 * calls[: calls.index("farthest")].count("check"), "the workers must start twice"
    assert coreset.records == expected.records and coreset.facts["radius"] == expected.facts["radius"]
