"""Check that distribution matching gives the results of a plain loop bit for bit, also with ranks and resumes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import CPU, assert_same_results, lines_of, same_tensors, stop_after
from toy_mdm import ITERATIONS, distil, made, rank, run_of, side_by_side

from rmdd.core.files import read_json
from rmdd.distill.distribution import matching as features
from rmdd.distill.guard import PhaseDiverged
from rmdd.distill.loop import State
from rmdd.distill.sets import load_set
from rmdd.distill.synthetic import zeros_like
from rmdd.methods import matching_method, method_of


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return made(tmp_path_factory.mktemp("mdm"))


@pytest.fixture(scope="module")
def learning(toy):
    return run_of(toy.folder, {"draws": 3}, method="toy_mdm:Learning", guard={"every": 2})


@pytest.fixture(scope="module")
def unbroken(toy, learning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert distil(toy, folder, learning)
    return folder


def test_a_phase_is_the_plain_loop(toy, tmp_path):
    """Compare a phase bit for bit with a loop that clips the mean gradient of two draws and uses torch's SGD."""
    run = run_of(toy.folder, {"draws": 2})
    assert distil(toy, tmp_path, run)
    records, method = read_json(tmp_path / "records.json"), method_of(run)
    assert len(set(records)) == 6
    initial_set = method.initial(0, toy.train, records)
    assert same_tensors(load_set(tmp_path / "start.safetensors").tensors(), initial_set.tensors())
    leaves = {n: t.clone().requires_grad_() for n, t in initial_set.tensors().items()}
    rates = {"images": 3.0, "texts": 2.0, "lr_image": 0.01, "lr_text": 0.01}
    optimiser = torch.optim.SGD([{"params": [leaves[n]], "lr": lr} for n, lr in rates.items()], momentum=0.5)
    objective, losses, norms = rank(toy, run).objective, [], []
    for iteration in range(ITERATIONS):
        now = initial_set.with_tensors({n: t.detach().clone() for n, t in leaves.items()})
        loaded = [objective.gradient(now, iteration, draw) for draw in (0, 1)]
        for n, t in leaves.items():
            t.grad = (loaded[0][0].tensors()[n] + loaded[1][0].tensors()[n]) / 2
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), 0.1)))
        optimiser.step()
        losses.append((loaded[0][1]["loss"] + loaded[1][1]["loss"]) / 2)
    result = load_set(tmp_path / f"set-{ITERATIONS:06d}.safetensors").tensors()
    assert same_tensors(result, {n: t.detach() for n, t in leaves.items()})
    assert not torch.equal(result["images"], initial_set.images) and torch.equal(
        result["lr_image"], initial_set.lr_image
    )
    lines = lines_of(tmp_path)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 0.1 > 0 and {"loss_nce", "loss_agreement", "loss_discrepancy"} <= lines[0].keys()


@pytest.mark.parametrize("limit", [None, 1e9, 0.5])
def test_clipping_is_joint(toy, limit):
    run = run_of(toy.folder)
    method = method_of(run)
    gradient, _ = rank(toy, run).objective.gradient(method.initial(0, toy.train, list(range(6))), 0, 0)
    gradient = gradient.map(lambda t: 100 * t)
    cut, norm = features.clipped(gradient, limit)
    length = sum(float(t.square().sum()) for t in gradient.tensors().values()) ** 0.5
    assert norm.item() == pytest.approx(length, rel=1e-5)
    scale = min(1.0, (limit or float("inf")) / length)
    for name, t in cut.tensors().items():
        torch.testing.assert_close(t, scale * gradient.tensors()[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_stopped_and_resumed_is_bit_identical(toy, learning, unbroken, tmp_path, stop):
    assert not distil(toy, tmp_path, learning, **stop_after(stop))
    assert distil(toy, tmp_path, learning)
    assert_same_results(unbroken, tmp_path)
    assert distil(toy, tmp_path, learning), "distilling a finished phase again does nothing"


class Killed(BaseException):
    """Raised to end the distillation loop without any cleanup, as SIGKILL would."""


@pytest.mark.parametrize("at", [1, 2, 5])
def test_killed_and_resumed_is_bit_identical(toy, learning, unbroken, tmp_path, at):
    def kill(metrics):
        if metrics["iteration"] == at:
            raise Killed

    with pytest.raises(Killed):
        distil(toy, tmp_path, learning, on_step=kill)
    assert distil(toy, tmp_path, learning)
    assert_same_results(unbroken, tmp_path)


def test_learned_tensors_are_saved_and_sets_are_exported(toy, learning, unbroken):
    state = State.load(unbroken / "state.safetensors", "key")
    assert list(state.learned) == ["weight"] and state.learned["weight"] != 1
    loaded = load_set(unbroken / f"set-{ITERATIONS:06d}.safetensors")
    assert torch.equal(loaded.texts, 2 * state.average.texts) and torch.equal(loaded.images, state.average.images)
    start, method = load_set(unbroken / "start.safetensors"), method_of(learning)
    initial_set = method.initial(0, toy.train, read_json(unbroken / "records.json"))
    assert torch.equal(start.texts, 2 * initial_set.texts)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_is_bit_identical(toy, learning, unbroken, tmp_path, size):
    assert distil(toy, tmp_path, learning, side_by_side(toy, learning, size))
    assert_same_results(unbroken, tmp_path)


@pytest.mark.ray
def test_ranks_on_ray_resume_bit_identically(ray_local, toy, learning, unbroken, tmp_path):
    from rmdd.execution.ray.worker_parts import parts_on_actors

    threads, item, tests = torch.get_num_threads(), replace(toy.item, run=learning), str(Path(__file__).parents[2])

    def make(number, size):
        import sys

        sys.path.insert(0, tests)  # workers import the method from `toy_mdm`
        from rmdd.runs.tasks import part_of_phase

        return part_of_phase(item, number, size)

    with parts_on_actors(make, 2, 1.0, threads) as ranks:
        assert not distil(toy, tmp_path, learning, ranks, **stop_after(4))
    with parts_on_actors(make, 2, 1.0, threads) as ranks:
        assert distil(toy, tmp_path, learning, ranks)
    assert_same_results(unbroken, tmp_path)


def spoil(monkeypatch, times):
    """Replace the gradient of iteration 5 by NaN in its first `times` attempts; each causes a rollback."""
    step, tried = features.clipped, []

    def clipped(gradient, limit):
        tried.append(1)
        made, norm = step(gradient, limit)
        return (made.map(lambda t: t * torch.nan), norm) if 0 <= len(tried) - 6 < times else (made, norm)

    monkeypatch.setattr(features, "clipped", clipped)


def test_a_rollback_restores_the_learned_tensors(toy, learning, tmp_path, monkeypatch):
    spoil(monkeypatch, 1)
    assert distil(toy, tmp_path / "found", learning)
    (line,) = [json.loads(x) for x in (tmp_path / "found" / "rollbacks.jsonl").read_text().splitlines()]
    assert (line["to"], line["halvings"]) == (4, 1)
    assert "phase 0, iteration 6: a loss, gradient or tensor stopped being finite" in line["why"]
    assert [m["rollbacks"] for m in lines_of(tmp_path / "found")] == [0] * 4 + [1] * 3
    monkeypatch.undo()

    assert not distil(toy, tmp_path / "slow", learning, **stop_after(4))
    good = State.load(tmp_path / "slow" / "good.safetensors", "key")
    assert good.iteration == 4 and good.learned["weight"] != 1
    good.halvings = 1
    good.save(tmp_path / "slow" / "state.safetensors", "key")
    assert distil(toy, tmp_path / "slow", learning)
    loaded, slow = (State.load(tmp_path / f / "state.safetensors", "key") for f in ("found", "slow"))
    assert same_tensors(loaded.raw.tensors(), slow.raw.tensors()) and same_tensors(loaded.learned, slow.learned)


def test_a_phase_that_always_diverges_ends_with_advice(toy, tmp_path, monkeypatch):
    spoil(monkeypatch, 99)
    with pytest.raises(PhaseDiverged, match=r"1 rollbacks with halved learning rates did not help.*lower ones"):
        distil(toy, tmp_path, run_of(toy.folder, guard={"retries": 1, "every": 2}))


def test_a_method_of_another_family_is_refused(toy):
    with pytest.raises(ValueError, match="method mdm does not match trajectories; choose one that does"):
        matching_method(toy.run)


def test_the_mean_of_one_draw_is_that_draw(toy):
    initial_set = method_of(toy.run).initial(0, toy.train, list(range(6)))
    assert same_tensors(features.mean([(initial_set, {"loss": 2.0})])[0].tensors(), initial_set.tensors())
    both, parts = features.mean([(initial_set, {"loss": 2.0}), (zeros_like(initial_set), {"loss": 1.0})])
    assert parts == {"loss": 1.5} and torch.equal(both.images, initial_set.images.to(CPU) / 2)
