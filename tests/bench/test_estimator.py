"""`rmdd bench estimator`: its rows compare first-order and exact gradients at iterations of the run's outer loop."""

import math

import pytest
import tiny
import torch
from toy import CPU, encoder, first_set, run_of

from rmdd import config
from rmdd.bench.estimator import compare_estimators, cosine, norm_ratio, of_run, summary
from rmdd.distill.loop import State, outer_step
from rmdd.distill.trajectory.matching import Matcher
from rmdd.methods import matching_method
from rmdd.pipeline import open_pipeline


def test_rows_equal_a_comparison_by_hand(store):
    run = run_of(estimator="exact")
    rows = compare_estimators(run, 0, store, encoder(), first_set(), CPU, iterations=5, every=2)
    assert [row["iteration"] for row in rows] == [0, 2, 4]
    matcher, state = Matcher(matching_method(run), 0, store, encoder(), CPU), State.begin(first_set())
    for iteration in range(5):
        drawn = matcher.draw(iteration)
        exact, first = (matcher.gradient(state.raw, drawn, estimator=e).gradient for e in ("exact", "first_order"))
        if iteration % 2 == 0:
            a, b = first.images.flatten(), exact.images.flatten()
            expected = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / float(a.norm() * b.norm())
            assert rows[iteration // 2]["cosine"]["images"] == pytest.approx(expected, rel=1e-5)
            assert rows[iteration // 2]["norm_ratio"]["texts"] == pytest.approx(
                float(first.texts.norm() / exact.texts.norm()), rel=1e-5
            )
        state = outer_step(state, exact, run.distill)


def test_with_one_inner_step_both_estimators_agree(store):
    (row,) = compare_estimators(run_of(steps=1), 0, store, encoder(), first_set(), CPU, iterations=1, every=1)
    assert all(c == pytest.approx(1, abs=1e-6) for c in row["cosine"].values())


def test_a_diverging_loop_ends_with_a_stopped_row(store):
    rows = compare_estimators(run_of(lr_lr=1e6, steps=3), 0, store, encoder(), first_set(), CPU, iterations=60, every=1)
    assert "not finite" in rows[-1]["stopped"] and len(rows) < 60


def test_a_later_phase_of_a_chain_is_refused(tmp_path):
    phases = 2 * tiny.RUN["distill"]["phases"]
    raw = tiny.changed(distill={"phases": phases, "path_start": "student"})
    with open_pipeline(config.load(tiny.stored(tmp_path, raw)), tiny.QUIET) as pipeline:
        with pytest.raises(ValueError, match=r"phase 1 start at students .*; give phase 0, or set"):
            of_run(pipeline, 1, 1, 1)
        assert len(of_run(pipeline, 0, 1, 1)) == 1


def test_cosine_and_ratio_of_known_vectors():
    a, b, zero = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert cosine(a, b) == pytest.approx(0.6) and norm_ratio(a, b) == pytest.approx(0.6)
    assert math.isnan(cosine(a, zero)) and math.isnan(norm_ratio(a, zero))
    rows = [{"cosine": {"x": c}, "norm_ratio": {"x": 2.0}} for c in (0.1, 0.5, math.nan)] + [{"stopped": "so"}]
    assert summary(rows) == {"x": {"cosine": pytest.approx(0.3), "norm_ratio": 2.0}}
