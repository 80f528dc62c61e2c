import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy import (
    CPU,
    EPOCHS,
    EXPERTS,
    PAIRS,
    assert_same_results,
    distil,
    encoder,
    first_set,
    lines_of,
    run_of,
    same_tensors,
    stop_after,
)

from rmdd import config
from rmdd.distill.loop import State, outer_step, snapshot_iterations
from rmdd.distill.phases import draw
from rmdd.distill.sets import load_set, save_set
from rmdd.distill.trajectory.inner import student_loss
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.unroll import Engine, meta_gradient
from rmdd.methods import matching_method


@pytest.fixture(scope="module")
def unbroken_run(store, tmp_path_factory):
    """Fixture: `unbroken_run(run)` returns the folder of a phase that was never stopped; each run is distilled once."""
    folders = {}

    def unbroken_run(run):
        if run not in folders:
            folder = tmp_path_factory.mktemp("whole")
            assert distil(run, store, folder, kind=run.distill.similarity.kind)
            folders[run] = folder
        return folders[run]

    return unbroken_run


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("estimator", ["exact", "first_order"])
def test_a_phase_on_the_original_trajectory_equals_the_plain_loop(store, tmp_path, momentum, estimator):
    """Check that LoRS with a full similarity gives the results of a plain loop with torch's optimiser, bit for bit."""
    run = run_of(trajectory="original", ema=0.0, momentum=momentum, estimator=estimator)
    rule = run.distill
    assert distil(run, store, tmp_path)

    leaves = {n: t.clone().requires_grad_() for n, t in first_set().tensors().items()}
    rates = {"images": 0.5, "texts": 0.3, "similarity.matrix": 0.7, "lr_image": 1e-4, "lr_text": 1e-4}
    optimiser = torch.optim.SGD([{"params": [leaves[n]], "lr": lr} for n, lr in rates.items()], momentum=momentum)
    model, losses = encoder(), []
    for iteration in range(rule.phases[0].iterations):
        drawn = draw(rule, 0, iteration, EXPERTS, seed=3)
        theta, target = (
            load_file(store.path / f"expert-{drawn.expert:03d}" / f"epoch-{epoch:04d}.safetensors")
            for epoch in (drawn.start, drawn.start + 1)
        )
        names = list(model.trained())
        theta, target = ({n: point[n] for n in names} for point in (theta, target))
        now = first_set().with_tensors({n: t.detach() for n, t in leaves.items()})
        compute = student_loss(model, rule, drawn.dropout_seeds)
        engine = Engine(second_pass="forward")  # the phase also uses forward mode
        results = meta_gradient(compute, theta, target, now, drawn.batches, estimator=estimator, engine=engine)
        for n, g in results.gradient.tensors().items():
            leaves[n].grad = g
        optimiser.step()
        losses.append(results.loss.item())
    plain = {n: t.detach() for n, t in leaves.items()}
    result = load_set(tmp_path / "set-000007.safetensors").tensors()
    assert same_tensors(result, plain)
    assert same_tensors(State.load(tmp_path / "state.safetensors", "key").raw.tensors(), plain)
    assert [line["loss"] for line in lines_of(tmp_path)] == losses


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_the_average_equals_the_published_recurrence(store, tmp_path, unbroken_run, decay):
    """Compare the moving average with equation 7 of PTM-ST in float64; averaging must not change the raw sets."""
    raw = []
    for iteration in range(1, 8):
        folder = unbroken_run(run_of(ema=0.0, iterations=iteration, snapshots=1))
        raw.append(load_set(folder / f"set-{iteration:06d}.safetensors").tensors())
    expected = {n: t.double() for n, t in first_set().tensors().items()}
    for now in raw:
        expected = {n: decay * e + (1 - decay) * now[n].double() for n, e in expected.items()}
    distil(run_of(ema=decay), store, tmp_path / "averaged")
    results = load_set(tmp_path / "averaged" / "set-000007.safetensors").tensors()
    for n, e in expected.items():
        torch.testing.assert_close(results[n].double(), e, rtol=1e-5, atol=1e-6)
    assert same_tensors(State.load(tmp_path / "averaged" / "state.safetensors", "key").raw.tensors(), raw[-1])


@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
@pytest.mark.parametrize("trajectory", ["original", "shortcut", "convexified"])
def test_every_learnable_tensor_moves(store, tmp_path, kind, trajectory):
    run = run_of(trajectory=trajectory, similarity={"kind": kind, "rank": 2}, iterations=2)
    distil(run, store, tmp_path, kind=kind)
    state, before = State.load(tmp_path / "state.safetensors", "key"), first_set(kind).tensors()
    for named in (state.raw.tensors(), state.average.tensors()):
        assert named.keys() == before.keys()
        for name, t in named.items():
            assert torch.isfinite(t).all() and not torch.equal(t, before[name]), name
    if kind == "full":
        diagonal = state.raw.similarity["matrix"].diagonal()
        assert (diagonal != 1).any(), "an identity similarity must be able to change"


def test_one_outer_step_moves_the_pairs_drawn_and_no_others(store):
    run = run_of(steps=1, batch=3)
    matcher, state = Matcher(matching_method(run), 0, store, encoder(), CPU), State.begin(first_set())
    drawn = matcher.draw(0)
    after = outer_step(state, matcher.gradient(state.raw, drawn).gradient, run.distill)
    assert after.iteration == 1 and state.iteration == 0
    moved = (after.raw.images != state.raw.images).flatten(1).any(1).nonzero().flatten()
    assert moved.tolist() == sorted(drawn.batches[0].tolist())
    assert after.raw.lr_image != state.raw.lr_image and after.raw.lr_text != state.raw.lr_text


def test_reused_graphs_change_the_engine_and_not_the_gradient(store):
    drawn, results = None, []
    for reuse in (0, 1, 5):
        matcher = Matcher(matching_method(run_of(reuse_graphs=reuse, estimator="exact")), 0, store, encoder(), CPU)
        drawn = drawn or matcher.draw(0)
        results.append(matcher.gradient(first_set(), drawn).gradient.tensors())
        assert matcher.engine(first_set()).reuse == reuse
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5 * tensor.abs().max().item())


def test_reused_graphs_are_refused_with_fresh_masks():
    with pytest.raises(ValueError, match="reuse_graphs keeps the dropout masks"):
        run_of(reuse_graphs=1, inner_dropout="fresh_mask")


def test_matching_uses_the_configured_path(store):
    drawn = None
    losses = {}
    for trajectory in ("original", "shortcut", "convexified"):
        matcher = Matcher(matching_method(run_of(trajectory=trajectory)), 0, store, encoder(), CPU)
        drawn = matcher.draw(0)
        losses[trajectory] = matcher.gradient(first_set(), drawn).loss.item()
        assert matcher.path(0).endpoint == EPOCHS
    assert losses["shortcut"] == losses["convexified"] != losses["original"]


def test_an_exclusive_endpoint_ends_one_epoch_early(store):
    plan = (config.Phase(pairs=PAIRS, start=0, stop=1, endpoint=EPOCHS),)
    matcher = Matcher(matching_method(run_of(phases=plan, endpoint_rule="exclusive")), 0, store, encoder(), CPU)
    assert matcher.path(1).endpoint == EPOCHS - 1
    assert same_tensors(matcher.path(1).at(EPOCHS - 1), store.read(1, EPOCHS - 1))


def test_phases_do_not_depend_on_one_another(store, tmp_path):
    plan = tuple(
        config.Phase(pairs=p, start=s, stop=s + 1, endpoint=EPOCHS, iterations=4) for p, s in ((PAIRS, 0), (5, 1))
    )
    both = run_of(phases=plan)
    distil(both, store, tmp_path / "b1", phase=1)
    distil(both, store, tmp_path / "b0", phase=0)
    distil(run_of(phases=plan[:1]), store, tmp_path / "alone", phase=0)
    assert_same_results(tmp_path / "b0", tmp_path / "alone")
    assert load_set(tmp_path / "b1" / "set-000004.safetensors").pairs == 5


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_stopped_and_resumed_is_bit_identical(store, tmp_path, unbroken_run, stop, kind):
    run = run_of(similarity={"kind": kind, "rank": 2})
    assert not distil(run, store, tmp_path, kind=kind, **stop_after(stop))
    torch.manual_seed(stop)
    assert distil(run, store, tmp_path, kind=kind)
    assert_same_results(unbroken_run(run), tmp_path)


class Killed(BaseException):
    """Raised to end the distillation loop without any cleanup, as SIGKILL would."""


@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_killed_and_resumed_is_bit_identical(store, tmp_path, unbroken_run, at):
    def kill(metrics):
        if metrics["iteration"] == at:
            raise Killed

    run = run_of()
    with pytest.raises(Killed):
        distil(run, store, tmp_path, on_step=kill)
    log = tmp_path / "metrics.jsonl"
    with open(log, "a") as file:  # the kill left an incomplete line
        file.write('{"phase": 0, "iterat')
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken_run(run), tmp_path)
    assert [line["iteration"] for line in lines_of(tmp_path)] == list(range(1, 8))


def test_log_lines_after_the_last_checkpoint_are_not_duplicated(store, tmp_path):
    """A killed run repeats the iterations after its checkpoint; the log must have one line for each of them."""
    run = run_of()
    distil(run, store, tmp_path, **stop_after(3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 4, "loss": 1.0}) + "\n")
    distil(run, store, tmp_path)
    lines = lines_of(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(1, 8)) and lines[3]["loss"] != 1.0


def test_a_finished_phase_is_not_changed(store, tmp_path):
    run = run_of()
    assert distil(run, store, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    seen = []
    assert distil(run, store, tmp_path, on_step=seen.append)
    assert not seen and before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-10], lambda b: b"", lambda b: b"x" * len(b), lambda b: b[: len(b) // 2]]
)
def test_a_damaged_state_is_refused(store, tmp_path, damage):
    run = run_of(iterations=4)
    distil(run, store, tmp_path, **stop_after(2))
    path = tmp_path / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    todo = "delete it and good.safetensors in the same folder to restart this phase"
    with pytest.raises(ValueError, match=f"state.safetensors is damaged .*{todo}"):
        distil(run, store, tmp_path)


def test_a_state_of_another_run_is_refused(store, tmp_path):
    run = run_of(iterations=4)
    distil(run, store, tmp_path, **stop_after(2))
    with pytest.raises(ValueError, match="belongs to another configuration; use another run folder"):
        distil(run, store, tmp_path, key="other")


def test_a_state_is_saved_and_loaded_exactly(tmp_path):
    initial_set = State.begin(first_set("low_rank"))
    state = State(
        4, initial_set.raw, initial_set.average.map(lambda t: t + 1), initial_set.raw.map(lambda t: t * 2).tensors()
    )
    state.save(tmp_path / "state.safetensors", "k")
    again = State.load(tmp_path / "state.safetensors", "k")
    assert again.iteration == 4 and again.raw.alpha == state.raw.alpha
    assert same_tensors(again.raw.tensors(), state.raw.tensors())
    assert same_tensors(again.average.tensors(), state.average.tensors())
    assert same_tensors(again.momentum, state.momentum)


def test_a_set_is_saved_and_loaded_exactly(tmp_path):
    before = replace(first_set("low_rank"), alpha=0.3)
    save_set(before, tmp_path / "set.safetensors")
    after = load_set(tmp_path / "set.safetensors")
    assert after.alpha == 0.3 and same_tensors(after.tensors(), before.tensors())


def test_the_lower_clamp_of_the_rates_comes_after_the_average():
    state = State.begin(first_set())
    pull = state.raw.map(torch.zeros_like).with_tensors(
        state.raw.map(torch.zeros_like).tensors() | {"lr_image": torch.tensor(9.0), "lr_text": torch.tensor(1.0)}
    )
    rule = run_of(lr_lr=0.01, min_inner_lr=0.05, ema=0.5).distill
    after = outer_step(state, pull, rule)
    assert after.raw.lr_image.item() == pytest.approx(0.05)
    assert after.average.lr_image.item() == pytest.approx(0.5 * 0.1 + 0.5 * 0.01)
    assert after.raw.lr_text.item() == pytest.approx(0.09)
    free = outer_step(state, pull, run_of(lr_lr=0.02, ema=0.5).distill)
    assert free.raw.lr_image.item() == pytest.approx(-0.08)


@pytest.mark.parametrize("optimiser", ["sgd", "normalised"])
def test_a_clamp_bounds_every_entry_of_the_matrix_after_a_step_and_in_the_average(optimiser):
    state, bounds = State.begin(first_set()), {"clamp": (0.1, 0.8)}
    rule = run_of(similarity={"kind": "full", **bounds}, ema=0.5, optimiser=optimiser).distill
    free = run_of(similarity={"kind": "full"}, ema=0.5, optimiser=optimiser).distill
    gradient = gradients_of(state, 0).map(torch.Tensor.float)
    clamped, plain = (outer_step(state, gradient, r) for r in (rule, free))
    expected = plain.raw.similarity["matrix"].clamp(0.1, 0.8)
    assert torch.equal(clamped.raw.similarity["matrix"], expected)
    torch.testing.assert_close(clamped.average.similarity["matrix"], 0.5 * torch.eye(PAIRS) + 0.5 * expected)
    assert torch.equal(clamped.raw.images, plain.raw.images)


@pytest.mark.parametrize(
    ("similarity", "words"),
    [
        ({"kind": "low_rank", "rank": 2, "clamp": (0.0, 1.0)}, "set distill.similarity.kind: full"),
        ({"kind": "full", "clamp": (1.0, 0.0)}, r"must be \(low, high\), found \(1.0, 0.0\)"),
    ],
)
def test_an_impossible_clamp_is_refused(similarity, words):
    with pytest.raises(ValueError, match=words):
        run_of(similarity=similarity)


def test_too_few_experts_are_an_error(store):
    run = run_of()
    run = run.model_copy(update={"experts": run.experts.model_copy(update={"num": 5})})
    with pytest.raises(
        ValueError, match=r"asks for 5 experts but the store at .* holds 2 finished ones; train the rest"
    ):
        Matcher(matching_method(run), 0, store, encoder(), CPU)


@pytest.mark.parametrize(("total", "count"), [(7, 2), (10, 1), (3, 3), (5, 9), (2000, 7)])
def test_snapshots_are_even_and_end_with_the_last(total, count):
    kept = snapshot_iterations(total, count)
    assert kept[-1] == total and len(kept) == min(total, count) and kept[0] >= 1
    gaps = [b - a for a, b in zip([0, *kept], kept, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_metrics_of_an_iteration(store, tmp_path):
    seen = []
    distil(run_of(), store, tmp_path, on_step=seen.append)
    assert lines_of(tmp_path) == seen
    for line in seen:
        assert line["loss"] == pytest.approx(line["miss_image"] + line["miss_text"], rel=1e-6)
        assert line["start"] in (0, 1) and line["expert"] in range(EXPERTS) and math.isfinite(line["student_loss"])


NORMALISED = {
    "optimiser": "normalised",
    "lr_image": 0.02,
    "lr_text": 0.03,
    "lr_similarity": 0.01,
    "lr_lr": 0.05,
    "momentum": 0.5,
}


def gradients_of(state, seed, scale=1.0):
    """Return random gradients in float64, with a different magnitude for each tensor."""
    random = torch.Generator().manual_seed(seed)
    sizes = dict(zip(state.raw.tensors(), (1e-6, 1e3, 0.4, 5.0, 1e-2, 70.0, 1.0), strict=False))
    named = {
        n: scale * sizes[n] * torch.randn(t.shape, generator=random, dtype=torch.float64)
        for n, t in state.raw.tensors().items()
    }
    return state.raw.with_tensors(named)


def begin_double(kind="full"):
    return State.begin(first_set(kind).map(torch.Tensor.double))


def normalised_by_hand(start, gradients, lr, momentum, rate):
    """Apply the `normalised` optimiser rule to one tensor, as plain Python floats."""
    values, speed = list(start), [0.0] * len(start)
    for gradient in gradients:
        size = math.sqrt(sum(g * g for g in gradient) / len(gradient))
        speed = [momentum * v + (1 - momentum) * g / size for v, g in zip(speed, gradient, strict=True)]
        values = [x * math.exp(-lr * v) if rate else x - lr * v for x, v in zip(values, speed, strict=True)]
    return values


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["full", "low_rank", "identity"])
def test_normalised_steps_equal_a_slow_version(kind, momentum):
    state = begin = begin_double(kind)
    rule, seen = run_of(similarity={"kind": kind, "rank": 2}, **(NORMALISED | {"momentum": momentum})).distill, []
    for t in range(6):
        seen.append(gradients_of(state, t))
        state = outer_step(state, seen[-1], rule)
    lr = {"images": 0.02, "texts": 0.03, "lr_image": 0.05, "lr_text": 0.05}
    for name, start in begin.raw.tensors().items():
        flat = [g.tensors()[name].flatten().tolist() for g in seen]
        slow = normalised_by_hand(start.flatten().tolist(), flat, lr.get(name, 0.01), momentum, name.startswith("lr_"))
        torch.testing.assert_close(
            state.raw.tensors()[name].flatten(), torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ["images", "texts", "lr_image", "similarity.matrix"])
def test_normalised_steps_do_not_depend_on_the_scale_of_a_gradient(name):
    plain = scaled = begin_double()
    for t in range(5):
        gradient = gradients_of(plain, t)
        larger = gradient.with_tensors(
            {n: g * (1000.0 ** (t - 2) if n == name else 1) for n, g in gradient.tensors().items()}
        )
        plain, scaled = (
            outer_step(s, g, run_of(**NORMALISED).distill) for s, g in ((plain, gradient), (scaled, larger))
        )
    for n, t in plain.raw.tensors().items():
        torch.testing.assert_close(scaled.raw.tensors()[n], t, rtol=1e-12, atol=1e-13)


def test_normalised_keeps_inner_rates_positive_and_ignores_zero_gradients():
    state, rule = State.begin(first_set()), run_of(**(NORMALISED | {"lr_lr": 0.3})).distill
    for _ in range(100):
        pull = {n: torch.full_like(t, 1e6 if n.startswith("lr_") else 0.0) for n, t in state.raw.tensors().items()}
        state = outer_step(state, state.raw.with_tensors(pull), rule)
    assert 0 < state.raw.lr_image < 1e-6 and 0 < state.average.lr_text < 0.1
    assert torch.equal(state.raw.images, first_set().images)


@pytest.mark.parametrize("stop", [1, 4])
def test_normalised_stopped_and_resumed_is_bit_identical(store, tmp_path, unbroken_run, stop):
    run = run_of(**NORMALISED)
    assert not distil(run, store, tmp_path, **stop_after(stop))
    assert distil(run, store, tmp_path)
    assert_same_results(unbroken_run(run), tmp_path)
