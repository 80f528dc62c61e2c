"""Tests of the evaluation protocol: jobs, choices on val, the closed test split, and students that diverge."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from rmdd import config
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.distill.synthetic import Synthetic
from rmdd.evaluate import protocol
from rmdd.evaluate.examples import captions_of_examples
from rmdd.evaluate.protocol import (
    Job,
    StudentProtocol,
    TestIsClosed,
    best_by_val,
    check_split_is_open,
    pairs_of_subset,
    random_pairs,
    score_expert,
    selection_jobs,
    summary,
    train_and_score,
    tuning_jobs,
)
from rmdd.models.dual import build
from rmdd.models.prepared import PreparedSplit
from rmdd.runs.items import TaskItem
from rmdd.runs.items import prepared_split as prepared_of
from rmdd.runs.paths import RunPaths

SIZE, TEXT_WIDTH, CAPTIONS = 8, 6, 2
CPU = torch.device("cpu")


def prepared_split(seed=0, images=11):
    """Return a split of random images and caption embeddings that is held in memory."""
    random = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(images), CAPTIONS)
    pictures = random.integers(0, 256, (images, 3, SIZE, SIZE)).astype(np.uint8)
    texts = random.standard_normal((len(image_of), TEXT_WIDTH)).astype(np.float32)
    names = [str(i) for i in range(images)]
    captions = [f"caption {i}" for i in range(len(image_of))]
    split = Split("s", pictures, captions, image_of, names, {}, Dataset(Path(), {}), np.arange(images), Path())
    return PreparedSplit(split, texts, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Poisoned(PreparedSplit):
    """A split that raises an error as soon as its data are read."""

    def __getattribute__(self, name):
        if name in ("split", "texts", "mean", "std"):
            raise AssertionError(f"`{name}` of the forbidden split was read")
        return super().__getattribute__(name)


POISON = object.__new__(Poisoned)
TRAIN, VAL, TEST = prepared_split(0, 20), prepared_split(1), prepared_split(2)


def run_of(**evaluate):
    image = config.ImageTower(name="convnet", weights="random", widths=(4,), groups=2, projection="linear")
    rule = {"epochs": 5, "eval_every": 2, "batch": 4, "students": 2}
    return config.Run(
        seed=5,
        data=config.Data(image_size=SIZE),
        model=config.Model(image=image, text=config.TextTower(name="hashing"), width=6, dropout=0.1, temperature=0.3),
        distill=config.Distill(budget=7, phases=(config.Phase(pairs=20),)),
        evaluate=config.Evaluate(**{**rule, **evaluate}),
    )


def train_job(job, run, *args, **kwargs):
    return train_and_score(job, StudentProtocol.of(run), *args, **kwargs)


def random_of(run, *args):
    return random_pairs(StudentProtocol.of(run), *args)


def training_pairs(run, number=2, lr=0.05):
    return [random_of(run, TRAIN, draw, lr) for draw in range(number)]


@pytest.fixture
def scored(monkeypatch):
    """Fixture: a list to which every scoring adds the name of the scored split, val or test."""
    splits = []

    def counted(name):
        original = getattr(protocol, name)

        def count(model, prepared, device, chunk=256):
            splits.append({id(VAL): "val", id(TEST): "test"}[id(prepared)])
            return original(model, prepared, device, chunk)

        monkeypatch.setattr(protocol, name, count)

    counted("score")
    counted("embedded")
    return splits


def test_a_poisoned_split_cannot_be_scored():
    with pytest.raises(AssertionError, match="was read"):
        protocol.score(build(run_of().model, TEXT_WIDTH, SIZE, 0, "x"), POISON, CPU)


def test_training_pairs_equal_the_distilled_subset():
    left_factor, right_factor, scale = torch.randn(4, 2), torch.randn(4, 2), torch.rand(4)
    images, texts = torch.randn(4, 3, SIZE, SIZE), torch.randn(4, TEXT_WIDTH)
    rates = {"lr_image": torch.tensor(0.25), "lr_text": torch.tensor(0.5)}
    learned = {"scale": scale, "left": left_factor, "right": right_factor}
    pairs = pairs_of_subset(Synthetic(images, texts, **rates, similarity=learned, alpha=3.0), SIZE)
    assert pairs.images is images and pairs.texts is texts
    assert (pairs.lr_image, pairs.lr_text) == (0.25, 0.5) and type(pairs.lr_image) is float
    torch.testing.assert_close(pairs.similarity, torch.diag(scale) + 3.0 / 2 * left_factor @ right_factor.T)
    assert torch.equal(pairs_of_subset(Synthetic(images, texts, **rates), SIZE).similarity, torch.eye(4))


def records_of(pairs):
    """Return the indices of the captions of TRAIN from which `pairs` were made."""
    return [int(np.flatnonzero((TRAIN.texts == row).all(1)).item()) for row in pairs.texts.numpy()]


def test_random_pairs_are_real_records_at_the_budget():
    run = run_of()
    pairs = random_of(run, TRAIN, 0, 0.3)
    records = records_of(pairs)
    assert len(set(records)) == run.distill.budget == 7
    pictures = torch.from_numpy(TRAIN.split.images[TRAIN.split.image_of[records]])
    assert torch.equal(pairs.images, normalise(pictures, TRAIN.mean, TRAIN.std))
    assert torch.equal(pairs.similarity, torch.eye(7)) and (pairs.lr_image, pairs.lr_text) == (0.3, 0.3)


def test_random_pairs_depend_only_on_the_evaluation_seed_and_the_draw():
    records = records_of(random_of(run_of(), TRAIN, 0, 0.3))
    torch.manual_seed(9)
    assert records_of(random_of(run_of(), TRAIN, 0, 1.0)) == records, "the learning rate must not change the draw"
    other = run_of().model_copy(update={"distill": config.Distill(budget=7, phases=(config.Phase(pairs=20),), seed=8)})
    assert records_of(random_of(other, TRAIN, 0, 0.3)) == records
    assert records_of(random_of(run_of(seed=5), TRAIN, 0, 0.3)) == records
    assert records_of(random_of(run_of(seed=6), TRAIN, 0, 0.3)) != records
    assert records_of(random_of(run_of(), TRAIN, 1, 0.3)) != records


def test_a_budget_larger_than_the_data_takes_all_pairs():
    few = prepared_split(3, 2)
    assert len(random_of(run_of(), few, 0, 0.3).images) == 2 * CAPTIONS


def test_jobs_cover_every_choice_once():
    run = run_of(selection_students=3, baseline_draws=2, baseline_lrs=(0.1, 0.2), baseline_losses=("wbce", "infonce"))
    select, tune = selection_jobs(run.evaluate, 4), tuning_jobs(run.evaluate)
    assert [(j.snapshot, j.index) for j in select] == [(s, i) for s in range(4) for i in range(3)]
    expected = [(loss, lr, i) for loss in ("wbce", "infonce") for lr in (0.1, 0.2) for i in range(2)]
    assert [(j.loss, j.lr, j.index) for j in tune] == expected, "each draw must be tried only once"
    names = [j.name for j in select + tune + [Job(k, i) for k in ("student", "reference", "full") for i in range(3)]]
    assert len(set(names)) == len(names) and "tune-wbce-0.1-001" in names and "select-03-002" in names


def test_the_best_on_val_is_the_first_of_equals():
    rows = [("a", 10.0), ("b", 30.0), ("a", 20.0), ("c", 20.0), ("b", 10.0), ("c", 20.0), ("d", 0.0)]
    best, means = best_by_val([(choice, {"val": {"R@mean": value}}) for choice, value in rows])
    assert best == "b" and means == {"a": 15.0, "b": 20.0, "c": 20.0, "d": 0.0}


def test_the_summary_is_a_mean_and_a_sample_deviation():
    rows = [{"val": {"IR@1": v, "R@mean": 2 * v}} for v in (1.0, 2.0, 6.0)]
    table = summary(rows, "val")
    assert table["IR@1"] == {"mean": 3.0, "std": pytest.approx(np.std([1, 2, 6], ddof=1)), "n": 3}
    assert table["R@mean"]["mean"] == 6.0
    alone = summary(rows[:1], "val")["IR@1"]
    assert alone == {"mean": 1.0, "std": None, "n": 1}


@pytest.mark.parametrize("kind", ["select", "tune", "soft_tune"])
def test_jobs_for_a_selection_cannot_open_test(kind):
    run, job = run_of(), Job(kind, 0, snapshot=0, loss="infonce", lr=0.05)
    with pytest.raises(TestIsClosed, match=f"{kind}.* chooses a snapshot or setting, .* must not read test"):
        train_job(job, run, training_pairs(run), VAL, POISON, CPU)
    with pytest.raises(TestIsClosed, match="must not read test; score it on val"):
        prepared_of(TaskItem(run, RunPaths(*[Path()] * 6), "value", job=job), "test")
    assert check_split_is_open(job, "val") == "val" and check_split_is_open(Job("student", 0), "test") == "test"


def test_a_selection_rejects_records_with_test_scores():
    rows = [("a", {"val": {"R@mean": 1.0}}), ("b", {"val": {"R@mean": 0.0}, "test_last": {"R@mean": 9.0}})]
    with pytest.raises(TestIsClosed, match="cannot choose by test_last of b; choose by val scores only"):
        best_by_val(rows)


@pytest.mark.parametrize("kind", ["select", "tune", "soft_tune"])
def test_jobs_for_a_selection_are_scored_on_val_only(kind):
    run = run_of()
    record = train_and_score(
        Job(kind, 0, snapshot=0, loss="infonce", lr=0.05), StudentProtocol.of(run), training_pairs(run), VAL, None, CPU
    )
    assert set(record) == {"job", "curve", "val"} and record["curve"] == []


def test_a_student_has_its_curve_on_val_and_reads_test_once(scored):
    run = run_of()
    record = train_job(Job("student", 1), run, training_pairs(run), VAL, TEST, CPU)
    points = [(p["subset"], p["passes"]) for p in record["curve"]]
    assert points == [(0, 2), (0, 4), (1, 2), (1, 4), (1, 5)] and all(a < b for a, b in pairwise(points))
    assert all(set(point) == {"subset", "passes", "val"} for point in record["curve"])
    assert set(record) == {"job", "curve", "val", "test_last"} and record["job"] == "student-001"
    assert scored.count("test") == 1 and scored[-1] == "test", "test must be scored last"
    assert record["val"] == record["curve"][-1]["val"]


def test_a_baseline_reads_val_and_test_once(scored):
    run = run_of()
    record = train_and_score(
        Job("baseline", 0, loss="wbce", lr=0.05), StudentProtocol.of(run), training_pairs(run, 1), VAL, TEST, CPU
    )
    assert scored == ["val", "test"] and set(record) == {"job", "curve", "val", "test_last", "test_examples"}


def test_the_reference_score_is_the_best_on_test(scored):
    run = run_of()
    record = train_job(Job("reference", 0), run, training_pairs(run), POISON, TEST, CPU)
    assert set(record) == {"job", "curve", "test_best_reference"}
    assert [(p["subset"], p["passes"]) for p in record["curve"]] == [(s, 1 + 10 * i) for s in (0, 1) for i in range(11)]
    assert scored == ["test"] * 22
    best = max(point["test"]["R@mean"] for point in record["curve"])
    assert record["test_best_reference"]["R@mean"] == best


def test_the_full_data_bound_reads_val_and_test_once(scored):
    run = run_of()
    model = build(run.model, TEXT_WIDTH, SIZE, 0, "expert", 3)
    record = score_expert(Job("full", 3), model, VAL, TEST, CPU, run.evaluate.chunk)
    assert scored == ["val", "test"] and set(record) == {"job", "val", "test_last"} and record["job"] == "full-003"


@pytest.mark.parametrize("kind", ["student", "baseline", "hard"])
def test_the_first_student_of_a_row_of_the_result_table_gives_examples(kind):
    run, ranks = run_of(), []
    records = [
        train_job(Job(kind, i, loss="infonce"), run, training_pairs(run), VAL, TEST, CPU, on_ranks=ranks.append)
        for i in range(2)
    ]
    assert [("test_examples" in record) for record in records] == [kind != "hard", False]
    captions = captions_of_examples(torch.from_numpy(TEST.split.image_of))
    assert len({TEST.split.image_of[caption] for caption in captions}) == min(len(TEST.split), len(captions))
    for caption, found in zip(captions, records[0].get("test_examples", []), strict=kind != "hard"):
        own = TEST.split.image_of[caption]
        assert found["place"] == ranks[0].image[caption] + 1
        assert (own in found["images"]) == (found["place"] <= len(found["images"]))


def test_a_record_depends_only_on_the_job():
    run, job = run_of(), Job("student", 0)
    first = train_job(job, run, training_pairs(run), VAL, TEST, CPU)
    torch.manual_seed(77)
    assert train_job(job, run, training_pairs(run), VAL, TEST, CPU) == first


@pytest.mark.parametrize("kind", ["tune", "select"])
def test_a_job_for_a_selection_that_diverges_scores_0(kind):
    run = run_of()
    record = train_and_score(
        Job(kind, 0, loss="infonce"), StudentProtocol.of(run), training_pairs(run, 1, lr=1e38), VAL, None, CPU
    )
    assert set(record["val"].values()) == {0.0} and "diverged on subset 0" in record["diverged"]
    best, _ = best_by_val([("wild", record), ("tame", {"val": {"R@mean": 0.1}})])
    assert best == "tame"


@pytest.mark.parametrize("kind", ["student", "reference", "baseline"])
def test_a_student_that_diverges_scores_0(kind):
    run = run_of()
    record = train_job(Job(kind, 0), run, training_pairs(run, 1, lr=1e38), VAL, TEST, CPU)
    for key in ("val", "test_last", "test_best_reference"):
        assert set(record[key].values()) == {0.0}
    assert "student 0 diverged on subset 0 in pass" in record["diverged"]


@pytest.mark.parametrize(
    ("distilled", "evaluated", "expected"), [(None, None, 0.3), (0.5, None, 0.5), (0.5, 0.07, 0.07), (None, 0.07, 0.07)]
)
def test_students_of_the_set_use_its_temperature_and_others_that_of_the_model(
    monkeypatch, distilled, evaluated, expected
):
    run = run_of(temperature=evaluated)
    run = run.model_copy(update={"distill": run.distill.model_copy(update={"temperature": distilled})})
    temperatures = {}

    def train(model, training_pairs, rule, loss, seed, student, after_pass=None):
        temperatures[kind] = model.temperature
        if kind == "reference":
            after_pass(0, 1)

    monkeypatch.setattr(protocol, "train_student", train)
    for kind in ("select", "student", "reference", "baseline", "tune"):
        test = None if kind in ("select", "tune") else TEST
        train_job(Job(kind, 0), run, training_pairs(run, 1), VAL, test, CPU)
    of_the_set = dict.fromkeys(("select", "student", "reference"), expected)
    assert temperatures == of_the_set | {"baseline": 0.3, "tune": 0.3}


@pytest.mark.parametrize(
    ("order", "updates", "passes"), [("sequence", 20, 10), ("cumulative", 30, 15), ("union", 20, 10)]
)
def test_random_pairs_get_as_many_updates_as_the_distilled_set(monkeypatch, order, updates, passes):
    """With batches of 4, a pass takes 2 updates over 6 or 7 pairs, 2 over 7, and 4 over the 13 pairs of both phases."""
    plan = (config.Phase(pairs=6), config.Phase(pairs=7))
    run = run_of(order=order).model_copy(update={"distill": config.Distill(budget=7, phases=plan, batch=4)})
    epochs = {}

    def train(model, subsets, rule, *rest):
        epochs[len(subsets)] = rule.epochs

    monkeypatch.setattr(protocol, "train_student", train)
    train_job(Job("baseline", 0), run, training_pairs(run, 1), VAL, TEST, CPU)
    train_job(Job("student", 0), run, training_pairs(run, 2), VAL, TEST, CPU)
    assert epochs == {1: passes, 2: 5}
    assert StudentProtocol.of(run).updates == updates


@pytest.mark.parametrize(("order", "stages"), [("sequence", 2), ("cumulative", 2), ("union", 1)])
def test_a_student_is_scored_after_the_last_pass_of_its_last_stage(order, stages):
    run = run_of(order=order)
    for kind in ("student", "hard"):
        record = train_job(Job(kind, 0), run, training_pairs(run), VAL, TEST, CPU)
        expected = [(stage, n) for stage in range(stages) for n in (2, 4, 5) if n < 5 or stage == stages - 1]
        assert [(p["subset"], p["passes"]) for p in record["curve"]] == (expected if kind == "student" else [])
        if kind == "student":
            assert record["curve"][-1]["val"] == record["val"]


def test_a_reference_protocol_keeps_its_own_order():
    records = [
        train_job(Job("reference", 0), run, training_pairs(run), VAL, TEST, CPU)
        for run in (run_of(), run_of(order="union", between="masked"))
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("kind", ["tune", "select", "student", "baseline", "hard"])
def test_a_student_that_diverges_in_its_last_step_scores_0(kind, monkeypatch):
    """The loss of a step is computed before the update, so it is finite, but the embeddings after it are not."""
    run, ranks = run_of(epochs=1, eval_every=9), []

    def train(model, subsets, schedule, loss, seed, student, after_pass):
        with torch.no_grad():
            next(iter(model.text_head.parameters())).fill_(float("nan"))

    monkeypatch.setattr(protocol, "train_student", train)
    test = None if kind in protocol.SELECTION_KINDS else TEST
    record = train_and_score(
        Job(kind, 0), StudentProtocol.of(run), training_pairs(run, 1), VAL, test, CPU, on_ranks=ranks.append
    )
    assert set(record["val"].values()) == {0.0} and "text embeddings collapsed" in record["diverged"]
    assert [r.recalls().as_dict() for r in ranks] == ([] if test is None else [record["test_last"]])


def test_a_collapsed_expert_scores_0():
    run, ranks = run_of(), []
    model = build(run.model, TEXT_WIDTH, SIZE, 0, "expert", 0)
    with torch.no_grad():
        for p in model.text_head.parameters():
            p.zero_()
    record = score_expert(Job("full", 0), model, VAL, TEST, CPU, run.evaluate.chunk, on_ranks=ranks.append)
    assert set(record["test_last"].values()) == {0.0} and "collapsed" in record["diverged"] and len(ranks) == 1
