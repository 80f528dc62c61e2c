"""Chained phases of the toy problem: paths from students to expert epochs, segments, rollbacks and kills."""

import numpy as np
import pytest
import torch
from toy import CPU, EPOCHS, PAIRS, assert_same_results, distil, encoder, made, run_of, store_of

from rmdd import config
from rmdd.distill.chain import iterations_of_earlier_phases, path_start_file, segment_ends, write_path_start
from rmdd.distill.guard import PhaseDiverged
from rmdd.distill.loop import State
from rmdd.distill.sets import load_set
from rmdd.distill.trajectory.matching import Matcher
from rmdd.methods import matching_method
from rmdd.methods.ptm_st import PTMST

PHASE = config.Phase(pairs=PAIRS, start=0, stop=2, endpoint=EPOCHS, iterations=7)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("store") / "store", encoder().trained())


def chained(phases=2, lag=3, **distill):
    return run_of(phases=(PHASE,) * phases, path_start="student", path_lag=lag, **distill)


def student(expert, iterations, dtype=torch.float32):
    """Return parameters that stand for a trained student: they differ by expert and by the sets it trained on."""
    random = torch.Generator().manual_seed(17 * expert + sum(iterations))
    return {n: (p + 0.1 * torch.randn(p.shape, generator=random)).to(dtype) for n, p in encoder().trained().items()}


def write_starts(folder, run, phase, dtype=torch.float32):
    """Write the students from which the paths of `phase` start, for every expert and segment."""
    for iteration in range(run.distill.phases[phase].iterations):
        for expert in range(run.experts.num):
            iterations = iterations_of_earlier_phases(run.distill, phase, iteration)
            write_path_start(path_start_file(folder, expert, iterations), student(expert, iterations, dtype))
    return folder


def test_the_ends_of_a_chained_path_are_the_student_and_the_experts_epoch(store, tmp_path):
    run = chained()
    write_starts(tmp_path, run, 1, torch.float64)
    double = made(run, store)
    matcher = Matcher(matching_method(run), 1, double.store, double.model, CPU, tmp_path)
    for iteration, expert in ((0, 0), (0, 1), (4, 1), (6, 0)):
        matcher.use_path_starts(iteration)
        start = student(expert, iterations_of_earlier_phases(run.distill, 1, iteration), torch.float64)
        path, end = matcher.path(expert), double.store.read(expert, EPOCHS)
        for name, steps in store.norms(expert).items():
            for epoch in range(EPOCHS + 1):
                share = np.sum(steps[:epoch], dtype=np.float64) / np.sum(steps[:EPOCHS], dtype=np.float64)
                expected = start[name].double() + share * (end[name] - start[name].double())
                torch.testing.assert_close(path.at(epoch)[name].double(), expected, rtol=0, atol=1e-12)
            assert torch.equal(path.at(0)[name].double(), start[name].double())
            assert torch.equal(path.at(EPOCHS)[name], end[name])


def test_the_first_phase_and_a_single_phase_start_at_theta_0_with_the_bits_of_before(store, tmp_path):
    distil(run_of(phases=(PHASE, PHASE)), store, tmp_path / "theta_0")
    distil(run_of(phases=(PHASE,), path_start="student"), store, tmp_path / "single")
    distil(chained(lag=None), store, tmp_path / "first")
    for name in ("single", "first"):
        assert_same_results(tmp_path / name, tmp_path / "theta_0")


def test_a_phase_in_segments_has_the_bits_of_a_phase_in_one_go(store, tmp_path):
    run = chained()
    whole, cut = (write_starts(tmp_path / name, run, 1) for name in ("whole", "cut"))
    assert distil(run, store, whole, phase=1)
    for end in segment_ends(run.distill, 1):
        assert distil(run, store, cut, phase=1, until=end)
        assert State.load(cut / "state.safetensors", "key").iteration == end
        (cut / f"set-{end:06d}.safetensors").unlink()
        assert distil(run, store, cut, phase=1, until=end), "a lost set at the end of a segment is written again"
    assert_same_results(cut, whole)


def test_new_path_starts_change_the_updates_that_use_them_and_no_earlier_ones(store, tmp_path):
    run = chained()
    one, other = (write_starts(tmp_path / name, run, 1) for name in ("one", "other"))
    for expert in range(run.experts.num):
        moved = {n: p + 1 for n, p in student(expert, (6,)).items()}
        write_path_start(path_start_file(other, expert, (6,)), moved)
    for folder in (one, other):
        distil(run, store, folder, phase=1)
    files = [[folder / f"set-{i:06d}.safetensors" for i in (3, 6)] for folder in (one, other)]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert not torch.equal(load_set(files[0][1]).images, load_set(files[1][1]).images)


@pytest.mark.parametrize("at", range(1, 7))
def test_killed_at_any_update_and_resumed_is_bit_identical(store, tmp_path, at):
    run = chained(guard={"every": 2})
    whole, cut = (write_starts(tmp_path / name, run, 1) for name in ("whole", "cut"))
    distil(run, store, whole, phase=1)

    def kill(metrics):
        if metrics["iteration"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(run, store, cut, phase=1, on_step=kill)
    assert distil(run, store, cut, phase=1)
    assert_same_results(cut, whole)


def test_a_rollback_keeps_the_sets_that_other_phases_have_used(store, tmp_path):
    run = chained(guard={"every": 100, "retries": 1, "max_rate_growth": 1.0000001}, lr_lr=0.0)
    distil(run, store, tmp_path, until=3)
    kept = (tmp_path / "set-000003.safetensors").read_bytes()
    with pytest.raises(PhaseDiverged, match="rollback"):
        diverging = run.model_copy(update={"distill": run.distill.model_copy(update={"lr_lr": 1.0})})
        distil(diverging, store, tmp_path)
    assert State.load(tmp_path / "good.safetensors", "key").iteration == 3
    assert (tmp_path / "set-000003.safetensors").read_bytes() == kept


def test_a_damaged_or_missing_path_start_is_refused(store, tmp_path):
    run = chained()
    file = path_start_file(write_starts(tmp_path, run, 1), 0, (3,))
    file.write_bytes(file.read_bytes()[:-8])
    matcher = Matcher(matching_method(run), 1, store, encoder(), CPU, tmp_path)
    with pytest.raises(ValueError, match=r"path start .* is damaged .*; delete it"):
        matcher.path(0)
    file.unlink()
    with pytest.raises(ValueError, match=r"path start .* is missing; run again"):
        matcher.path(0)


def test_a_method_whose_paths_cannot_be_chained_needs_no_path_start(store):
    class Own(PTMST):
        def path(self, store, expert, phase):
            return super().path(store, expert, phase)

    path = Matcher(Own(run_of()), 0, store, encoder(), CPU).path(0)
    assert all(torch.equal(t, store.read(0, 0)[name]) for name, t in path.at(0).items())
    for rule in (chained().distill, config.Distill(phases="auto")):
        for method, clashes in ((PTMST, 0), (Own, 1)):
            mistakes = method.clashes_of_family(rule, config.Experts(keep="all"), config.Runtime())
            assert sum("cannot chain phases" in mistake for mistake in mistakes) == clashes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectory": "original"}, "set distill.trajectory: shortcut"),
        ({"phases": "adaptive"}, "do not set distill.phases: adaptive"),
        ({"path_start": "theta_0", "path_lag": 5}, "set distill.path_start: student"),
    ],
)
def test_settings_that_do_not_fit_a_chain_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config.load({"experts": {"keep": "all"}, "distill": {"path_start": "student", **changes}})
