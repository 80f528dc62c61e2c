import importlib
import sys
from dataclasses import asdict

import pytest
from benchmarks import common
from benchmarks.metric import Case, bench_metric, table

from rmdd.core.files import read_json


def test_a_small_gallery_is_measured_in_a_separate_process():
    results = bench_metric(Case(images=20, texts=101, width=8, chunk=16, threads=1), 2)
    assert results["seconds"] > 0 and results["cpu_seconds"] > 0
    assert results["peak_bytes"] > results["added_bytes"] >= 0
    assert table(results).startswith("20 x 101 of width 8 on 1 threads: ")


def test_fewer_texts_than_images_are_refused():
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
    out, arguments = tmp_path / "metric.json", ["metric", "--images", "20", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out)])
    calls = []
    common.main("text", Case, lambda case, options: calls.append((case, options.repeats)) or numbers, table, repeats=3)
    assert calls == [(Case(images=20), 2)] and read_json(out) == numbers
    assert capsys.readouterr().out.startswith("20 x 25,010 of width 512")


@pytest.mark.parametrize("name", ["coresets", "experts", "ingest", "metric", "phases"])
def test_every_benchmark_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}").table
