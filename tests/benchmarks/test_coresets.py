import json

import pytest
from benchmarks.coresets import Case, bench_coresets, table


def test_seconds_memory_and_objective_of_every_method(tmp_path):
    case = Case(rows=300, width=8, dtype="float16")
    results = bench_coresets(case, [5, 20], tmp_path, ["herding", "k_center", "medoids"])
    assert json.loads(json.dumps(results)) == results and len(table(results).splitlines()) == 5
    for n in results["methods"].values():
        assert n["seconds"].keys() == {"mean", "5", "20"} and n["peak_mib"] > 50 and n["objective"] > 0


def test_unknown_methods_and_impossible_picks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown method 'random'; available: herding"):
        bench_coresets(Case(rows=9), [1], tmp_path, ["random"])
    with pytest.raises(ValueError, match="picks .9. are impossible for 9 rows"):
        bench_coresets(Case(rows=9), [9], tmp_path)
