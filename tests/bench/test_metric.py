import pytest

from rmdd.bench.metric import Case, bench_metric, table
from rmdd.core.files import read_json


def test_a_small_gallery_is_timed_in_a_process_of_its_own(tmp_path):
    found = bench_metric(Case(images=20, texts=101, width=8, chunk=16, threads=1), 2, tmp_path / "metric.json")
    assert found["seconds"] > 0 and found["cpu_seconds"] > 0
    assert found["peak_bytes"] > found["added_bytes"] >= 0
    assert read_json(tmp_path / "metric.json") == found
    assert table(found).startswith("20 x 101 of width 8 on 1 threads: ")


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="as many texts as images"):
        bench_metric(Case(images=20, texts=10))
