"""Differences between families of methods: cost estimates, rejected settings, lost workers, and report pages."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from toy import assert_same_results, lines_of
from toy_mdm import TINY, run_of

from rmdd import config
from rmdd.cli import console
from rmdd.core.progress import Progress
from rmdd.execution.backend import Backend
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.parts import LocalParts, PartLost
from rmdd.execution.tasks import Hooks
from rmdd.methods import method_of
from rmdd.methods.distribution import Effort
from rmdd.pipeline import Pipeline
from rmdd.runs import cost as estimate
from rmdd.runs.preflight import examine, problems_of
from rmdd.runs.tasks import DistillPhase

COUNTS = {"train": (24, 120), "val": (6, 30), "test": (6, 30)}
OTHERS = {
    "ncfm": {"clusters": 3, "subset": 2, "real_batch": 16, "network": True, "calibration_batch": 4, "chunk": 4},
    "covmatch": {"real_batch": 16, "chunk": 4},
}


def of_method(method, folder="absent", **distill):
    rule = {"method": method, "similarity": {"kind": "identity"}, "options": OTHERS.get(method, {})}
    raw = {**TINY, "distill": {**TINY["distill"], **rule, **distill}}
    return config.load({**raw, "runtime": {"storage": str(folder), "ray": "off", "track": "none"}})


@pytest.mark.parametrize(
    ("method", "options", "effort"),
    [
        ("mdm", {"draws": 3, "real_batch": 8, "synthetic_batch": 4}, Effort(24, 12, 4, models=5)),
        ("mdm", {"real_batch": 999}, Effort(120, 6, 6, models=5)),
        # NCFM embeds 16 real and 2 distilled pairs for each of 2 clusters, 4 pairs for InfoNCE, 4 for the next step
        ("ncfm", OTHERS["ncfm"], Effort(2 * 16 + 4, 8, 4, models=5)),
        ("covmatch", OTHERS["covmatch"], Effort(16 + 6, 6, 16, trained=16, models=4)),
    ],
)
def test_the_effort_of_a_step(method, options, effort):
    assert estimate.effort_of(of_method(method, options=options), 0, 120) == effort


@pytest.mark.parametrize("method", ["mdm", "ncfm", "covmatch"])
def test_a_run_that_matches_distributions_is_estimated_as_such(method, tmp_path, capsys):
    run = of_method(method, tmp_path)
    facts = examine(run)
    work = estimate.work_of(estimate.model_on_meta(run, 16), run, 16)
    assert work.matching == 0 and work.forward < work.gradient < work.training + work.forward
    e = estimate.effort_of(run, 0, 120)
    step = e.forward * work.forward + e.back * work.gradient + e.trained * work.training
    assert facts["time"]["operations"]["distill"] == 7 * step
    size = estimate.size_of(estimate.model_on_meta(run, 16), pretrained=False)
    least = 4 * (e.models * size.trained + 4 * 6 * (3 * 8 * 8 + 16)) + e.at_once * work.pair_graph_bytes
    assert list(facts["memory"]) == ["step"] and least < facts["memory"]["step"] < 2 * least
    assert facts["phases"] == [{"pairs": 6, "iterations": 7, "done": False}]
    assert facts["model"]["double_backward"] == "not needed"
    console.stdout().print(console.plan(facts))
    shown = capsys.readouterr().out
    assert "endpoint" not in shown.replace("endpoints", "") and "starts" not in shown.replace("starts every", "")


def test_a_generative_run_is_estimated_without_steps(tmp_path, capsys):
    phases = [{"pairs": 6, "iterations": 1}]
    run = of_method("pds", tmp_path, phases=phases, snapshots=1, options={"features": "expert:0", "decode": "nearest"})
    facts = examine(run)
    assert facts["memory"] == {} and facts["time"]["operations"]["distill"] == 0
    assert facts["disk"]["phases"] == 4 * 2 * 6 * (3 * 8 * 8 + 16), "the starting set and the final set"
    assert any("image generation with pretrained models are not counted" in remark for remark in facts["remarks"])
    console.stdout().print(console.plan(facts))
    assert "endpoint" not in capsys.readouterr().out


def test_a_tower_without_a_second_derivative_works_with_mdm_only():
    tower = {"name": "test_mambaout", "weights": "random:0", "projection": "linear"}
    matched, other = (
        config.load(
            {
                **TINY,
                "data": {**TINY["data"], "image_size": 32},
                "model": {**TINY["model"], "image": tower},
                "distill": {**TINY["distill"], "method": method, "options": {}, "similarity": {"kind": "identity"}}
                | ({"batch": 4, "phases": [{"pairs": 6, "endpoint": 3}]} if method == "lors" else {}),
            }
        )
        for method in ("lors", "mdm")
    )
    from rmdd.models import image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "double_backward", lambda name: image.Support.NO)
        assert any("no second derivative" in message for message in problems_of(matched))
        assert not problems_of(other)


@pytest.mark.parametrize(
    ("method", "distill", "words"),
    [
        ("mdm", {"init": "prototypes"}, "distill.init: prototypes is not available for mdm"),
        ("ncfm", {"init": "prototypes"}, "distill.init: prototypes is not available for ncfm"),
        ("mdm", {"path_start": "student"}, "mdm matches no paths of experts; set distill.path_start: theta_0"),
        ("ncfm", {"precision": "bfloat16"}, "set distill.precision: float32"),
        ("covmatch", {"precision": "bfloat16"}, "set distill.precision: float32"),
        (
            "pds",
            {"init": "noise", "phases": [{"pairs": 6, "iterations": 1}]},
            "distill.init has no effect with method pds",
        ),
        (
            "pds",
            {"stored_size": 4, "phases": [{"pairs": 6, "iterations": 1}]},
            "distill.stored_size has no effect with method pds",
        ),
    ],
)
def test_settings_that_a_method_does_not_support_are_rejected(method, distill, words):
    with pytest.raises(config.ConfigError, match=words):
        of_method(method, **distill)


def test_a_mixture_needs_two_checkpoints():
    single_expert = {"num": 1, "keep": "endpoints"}
    with pytest.raises(config.ConfigError, match="merges two expert checkpoints, but the store would hold one"):
        config.load({**TINY, "experts": {**TINY["experts"], **single_expert}})
    config.load({**TINY, "experts": {**TINY["experts"], "num": 1}})


def test_fields_without_effect_are_reported_and_trajectory_checks_are_skipped(tmp_path):
    run = of_method("covmatch", tmp_path, steps=3, trajectory="original", inner_dropout="fresh_mask")
    assert method_of(run).idle() == ["trajectory", "steps", "inner_dropout"]
    assert "no effect with method covmatch: distill.trajectory, steps, inner_dropout" in examine(run)["remarks"]
    raw = run.model_dump(mode="json")
    raw["experts"]["keep"], raw["runtime"]["keep_parameters"] = "endpoints", "recompute"
    config.load(raw)
    lors = of_method("lors", batch=2, steps=3, phases=[{"pairs": 6, "endpoint": 3}], options={})
    assert method_of(lors).idle() == []


def test_the_pace_counts_the_pairs_of_a_step(tmp_path):
    pipeline = Pipeline(run_of(tmp_path), Backend(SequentialExecutor(1)), Progress(quiet=True))
    pipeline.experts()
    reports = []
    assert DistillPhase()(pipeline.item(), Hooks(reports.append))
    seconds = [line["seconds"] for line in lines_of(pipeline.item().paths.phase(0))]
    assert [r["pairs/s"] for r in reports if "pairs/s" in r] == pytest.approx([12 / s for s in seconds if s])


def test_lost_workers_are_restarted_and_the_phase_resumes(tmp_path):
    opened, messages = [], []

    class Fragile(LocalParts):
        def call(self, method, *arguments):
            if method == "gradient" and arguments[1] == 5 and len(opened) < 3:
                raise PartLost("a worker died")
            return super().call(method, *arguments)

    @contextlib.contextmanager
    def fragile(make, size=None, most=None, accelerated=False):
        opened.append((most, accelerated))
        yield Fragile([make(rank, 2) for rank in range(2)])

    run = run_of(tmp_path, {"draws": 2})
    quiet = Progress(quiet=True)
    quiet.say = messages.append
    (folder,) = Pipeline(run, Backend(SequentialExecutor(1), open_parts=fragile), quiet).distill()
    assert opened == [(2, True)] * 3
    assert sum("a worker died; all workers start again from the last checkpoint" in line for line in messages) == 2
    shutil.move(folder, tmp_path / "resumed")
    (uninterrupted,) = Pipeline(run, Backend(SequentialExecutor(1)), Progress(quiet=True)).distill()
    assert_same_results(uninterrupted, tmp_path / "resumed")
    shutil.rmtree(uninterrupted)
    opened.clear()
    limited = run.model_copy(update={"runtime": run.runtime.model_copy(update={"max_restarts": 1})})
    with pytest.raises(PartLost):
        Pipeline(limited, Backend(SequentialExecutor(1), open_parts=fragile), quiet).distill()
    assert len(opened) == 2


def test_a_weighted_sum_of_one_expert_is_anchored_at_its_start(tmp_path):
    from toy_mdm import made, model_of

    from rmdd.distill.distribution import merging
    from rmdd.methods.mdm import MDM, Teacher

    toy = made(tmp_path)
    run = run_of(tmp_path, {"teacher": "naive", "partners": "same_expert"})
    model = model_of(run, toy.train)
    merged = []
    interpolated = merging.interpolated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "interpolated", lambda a, b, s: merged.append((a, b)) or interpolated(a, b, s))
        teacher = Teacher(MDM(run), 0, toy.store, model, torch.device("cpu"))
        for iteration in range(8):
            teacher.load_draw(iteration, 0)
    cells = {e: [toy.store.read(e, n) for n in range(4)] for e in (0, 1)}
    same = SimpleNamespace(of=lambda a, b: all(torch.equal(a[n], b[n]) for n in a))
    owners = [{e for e, saved in cells.items() if any(same.of(b, p) for p in saved[1:])} for _, b in merged]
    assert set().union(*owners) == {0, 1}
    assert all(same.of(a, cells[e][0]) for (a, _), owner in zip(merged, owners, strict=True) for e in owner)


def test_the_page_and_the_table_of_a_distribution_method_mention_no_trajectories(tmp_path):
    from rmdd.comparisons.compare import rate

    run = run_of(tmp_path)
    page = Pipeline(run, Backend(SequentialExecutor(1)), Progress(quiet=True)).report().read_text(encoding="utf-8")
    assert "expert paths" not in page and "Learned rates" not in page and "inner steps" not in page
    assert "Matched for" in page and "gradient norm" in page and "loss terms" in page
    row = {"rates": "learned", "kind": "set"}
    assert (rate(row | {"method": "mdm"}), rate(row | {"method": "lors"})) == ("fixed", "learned")
