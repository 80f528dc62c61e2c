"""Compare the gradients of all engine options with autograd through all steps; test the fall-back to reverse mode."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import toy
from distill.test_unroll import ESTIMATORS, assert_close, encoder, loss_of, problem, unrolled
from torch.autograd import forward_ad
from toy import CPU, first_set, run_of

from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.unroll import Engine, forward_suits, meta_gradient
from rmdd.methods import matching_method
from rmdd.models.group_norm import TwiceDifferentiable, group_norm, norm_relu_pool
from rmdd.models.image import matching_context

ENGINES = [Engine(second_pass=s, trajectory=t) for s in ("forward", "reverse") for t in ("device", "cpu", "recompute")]
ENGINES += [Engine(second_pass="forward", reuse=1), Engine(reuse=9), Engine(trajectory="recompute", reuse=2)]
TIMM = ["test_nfnet", "test_vit", "test_resnet"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{e.second_pass}-{e.trajectory}-{e.reuse}")
@pytest.mark.parametrize("steps", [1, 5])
def test_every_engine_equals_the_full_unroll(engine, estimator, steps, caplog):
    model = encoder(dropout=0.3)
    start, target, synthetic, batches = problem(model, steps=steps)
    compute = loss_of(model, steps)
    result = meta_gradient(compute, start, target, synthetic, batches, estimator=estimator, engine=engine)
    assert_close(result, *unrolled(compute, start, target, synthetic, batches, estimator=estimator), tolerance=1e-11)
    assert not caplog.records


@pytest.mark.parametrize("loss", ["wbce", "infonce"])
@pytest.mark.parametrize("name", TIMM)
def test_forward_mode_suits_timm_towers(name, loss, caplog):
    model = encoder(name=name, image_size=32)
    start, target, synthetic, batches = problem(model, image_size=32, pairs=4, steps=2)
    compute = loss_of(model, 2, loss=loss)
    with matching_context(model):
        for estimator in ESTIMATORS:
            suits = forward_suits(compute, start, synthetic, batches[0], estimator=estimator)
            assert suits == (name != "test_vit"), "forward mode of torch's attention cannot be differentiated again"
            engine = Engine(second_pass="forward" if suits else "reverse")
            result = meta_gradient(compute, start, target, synthetic, batches, estimator=estimator, engine=engine)
            assert_close(result, *unrolled(compute, start, target, synthetic, batches, estimator=estimator))
    assert bool(caplog.records) == (name == "test_vit")


def test_frozen_towers_work_with_every_engine():
    model = encoder(frozen=True)
    start, target, synthetic, batches = problem(model)
    for engine in ENGINES:
        result = meta_gradient(loss_of(model, 3), start, target, synthetic, batches, engine=engine)
        assert_close(result, *unrolled(loss_of(model, 3), start, target, synthetic, batches, estimator="exact"))


class WrongTwice(torch.nn.Module):
    """A layer (torch's layer norm) whose forward-mode derivative is silently wrong when it is differentiated again."""

    def forward(self, x):
        return torch.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("layer", [WrongTwice(), "no forward mode"])
def test_unsuitable_forward_mode_is_warned_of_in_one_line(layer, caplog):
    model = encoder()
    if isinstance(layer, WrongTwice):
        model.image_head = torch.nn.Sequential(model.image_head, layer)
    else:
        model.image_tower = torch.nn.Sequential(Cube(), model.image_tower)
    _, _, synthetic, batches = problem(model)
    assert not forward_suits(loss_of(model, 3), model.trained(), synthetic, batches[0])
    assert [r.getMessage().partition("(")[0] for r in caplog.records] == ["forward mode does not suit this student "]


@pytest.mark.parametrize(("mask", "second_pass"), [("same_mask", "forward"), ("fresh_mask", "reverse")])
def test_a_phase_chooses_its_engine_from_its_initial_set(store, mask, second_pass):
    matcher = Matcher(matching_method(run_of(inner_dropout=mask)), 0, store, toy.encoder(), CPU)
    assert matcher.engine(first_set()).second_pass == second_pass
    assert matcher.engine(first_set().map(lambda t: t * torch.nan)).second_pass == second_pass


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(torch.nn.Module):
    """A layer without a forward-mode derivative; the tests place it between trained layers."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return _Cube.apply(x * self.scale)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("second_pass", ["forward", "reverse"])
def test_bfloat16_keeps_the_direction(estimator, second_pass):
    model = encoder()
    start, target, synthetic, batches = problem(model, steps=3)
    start, target = ({n: p.float() for n, p in t.items()} for t in (start, target))
    synthetic, compute = synthetic.map(torch.Tensor.float), loss_of(model.float(), 3)
    engines = (Engine(precision=p, second_pass=second_pass) for p in ("float32", "bfloat16"))
    one, other = (
        meta_gradient(compute, start, target, synthetic, batches, estimator=estimator, engine=e) for e in engines
    )
    for (name, a), b in zip(one.gradient.tensors().items(), other.gradient.tensors().values(), strict=True):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99, name


def twice(out, along, leaves):
    """Return the gradient g of <out, along[0]>, and the gradient of <g, along[1:]>."""
    first = torch.autograd.grad(out, leaves, along[0], create_graph=True)
    return *first, *torch.autograd.grad(first, (along[0], *leaves), along[1:], materialize_grads=True)


@pytest.mark.parametrize(("groups", "size"), list(itertools.product((1, 2, 4), (4, 5))))
@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_norm_equals_torch_with_both_derivatives(groups, size, packed):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    form = torch.channels_last if packed else torch.contiguous_format
    weight, bias, wide = normal(4), normal(4), normal(2, 4, size, 6).contiguous(memory_format=form)
    assert torch.allclose(group_norm(wide, weight, bias, groups, 1e-5), F.group_norm(wide, groups, weight, bias, 1e-5))
    pooled = F.avg_pool2d(F.relu(F.group_norm(wide, groups, weight, bias, 1e-5)), 2)
    fused = norm_relu_pool(wide, weight, bias, groups, 1e-5)
    assert torch.allclose(fused, pooled)
    along = [normal(*t.shape) for t in (pooled, wide, weight, bias)]
    for result, expected in zip(*(twice(out, along, (wide, weight, bias)) for out in (fused, pooled)), strict=True):
        assert torch.allclose(result, expected)
    small = normal(2, 4, size, 2).detach().contiguous(memory_format=form).requires_grad_()
    for function in (group_norm, norm_relu_pool):

        def at(*leaves, function=function):
            return function(*leaves, groups, 1e-5)

        assert torch.autograd.gradcheck(at, (small, weight, bias))
        assert torch.autograd.gradgradcheck(at, (small, weight, bias))


def test_our_silu_equals_torch_with_both_derivatives():
    x = torch.linspace(-8, 8, 33, dtype=torch.float64).requires_grad_()
    with TwiceDifferentiable():
        assert torch.allclose(F.silu(x), x * x.sigmoid(), rtol=1e-14)
        assert torch.autograd.gradcheck(F.silu, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(F.silu, x, check_fwd_over_rev=False)
        with forward_ad.dual_level():
            moving = forward_ad.make_dual(x, torch.ones_like(x))
            (bend,) = torch.autograd.grad(forward_ad.unpack_dual(F.silu(moving)).tangent.sum(), x)
    slope = torch.autograd.grad((x * x.sigmoid()).sum(), x, create_graph=True)[0]
    assert torch.allclose(bend, torch.autograd.grad(slope.sum(), x)[0], rtol=1e-12, atol=1e-15)


def test_our_operations_equal_torch():
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((1, 6, 8), (8,), (8,)))
    pixel, matrix = torch.randn(3, 4, 1, 1, generator=random).double(), torch.randn(5, 4, generator=random).double()
    calls = (
        lambda: F.layer_norm(x, (8,), weight, bias),
        lambda: F.layer_norm(x, (6, 8)),
        lambda: F.batch_norm(x, None, None, weight[:6], training=True, eps=1e-6),
        lambda: F.batch_norm(x, x.new_zeros(6), x.new_ones(6)),
        lambda: F.group_norm(x, 2, weight[:6], bias[:6]),
        lambda: F.group_norm(x, 2),
        lambda: x.softmax(-1),
        lambda: F.log_softmax(x, dim=1),
        lambda: F.silu(x.clone(), inplace=True),
        lambda: F.conv2d(pixel, matrix[:, :, None, None], weight[:5], stride=2),
        lambda: F.conv2d(pixel, matrix[:, :, None, None], padding=1),
        lambda: F.conv2d(input=pixel, weight=matrix[:, :, None, None]),
        lambda: F.layer_norm(input=x, normalized_shape=(8,), weight=weight),
        lambda: F.group_norm(input=x, num_groups=2, weight=weight[:6], bias=bias[:6]),
        lambda: F.batch_norm(input=x, running_mean=None, running_var=None, training=True),
        lambda: F.softmax(input=x, dim=1),
    )
    for call in calls:
        expected = call()
        with TwiceDifferentiable():
            assert torch.allclose(call(), expected, rtol=1e-12, atol=1e-14)
