import pytest
import torch
from slow import assert_equals_slow, plain_loss, shortcut, two_passes, wbce
from toy import EPOCHS, method_run

from rmdd import config


def test_equals_the_two_passes_of_lors_on_a_straight_path(make):
    made = make(method_run("mct"))

    def gradient_of(leaves, drawn):
        assert drawn.start != int(drawn.start)
        expert = made.matcher.experts[drawn.expert]
        start, target = (shortcut(made.store, expert, EPOCHS, drawn.start + ahead) for ahead in (0, 1))
        return two_passes(plain_loss(made.model, wbce), start, target, leaves, made.begun.alpha, drawn.batches)

    assert_equals_slow(made, gradient_of)


def test_starts_are_spread_evenly_over_the_real_numbers_of_the_range(make):
    plan = {"pairs": 6, "start": 1, "stop": 2, "endpoint": EPOCHS, "iterations": 4}
    matcher = make(method_run("mct", phases=[plan])).matcher
    starts = torch.tensor([matcher.draw(i).start for i in range(400)], dtype=torch.float64)
    assert starts.min() >= 1 and starts.max() < 2 and len(starts.unique()) == 400
    assert torch.histc(starts, bins=4, min=1, max=2).min() > 70
    assert matcher.draw(5).start == starts[5]


@pytest.mark.parametrize("smooth", [False, True])
def test_anchors_in_between_are_on_the_path(make, smooth):
    """Four anchors of three epochs are all of them; smoothed, each is a mean with its neighbours."""
    made = make(method_run("mct", anchors=4, smooth_anchors=smooth))
    path = made.matcher.path(1)
    walk = [made.store.read(1, t) for t in range(EPOCHS + 1)]
    near = {0: [0], 1: [0, 1, 2], 2: [1, 2, 3], 3: [2, 3]} if smooth else {t: [t] for t in range(4)}
    for epoch, few in near.items():
        for name, p in path.at(epoch).items():
            torch.testing.assert_close(p, sum(walk[t][name] for t in few) / len(few), rtol=1e-12, atol=1e-12)
    drawn = made.matcher.draw(0)
    assert torch.isfinite(made.matcher.gradient(made.begun, drawn).loss)


def test_targets_past_the_last_epoch_are_refused():
    plan = [{"pairs": 6, "start": 0, "stop": EPOCHS, "endpoint": EPOCHS}]
    with pytest.raises(config.ConfigError, match=r"reaches epoch 4 of a path that ends .* at 3; set .*stop to 2"):
        method_run("mct", phases=plan)
