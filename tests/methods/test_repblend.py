"""RepBlend: blended updates compared with a slow float64 implementation, and the distribution of random blends."""

import pytest
import torch
from slow import assert_equals_slow, segment, two_passes, wbce
from torch.func import functional_call
from toy import TINY, method_run

from rmdd import config
from rmdd.methods.repblend import Blend


def blended_loss(setup, drawn):
    """Return a slow student loss: it runs the image tower in every step and blends rows one by one."""

    def value(theta, images, texts, similarity, step):
        lam, q = drawn.blends[step].weight, drawn.blends[step].partner.tolist()
        a, b = setup.model.image_tower(images), texts
        a = torch.stack([lam * a[i] + (1 - lam) * a[q[i]] for i in range(len(a))])
        b = torch.stack([lam * b[i] + (1 - lam) * b[q[i]] for i in range(len(b))])
        sides = []
        for head, x in (("image_head", a), ("text_head", b)):
            params = {n.removeprefix(f"{head}."): p for n, p in theta.items() if n.startswith(head)}
            sides.append(
                torch.nn.functional.normalize(functional_call(getattr(setup.model, head), params, (x,)), dim=1)
            )
        return wbce(sides[0] @ sides[1].T / setup.model.temperature, similarity)

    return value


@pytest.mark.parametrize("branches", ["separate", "merged"])
def test_equals_blending_in_the_loss_and_autograd_through_the_tower(make, branches):
    setup = make(method_run("repblend", branches=branches))
    assert {n.split(".")[0] for n in setup.model.trained()} == {"image_head", "text_head"}
    tower = {n: p.clone() for n, p in setup.model.image_tower.named_parameters()}

    def gradient_of(leaves, drawn):
        start, target = segment(setup, drawn)
        loss = blended_loss(setup, drawn)
        return two_passes(loss, start, target, leaves, setup.begun.alpha, drawn.batches, merged=branches == "merged")

    assert_equals_slow(setup, gradient_of)
    for name, p in setup.model.image_tower.named_parameters():
        assert torch.equal(p, tower[name]) and p.grad is None, name


def test_blends_are_uniform_differ_by_step_and_repeat(make):
    matcher = make(method_run("repblend", steps=4)).matcher
    drawn = [matcher.draw(i) for i in range(100)]
    weights = torch.tensor([[b.weight for b in d.blends] for d in drawn])
    assert len(weights.unique()) == weights.numel() == 400, "every inner step must have its own weight"
    assert abs(weights.mean() - 0.5) < 0.05 and abs(weights.var() - 1 / 12) < 0.02, "Beta(1, 1)"
    partners = [b.partner.tolist() for d in drawn for b in d.blends]
    assert all(sorted(q) == list(range(4)) for q in partners) and len({tuple(q) for q in partners}) == 24
    again = matcher.draw(7).blends
    assert [b.weight for b in again] == [b.weight for b in drawn[7].blends]
    assert all(torch.equal(a.partner, b.partner) for a, b in zip(again, drawn[7].blends, strict=True))


def test_blending_alone_is_repblend_with_a_trainable_tower(make):
    """Compare the gradient with central differences; they would differ if the two passes used different blends."""
    trainable = {**TINY["model"], "image": {**TINY["model"]["image"], "trainable": True}}
    setup = make(config.load({**method_run("repblend", steps=1).model_dump(mode="json"), "model": trainable}))
    assert any(n.startswith("image_tower") for n in setup.model.trained())
    drawn, x = setup.matcher.draw(0), setup.begun.images
    result = setup.matcher.gradient(setup.begun, drawn)
    random, h = torch.Generator().manual_seed(0), 1e-5
    direction = torch.randn(x.shape, generator=random, dtype=torch.float64)
    ends = [
        setup.matcher.gradient(
            setup.begun.with_tensors(setup.begun.tensors() | {"images": x + s * h * direction}), drawn
        ).loss
        for s in (1, -1)
    ]
    assert ((ends[0] - ends[1]) / (2 * h)).item() == pytest.approx(
        (result.gradient.images * direction).sum().item(), rel=1e-6
    )


def test_the_mixture_of_two_rows():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    expected = torch.tensor([[0.25, 0.75], [1.5, 1.75], [1.25, 0.5]])
    torch.testing.assert_close(Blend(0.25, torch.tensor([1, 2, 0])).of(rows), expected)


def test_the_blend_option_sets_the_beta_distribution(make):
    with pytest.raises(config.ConfigError, match=r"distill.options.blend: Input should be greater than 0"):
        config.load({"distill": {"method": "repblend", "options": {"blend": 0.0}}})
    matcher = make(method_run("repblend", options={"blend": 0.2})).matcher
    weights = torch.tensor([b.weight for i in range(100) for b in matcher.draw(i).blends])
    assert abs(weights.var() - 1 / (4 * 1.4)) < 0.03, "weights must be mostly near 0 or 1"


def test_every_step_has_a_blend_and_other_methods_none(make):
    drawn = make(method_run("repblend", steps=3, batch=3, options={"blend": 0.2})).matcher.draw(4)
    assert [sorted(b.partner.tolist()) for b in drawn.blends] == [[0, 1, 2]] * 3
    assert all(0 <= b.weight <= 1 for b in drawn.blends)
    assert not hasattr(make(method_run("lors", steps=3, batch=3)).matcher.draw(4), "blends")
