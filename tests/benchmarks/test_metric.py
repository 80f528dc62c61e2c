import importlib
import sys
from dataclasses import asdict

import pytest
from benchmarks import common
from benchmarks.metric import Case, bench_metric, table

from rmdd.core.files import read_json


def test_a_small_gallery_is_timed_in_a_process_of_its_own():
    found = bench_metric(Case(images=20, texts=101, width=8, chunk=16, threads=1), 2)
    assert found["seconds"] > 0 and found["cpu_seconds"] > 0
    assert found["peak_bytes"] > found["added_bytes"] >= 0
    assert table(found).startswith("20 x 101 of width 8 on 1 threads: ")


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="as many texts as images"):
        bench_metric(Case(images=20, texts=10))


def test_the_command_line_prints_the_table_and_writes_the_numbers(tmp_path, monkeypatch, capsys):
    numbers = {
        "case": asdict(Case(images=20)),
        "seconds": 1.0,
        "cpu_seconds": 2.0,
        "peak_bytes": 2**20,
        "added_bytes": 0,
    }
    out, words = tmp_path / "metric.json", ["metric", "--images", "20", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out)])
    asked = []
    common.main("text", Case, lambda case, more: asked.append((case, more.repeats)) or numbers, table, repeats=3)
    assert asked == [(Case(images=20), 2)] and read_json(out) == numbers
    assert capsys.readouterr().out.startswith("20 x 25,010 of width 512")


@pytest.mark.parametrize("name", ["coresets", "experts", "ingest", "metric", "phases"])
def test_every_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").table
