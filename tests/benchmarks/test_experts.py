import pytest
from benchmarks import experts as bench


def test_sequential_training_is_measured_with_its_memory():
    case = bench.Case(experts=2, epochs=1, pairs=40, image_size=16, each=1)
    results = bench.bench_experts(case, ("in_turn",))
    row = results["ways"]["in_turn"]
    assert row["experts"] == 2 and row["seconds"] > 0 and row["peak_mib"] > 50 and row["cpu_seconds"] > 0
    assert bench.table(results).splitlines()[1].split()[:3] == ["in", "turn", "2"]


def test_ratios_and_overhead_are_computed_from_the_seconds(monkeypatch):
    seconds = {"in_turn": 8.0, "pool": 5.0, "train": 12.0, "trainer_each": 20.0}
    measure = lambda case, way: {  # noqa: E731
        "experts": 2 if way == "trainer_each" else 8,
        "seconds": seconds[way],
        "start": 1.0,
        "peak_mib": 1024.0,
        "cpu_seconds": 9.0,
    }
    monkeypatch.setattr(bench, "_measure", measure)
    ways = bench.bench_experts(bench.Case(experts=8, workers=2, each=2))["ways"]
    assert [ways[w]["ratio"] for w in ("pool", "train", "trainer_each")] == [0.625, 1.5, 10.0]
    assert [ways[w]["overhead_per_expert"] for w in ("pool", "train", "trainer_each")] == [0.12, 1.0, 9.0]


def test_unknown_ways_and_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="unknown way 'magic'; available: in_turn, pool, train, trainer_each"):
        bench.bench_experts(bench.Case(), ("magic",))
    with pytest.raises(ValueError, match="each is 9 of 8 experts"):
        bench.Case(each=9)


def test_each_expert_can_have_its_own_run(tmp_path, monkeypatch):
    """With one expert, the run of this expert has the same config as the run of the entire benchmark."""
    case = bench.Case(experts=1, epochs=1, pairs=40, image_size=16, each=1)
    without_ray = bench.run_of(case, "in_turn", tmp_path)
    monkeypatch.setattr(bench, "run_of", lambda *arguments: without_ray)
    row = bench._train_here(case, {"way": "trainer_each", "storage": str(tmp_path)})
    assert row["experts"] == 1
