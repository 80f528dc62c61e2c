"""`rmdd bench step` on a small case: the engine equals the reference loops, and every measured column is filled."""

import json
from dataclasses import replace

import pytest
import torch

from rmdd.bench.step import Case, Variant, bench_step, peak_bytes, prepare, table, variants
from rmdd.distill.unroll import Engine

SMALL = Case(widths=(4,), image_size=8, text_width=5, width=6, pairs=7, batch=3, steps=3, dtype="float64", threads=1)


@pytest.mark.parametrize("similarity", ["full", "low_rank", "identity"])
@pytest.mark.parametrize(
    ("yardstick", "estimator"),
    [("whole_unroll", "exact"), ("published", "first_order"), ("published_rebuilt", "first_order")],
)
def test_the_engine_equals_the_reference_loops(yardstick, estimator, similarity):
    iteration = prepare(replace(SMALL, similarity=similarity))
    miss, expected = iteration(Variant(yardstick))()
    loss, result = iteration(Variant("ours", None, estimator))()
    assert loss.item() == pytest.approx(miss.item(), rel=1e-12)
    for name, e in expected.tensors().items():
        assert torch.allclose(result.tensors()[name], e, rtol=1e-8, atol=1e-12 * e.abs().max().item()), name


def test_the_result_has_all_figures_and_is_written(tmp_path):
    chosen = variants(engines={"": Engine(), "reverse": Engine(second_pass="reverse")})
    result = bench_step(SMALL, chosen, repeats=2, out=tmp_path / "step.json", memory=False)
    assert json.loads((tmp_path / "step.json").read_text())["variants"].keys() == result["variants"].keys()
    assert set(result["variants"]) >= {"published", "whole_unroll", "first_order", "exact", "exact reverse"}
    for row in result["variants"].values():
        assert row["seconds"] > 0 and row["flops"] > 0 and row["ratios"].keys() >= {"published"}
    assert len(table(result).splitlines()) == 1 + len(chosen)
    with pytest.raises(ValueError, match="repeats is 0"):
        bench_step(SMALL, chosen, repeats=0)


def test_measuring_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    bench_step(replace(SMALL, threads=before + 1), [Variant("first_order")], repeats=1, memory=False)
    assert torch.get_num_threads() == before


def test_methods_are_measured_with_their_own_defaults():
    chosen = variants(yardsticks=("published",), of_methods=("repblend", "mtt_vl"))
    rows = bench_step(SMALL, chosen, repeats=1, memory=False)["variants"]
    assert list(rows)[1:] == [f"{m}{e}" for m in ("", "repblend ", "mtt_vl ") for e in ("first_order", "exact")]
    assert rows["exact"]["ratios"] and not rows["repblend exact"]["ratios"], (
        "the reference loops train a different student, so ratios must be missing"
    )
    assert rows["repblend exact"]["flops"] != rows["mtt_vl exact"]["flops"]
    _, result = prepare(SMALL, "mtt_vl")(Variant("mtt_vl", "mtt_vl", "exact"))()
    assert not result.similarity


def test_memory_is_measured_in_a_separate_process():
    case = replace(SMALL, image_size=64, widths=(16,), batch=7, dtype="float32")
    unroll, ours = (peak_bytes(case, v) for v in (Variant("whole_unroll"), Variant("first_order", None, "first_order")))
    assert unroll > ours > 0
