import pytest
from benchmarks import experts as bench


def test_the_yardstick_is_measured_with_its_memory():
    case = bench.Case(experts=2, epochs=1, pairs=40, image_size=16, each=1)
    found = bench.bench_experts(case, ("in_turn",))
    row = found["ways"]["in_turn"]
    assert row["experts"] == 2 and row["seconds"] > 0 and row["peak_mib"] > 50 and row["cpu_seconds"] > 0
    assert bench.table(found).splitlines()[1].split()[:3] == ["in", "turn", "2"]


def test_ratios_and_overhead_are_those_of_the_figures(monkeypatch):
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


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no way 'magic'; there are: in_turn, pool, train, trainer_each"):
        bench.bench_experts(bench.Case(), ("magic",))
    with pytest.raises(ValueError, match="each is 9 of 8 experts"):
        bench.Case(each=9)


def test_all_experts_may_have_a_run_of_their_own(tmp_path, monkeypatch):
    """The last of them is then a run of the same value as the one around it."""
    case = bench.Case(experts=1, epochs=1, pairs=40, image_size=16, each=1)
    without_ray = bench.run_of(case, "in_turn", tmp_path)
    monkeypatch.setattr(bench, "run_of", lambda *given: without_ray)
    row = bench._train_here(case, {"way": "trainer_each", "storage": str(tmp_path)})
    assert row["experts"] == 1
