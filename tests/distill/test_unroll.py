"""Check in float64 that the engine gives the same meta-gradients as differentiating through the full unroll."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmdd import config
from rmdd.distill.phases import mini_batches
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.unroll import meta_gradient
from rmdd.models.dual import build, tower_of
from rmdd.models.image import matching_context

TEXT_WIDTH = 5
ESTIMATORS = ("exact", "first_order")
SIMILARITIES = ("full", "low_rank", "identity")
TOLERANCE = 1e-9


def encoder(*, frozen=False, dropout=0.0, name="convnet", image_size=8):
    """Return a small dual encoder in float64; with `frozen`, only the projections of the encoder are trained."""
    image = config.ImageTower(
        name=name,
        weights="random",
        widths=(4,),
        groups=2,
        trainable=not frozen,
        projection="block" if frozen else "linear",
    )
    model = config.Model(
        image=image,
        text=config.TextTower(name="hashing", projection="block"),
        width=6,
        dropout=dropout,
        temperature=0.5,
    )
    return build(model, TEXT_WIDTH, image_size, seed=1, who="expert").double()


def problem(model, *, pairs=7, batch=3, steps=3, similarity="full", seed=0, image_size=8):
    """Return start and target parameters, a synthetic set without special values such as zeros, and mini-batches."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    start = model.trained()
    target = {n: p + 0.1 * normal(*p.shape) for n, p in start.items()}
    tensors = {
        "full": lambda: {"matrix": torch.eye(pairs, dtype=torch.float64) + 0.3 * normal(pairs, pairs)},
        "low_rank": lambda: {
            "scale": 1 + 0.3 * normal(pairs),
            "left": normal(pairs, 2),
            "right": 0.3 * normal(pairs, 2),
        },
        "identity": dict,
    }[similarity]()
    synthetic = Synthetic(
        images=normal(pairs, 3, image_size, image_size),
        texts=normal(pairs, TEXT_WIDTH),
        lr_image=torch.tensor(0.13, dtype=torch.float64),
        lr_text=torch.tensor(0.21, dtype=torch.float64),
        similarity=tensors,
        alpha=0.7,
    )
    return start, target, synthetic, mini_batches(pairs, batch, steps, random)


def whole_similarity(synthetic):
    s = synthetic.similarity
    if "matrix" in s:
        return s["matrix"]
    identity = torch.eye(synthetic.pairs, dtype=torch.float64)
    if "scale" not in s:
        return identity
    rank = s["left"].shape[1]
    return identity * s["scale"] + synthetic.alpha / rank * s["left"] @ s["right"].T


def unrolled(loss, start, target, synthetic, batches, *, estimator, branches="separate"):
    """Return the miss after K steps and the gradients of the miss, computed by autograd through all steps. With
    `first_order`, every step takes its gradient at detached parameters."""
    leaf = synthetic.map(lambda t: t.clone().requires_grad_())
    rate = {"image": leaf.lr_image, "text": leaf.lr_text}
    similarity = whole_similarity(leaf)
    theta = {n: p.clone().requires_grad_() for n, p in start.items()}
    for step, index in enumerate(batches):
        at = theta if estimator == "exact" else {n: p.detach().requires_grad_() for n, p in theta.items()}
        value = loss(at, leaf.images[index], leaf.texts[index], similarity[index][:, index], step)
        grads = torch.autograd.grad(value, list(at.values()), create_graph=True)
        theta = {n: p - rate[tower_of(n)] * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    parts = {t: [n for n in start if tower_of(n) == t] for t in ("image", "text")}
    far = {t: sum((theta[n] - target[n]).square().sum() for n in names) for t, names in parts.items()}
    reach = {t: sum((start[n] - target[n]).square().sum() for n in names) for t, names in parts.items()}
    if branches == "merged":
        miss = (far["image"] + far["text"]) / (reach["image"] + reach["text"])
    else:
        miss = far["image"] / reach["image"] + far["text"] / reach["text"]
    named = leaf.tensors()
    grads = torch.autograd.grad(miss, list(named.values()), allow_unused=True, materialize_grads=True)
    return miss.detach(), dict(zip(named, grads, strict=True))


def loss_of(model, steps, **rule):
    """Return the student loss that the matching loop uses, including dropout."""
    return student_loss(model, config.Distill(**rule), tuple(range(100, 100 + steps)))


def assert_close(result, miss, expected, tolerance=TOLERANCE):
    assert result.loss.item() == pytest.approx(miss.item(), rel=tolerance)
    gradient = result.gradient.tensors()
    assert gradient.keys() == expected.keys()
    for name, e in expected.items():
        assert e.norm() > 0, f"the gradient of {name} is zero, so nothing is tested"
        assert ((gradient[name] - e).norm() / e.norm()).item() < tolerance, name


def check(model, estimator, *, loss="wbce", branches="separate", image_size=8, **shape):
    start, target, synthetic, batches = problem(model, image_size=image_size, **shape)
    with matching_context(model):
        compute = loss_of(model, len(batches), loss=loss)
        result = meta_gradient(compute, start, target, synthetic, batches, estimator=estimator, branches=branches)
        expected = unrolled(compute, start, target, synthetic, batches, estimator=estimator, branches=branches)
    assert_close(result, *expected)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_full_unroll(estimator, similarity):
    check(encoder(), estimator, similarity=similarity, steps=4, seed=3)


@settings(deadline=None, max_examples=40)
@given(
    estimator=st.sampled_from(ESTIMATORS),
    steps=st.integers(1, 4),
    batch=st.integers(2, 6),
    loss=st.sampled_from(("wbce", "infonce")),
    similarity=st.sampled_from(SIMILARITIES),
    frozen=st.booleans(),
    dropout=st.sampled_from((0.0, 0.3)),
    branches=st.sampled_from(("separate", "merged")),
    seed=st.integers(0, 2**16),
)
def test_equals_the_full_unroll_for_any_setting(
    estimator, steps, batch, loss, similarity, frozen, dropout, branches, seed
):
    model = encoder(frozen=frozen, dropout=dropout)
    check(model, estimator, loss=loss, branches=branches, steps=steps, batch=batch, similarity=similarity, seed=seed)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_full_unroll_through_a_timm_tower(name, estimator):
    check(encoder(name=name, image_size=32), estimator, image_size=32, pairs=4, batch=3, steps=2)


def test_the_gradient_equals_finite_differences():
    """Move all learnable tensors in one random direction; compare central differences of the miss with the gradient."""
    model = encoder()
    start, target, synthetic, batches = problem(model)
    compute = loss_of(model, len(batches), loss="infonce")
    random = torch.Generator().manual_seed(9)
    along = synthetic.map(lambda t: 0.01 * torch.randn(t.shape, generator=random, dtype=t.dtype)).tensors()

    def moved(by):
        return synthetic.with_tensors({n: t + by * along[n] for n, t in synthetic.tensors().items()})

    result = meta_gradient(compute, start, target, synthetic, batches)
    slope = sum((g * along[n]).sum() for n, g in result.gradient.tensors().items())
    h = 1e-3
    up, down = (meta_gradient(compute, start, target, moved(by), batches).loss for by in (h, -h))
    assert ((up - down) / (2 * h)).item() == pytest.approx(slope.item(), rel=1e-5)


def test_first_order_is_the_published_two_pass_estimator():
    """dL/dX_k = 2 sum_m (w_m / D_m) . dg_k/dX_k with w_m = -eta_m delta_m held constant (TESLA, LoRS)."""
    model = encoder()
    start, target, synthetic, batches = problem(model)
    compute = loss_of(model, len(batches))
    rate = {"image": synthetic.lr_image, "text": synthetic.lr_text}
    leaf = synthetic.images.clone().requires_grad_()
    similarity = synthetic.similarity["matrix"]

    def inner(theta, step, **graph):
        index = batches[step]
        value = compute(theta, leaf[index], synthetic.texts[index], similarity[index][:, index], step)
        return torch.autograd.grad(value, list(theta.values()), **graph)

    visited = [{n: p.clone().requires_grad_() for n, p in start.items()}]
    for step in range(len(batches)):
        grads = inner(visited[-1], step)
        moved = {n: (p - rate[tower_of(n)] * g) for (n, p), g in zip(visited[-1].items(), grads, strict=True)}
        visited.append({n: p.detach().requires_grad_() for n, p in moved.items()})
    reach = {
        t: sum((start[n] - target[n]).square().sum() for n in start if tower_of(n) == t) for t in ("image", "text")
    }
    total = torch.zeros_like(leaf)
    for step in range(len(batches)):
        scalar = 0.0
        for n, g in zip(start, inner(visited[step], step, create_graph=True), strict=True):
            w = -rate[tower_of(n)] * (visited[-1][n] - target[n]).detach()
            scalar = scalar + 2 * (w / reach[tower_of(n)] * g).sum()
        total += torch.autograd.grad(scalar, leaf)[0]
    result = meta_gradient(compute, start, target, synthetic, batches, estimator="first_order").gradient.images
    assert ((result - total).norm() / total.norm()).item() < TOLERANCE


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_both_estimators_agree_on_one_step_only(similarity):
    model = encoder()
    for steps, same in ((1, True), (3, False)):
        start, target, synthetic, batches = problem(model, steps=steps, similarity=similarity)
        exact, first = (
            meta_gradient(loss_of(model, steps), start, target, synthetic, batches, estimator=e).gradient.tensors()
            for e in ESTIMATORS
        )
        assert all(torch.allclose(exact[n], first[n], rtol=1e-12, atol=0) for n in exact) == same


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_overlapping_batches_add_up(estimator):
    model = encoder(dropout=0.2)
    start, target, synthetic, _ = problem(model)
    batches = torch.tensor([[0, 1, 2], [2, 1, 4], [4, 0, 2]])
    compute = loss_of(model, 3)
    result = meta_gradient(compute, start, target, synthetic, batches, estimator=estimator)
    assert_close(result, *unrolled(compute, start, target, synthetic, batches, estimator=estimator))
    idle = torch.tensor([3, 5, 6])
    for name in ("images", "texts"):
        assert (result.gradient.tensors()[name][idle] == 0).all()
    assert (result.gradient.similarity["matrix"][idle] == 0).all()
    assert (result.gradient.similarity["matrix"][:, idle] == 0).all()


def test_dropout_draws_one_mask_per_step():
    model = encoder(frozen=True, dropout=0.5)
    start, _, synthetic, batches = problem(model)
    pairs = synthetic.images[batches[0]], synthetic.texts[batches[0]], torch.eye(3, dtype=torch.float64)

    def values(rule, order):
        compute = loss_of(model, 2, inner_dropout=rule)
        return [compute(start, *pairs, step).item() for step in order]

    first, second, again = values("same_mask", (0, 1, 0))
    assert first == again and first != second
    torch.rand(3)  # random numbers drawn between calls must not change the masks
    assert values("same_mask", (0,)) == [first]
    fresh = values("fresh_mask", (0, 0))
    assert fresh[0] == first and fresh[1] != first
    off = values("off", (0, 1))
    assert off[0] == off[1] != first


class DropsItsInput(torch.nn.Module):
    """A noise layer other than `nn.Dropout`, similar to timm's stochastic depth."""

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_noise_of_a_tower_is_the_same_in_both_passes(estimator):
    model = encoder()
    model.image_head = torch.nn.Sequential(DropsItsInput(), model.image_head)
    check(model, estimator)


def test_student_loss_leaves_the_global_generator_alone():
    model = encoder(dropout=0.5)
    start, target, synthetic, batches = problem(model)
    before = torch.random.get_rng_state()
    meta_gradient(loss_of(model, len(batches)), start, target, synthetic, batches)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_inputs_are_not_modified():
    model = encoder()
    start, target, synthetic, batches = problem(model)
    ins = {"start": start, "target": target, "synthetic": synthetic.tensors(), "model": model.state_dict()}
    before = {k: {n: t.clone() for n, t in named.items()} for k, named in ins.items()}
    meta_gradient(loss_of(model, len(batches)), start, target, synthetic, batches)
    for k, named in ins.items():
        assert all(torch.equal(t, before[k][n]) and not t.requires_grad for n, t in named.items())


def test_the_miss_without_learning_is_one_per_tower():
    model = encoder()
    start, target, synthetic, batches = problem(model)
    still = replace(
        synthetic, lr_image=torch.zeros_like(synthetic.lr_image), lr_text=torch.zeros_like(synthetic.lr_text)
    )
    result = meta_gradient(loss_of(model, len(batches)), start, target, still, batches)
    assert {t: m.item() for t, m in result.miss.items()} == pytest.approx({"image": 1, "text": 1})
    assert result.loss.item() == pytest.approx(2)
    assert result.gradient.lr_image != 0 and (result.gradient.images == 0).all()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_target_at_the_start_is_refused(tower):
    model = encoder()
    start, target, synthetic, batches = problem(model)
    target = {n: start[n] if tower_of(n) == tower else t for n, t in target.items()}
    with pytest.raises(ValueError, match=f"the same {tower} parameters.*start before the endpoint"):
        meta_gradient(loss_of(model, len(batches)), start, target, synthetic, batches)
