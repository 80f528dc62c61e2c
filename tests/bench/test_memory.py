"""Peak memory of a matching iteration: growth with the inner steps, and the estimate by `rmdd check`. Linux only."""

import sys
from dataclasses import replace

import pytest

from rmdd import config
from rmdd.bench.step import Case, Variant, peak_bytes
from rmdd.distill.unroll import Engine
from rmdd.runs import cost as estimate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
CASE = Case(widths=(32, 64), image_size=16, text_width=1024, width=512, pairs=20, batch=10, threads=1)


def run_of(case, **distill):
    image = config.ImageTower(name=case.tower, weights="random", widths=case.widths, projection="linear")
    return config.Run(
        data=config.Data(image_size=case.image_size),
        model=config.Model(
            image=image, text=config.TextTower(name="hashing", projection="linear"), width=case.width, dropout=0.0
        ),
        distill=config.Distill(phases=(config.Phase(pairs=case.pairs),), batch=case.batch, steps=case.steps, **distill),
    )


@pytest.fixture(scope="module")
def vector():
    """Fixture: the size in bytes of one vector of all trained parameters."""
    return 4 * estimate.size_of(estimate.model_on_meta(run_of(CASE), CASE.text_width), False).trained


@pytest.fixture(scope="module")
def peaks():
    return {steps: peak_bytes(replace(CASE, steps=steps), Variant("exact", None, "exact")) for steps in (4, 8, 16)}


def test_each_inner_step_adds_the_bytes_of_one_parameter_vector(peaks, vector):
    for fewer, more in ((4, 8), (8, 16)):
        assert peaks[more] - peaks[fewer] == pytest.approx((more - fewer) * vector, rel=0.15)


def test_recompute_stores_few_parameter_vectors(peaks, vector):
    recompute = Variant("exact", None, "exact", Engine(trajectory="recompute"))
    assert peaks[16] - peak_bytes(replace(CASE, steps=16), recompute) > 5 * vector


@pytest.mark.parametrize("steps", [4, 16])
def test_the_estimate_of_check_is_within_25_percent(peaks, steps):
    run = run_of(replace(CASE, steps=steps), estimator="exact")
    model = estimate.model_on_meta(run, CASE.text_width)
    work = estimate.work_of(model, run, CASE.text_width)
    predicted = estimate.matching_bytes(run, estimate.size_of(model, False), work, CASE.text_width)
    assert predicted == pytest.approx(peaks[steps], rel=0.25)
