import os
import subprocess
import sys

import pytest
from benchmarks.common import pss_of_tree
from benchmarks.ingest import Case, bench_ingest, generate, table

TINY = Case(pairs=30, side=8)


def test_every_variant_reads_every_pair(tmp_path):
    results = bench_ingest(TINY, tmp_path / "bench", ["loop", "in_turn"])
    assert {name: n["pairs"] for name, n in results["variants"].items()} == {"loop": 30, "in_turn": 30}
    assert results["variants"]["loop"]["ratio"] == 1 and all(n["peak_mib"] > 20 for n in results["variants"].values())
    assert [line.split()[0] for line in table(results).splitlines()[2:]] == ["loop", "in_turn"]
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["pairs-30-8-0"]


def test_the_generated_pairs_depend_on_the_seed(tmp_path):
    first, second, other = (
        generate(Case(pairs=3, side=8, seed=s), tmp_path / n) for s, n in ((0, "a"), (0, "b"), (1, "c"))
    )
    for path in (p.relative_to(first) for p in first.rglob("*.*")):
        assert (first / path).read_bytes() == (second / path).read_bytes() != (other / path).read_bytes()


def test_memory_includes_all_descendants():
    code = "import subprocess, sys; x = b'x' * 2**26; subprocess.run([sys.executable, '-c', {0!r}])"
    inner = "x = b'x' * 2**26; print('ready', flush=True); input()"
    command = [sys.executable, "-c", code.format(inner)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        assert pss_of_tree(child.pid) > 2 * 2**26
        assert pss_of_tree(os.getpid()) > pss_of_tree(child.pid)
    finally:
        child.communicate(b"\n")


def test_unknown_variants_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown variant 'x'; available: loop, loader, rmdd, in_turn"):
        bench_ingest(TINY, tmp_path, ["x"])
