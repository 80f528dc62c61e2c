"""The distribution-matching loop: the plain loop's bits, whoever makes the draws and however often it is stopped."""

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
def whole(toy, learning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert distil(toy, folder, learning)
    return folder


def test_a_phase_is_the_plain_loop(toy, tmp_path):
    """torch's own clipping and SGD on the mean of two draws: the same bits."""
    run = run_of(toy.folder, {"draws": 2})
    assert distil(toy, tmp_path, run)
    records, method = read_json(tmp_path / "records.json"), method_of(run)
    assert len(set(records)) == 6
    begun = method.initial(0, toy.train, records)
    assert same_tensors(load_set(tmp_path / "start.safetensors").tensors(), begun.tensors())
    leaves = {n: t.clone().requires_grad_() for n, t in begun.tensors().items()}
    rates = {"images": 3.0, "texts": 2.0, "lr_image": 0.01, "lr_text": 0.01}
    optimiser = torch.optim.SGD([{"params": [leaves[n]], "lr": lr} for n, lr in rates.items()], momentum=0.5)
    objective, losses, norms = rank(toy, run).objective, [], []
    for iteration in range(ITERATIONS):
        now = begun.with_tensors({n: t.detach().clone() for n, t in leaves.items()})
        found = [objective.gradient(now, iteration, draw) for draw in (0, 1)]
        for n, t in leaves.items():
            t.grad = (found[0][0].tensors()[n] + found[1][0].tensors()[n]) / 2
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), 0.1)))
        optimiser.step()
        losses.append((found[0][1]["loss"] + found[1][1]["loss"]) / 2)
    result = load_set(tmp_path / f"set-{ITERATIONS:06d}.safetensors").tensors()
    assert same_tensors(result, {n: t.detach() for n, t in leaves.items()})
    assert not torch.equal(result["images"], begun.images) and torch.equal(result["lr_image"], begun.lr_image)
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
def test_stopped_and_resumed_has_the_bits_of_unbroken(toy, learning, whole, tmp_path, stop):
    assert not distil(toy, tmp_path, learning, **stop_after(stop))
    assert distil(toy, tmp_path, learning)
    assert_same_results(whole, tmp_path)
    assert distil(toy, tmp_path, learning), "a finished phase is left alone"


class Killed(BaseException):
    """Ends the loop without a chance to tidy up."""


@pytest.mark.parametrize("at", [1, 2, 5])
def test_killed_and_resumed_has_the_bits_of_unbroken(toy, learning, whole, tmp_path, at):
    def kill(metrics):
        if metrics["iteration"] == at:
            raise Killed

    with pytest.raises(Killed):
        distil(toy, tmp_path, learning, on_step=kill)
    assert distil(toy, tmp_path, learning)
    assert_same_results(whole, tmp_path)


def test_what_is_learned_beside_the_set_is_kept_and_sets_are_exported(toy, learning, whole):
    state = State.load(whole / "state.safetensors", "key")
    assert list(state.learned) == ["weight"] and state.learned["weight"] != 1
    found = load_set(whole / f"set-{ITERATIONS:06d}.safetensors")
    assert torch.equal(found.texts, 2 * state.average.texts) and torch.equal(found.images, state.average.images)
    start, method = load_set(whole / "start.safetensors"), method_of(learning)
    begun = method.initial(0, toy.train, read_json(whole / "records.json"))
    assert torch.equal(start.texts, 2 * begun.texts)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(toy, learning, whole, tmp_path, size):
    assert distil(toy, tmp_path, learning, side_by_side(toy, learning, size))
    assert_same_results(whole, tmp_path)


@pytest.mark.ray
def test_ranks_on_ray_give_the_same_bits_stopped_and_resumed(ray_local, toy, learning, whole, tmp_path):
    from rmdd.execution.ray.worker_parts import parts_on_actors

    threads, item, tests = torch.get_num_threads(), replace(toy.item, run=learning), str(Path(__file__).parents[2])

    def make(number, size):
        import sys

        sys.path.insert(0, tests)  # where the method is
        from rmdd.runs.tasks import part_of_phase

        return part_of_phase(item, number, size)

    with parts_on_actors(make, 2, 1.0, threads) as ranks:
        assert not distil(toy, tmp_path, learning, ranks, **stop_after(4))
    with parts_on_actors(make, 2, 1.0, threads) as ranks:
        assert distil(toy, tmp_path, learning, ranks)
    assert_same_results(whole, tmp_path)


def spoil(monkeypatch, times):
    """No number in the gradient of iteration 5, until the rates were halved so many times."""
    step, tried = features.clipped, []

    def clipped(gradient, limit):
        tried.append(1)
        made, norm = step(gradient, limit)
        return (made.map(lambda t: t * torch.nan), norm) if 0 <= len(tried) - 6 < times else (made, norm)

    monkeypatch.setattr(features, "clipped", clipped)


def test_a_derailed_phase_goes_back_with_what_was_learned(toy, learning, tmp_path, monkeypatch):
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
    found, slow = (State.load(tmp_path / f / "state.safetensors", "key") for f in ("found", "slow"))
    assert same_tensors(found.raw.tensors(), slow.raw.tensors()) and same_tensors(found.learned, slow.learned)


def test_a_phase_that_always_derails_ends_with_what_to_do(toy, tmp_path, monkeypatch):
    spoil(monkeypatch, 99)
    with pytest.raises(PhaseDiverged, match=r"1 rollbacks with halved rates did not help.*lower rates"):
        distil(toy, tmp_path, run_of(toy.folder, guard={"retries": 1, "every": 2}))


def test_a_method_of_another_family_is_refused(toy):
    with pytest.raises(ValueError, match="method mdm does not match trajectories; choose one that does"):
        matching_method(toy.run)


def test_the_mean_of_one_draw_is_that_draw(toy):
    begun = method_of(toy.run).initial(0, toy.train, list(range(6)))
    assert same_tensors(features.mean([(begun, {"loss": 2.0})])[0].tensors(), begun.tensors())
    both, told = features.mean([(begun, {"loss": 2.0}), (zeros_like(begun), {"loss": 1.0})])
    assert told == {"loss": 1.5} and torch.equal(both.images, begun.images.to(CPU) / 2)
