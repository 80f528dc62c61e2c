"""Tests of the scores HLR, IOR, LRS and ARS: values, compared students, and storage of records."""

import math

import pytest
import torch

from rmdd.core.files import read_json
from rmdd.evaluate import protocol, records, scores
from rmdd.evaluate.protocol import Job, StudentProtocol, TestIsClosed, soft_pairs, train_and_score, with_hard_labels
from rmdd.evaluate.retrieval import Ranks
from rmdd.evaluate.scores import ars, lrs, scaled
from rmdd.models.dual import build
from tests.evaluate.test_protocol import (
    CPU,
    POISON,
    SIZE,
    TEST,
    TEXT_WIDTH,
    TRAIN,
    VAL,
    run_of,
    train_job,
    training_pairs,
)


def test_scores_are_scaled_differences_of_fractions():
    assert (scaled(-1.0), scaled(1.0)) == (0, pytest.approx(100))
    assert scaled(0.0) == pytest.approx(100 * (1 - 1 / math.e) / (math.e - 1 / math.e))
    assert lrs(hlr=0.4, ior=0.2) == scaled(0.5 * 0.2 - 0.5 * 0.4)
    assert lrs(hlr=0.4, ior=0.2, w=1.0) == scaled(0.2) and ars(0.3, 0.1) == scaled(0.2)
    assert lrs(0.3, 0.2) < lrs(0.2, 0.2) < lrs(0.2, 0.3), "LRS must rise with IOR and fall with HLR"
    with pytest.raises(ValueError, match=r"fractions in -1..1, found 5; divide percentage points by 100"):
        lrs(hlr=20.0, ior=30.0)


def ranked(hits, of=100):
    """Return the ranks of a student that answers the first `hits` of `of` queries correctly and misses all others."""
    rank = torch.where(torch.arange(of) < hits, 0, 99)
    return Ranks(rank, rank, torch.arange(of))


def test_scores_compare_the_right_students():
    run = run_of(students=2, baseline_draws=2, scores=True)
    kind = {"full": 70, "student": 40, "hard": 25}
    jobs = {Job(k, i): ranked(v) for k, v in kind.items() for i in (0, 1)}
    for i in (0, 1):
        jobs[Job("own", i, augment="dsa")] = ranked(38)
        jobs[Job("soft", i, lr=0.1, augment="none")] = ranked(30)
        jobs[Job("soft", i, lr=0.3, augment="dsa")] = ranked(33)
    others = {Job(k, i) for k in ("student", "full") for i in (0, 1)}
    assert set(jobs) == {*scores.final_jobs(run.evaluate, {"none": 0.1, "dsa": 0.3})} | others
    result = scores.result(StudentProtocol.of(run), jobs, {"none": 0.1, "dsa": 0.3})
    points = {name: p["mean"] for name, p in result["points"].items()}
    assert points == pytest.approx({"HLR": 45, "IOR": 10, "augmented": 5, "plain": 10})
    assert all(p["low"] <= p["mean"] <= p["high"] for p in result["points"].values())
    assert result["LRS"] == pytest.approx(lrs(0.45, 0.10)) and result["ARS"] == pytest.approx(ars(0.05, 0.10))
    assert result["augment"] == "dsa" and result["rates"] == {"none": 0.1, "dsa": 0.3}


def test_a_run_with_augmented_students_adds_plain_ones():
    run = run_of(students=1, augment="randaugment")
    assert scores.augmentations(run.evaluate.augment) == ("randaugment", "none")
    kinds = {
        (j.kind, j.augment)
        for j in scores.final_jobs(run.evaluate, dict.fromkeys(scores.augmentations(run.evaluate.augment), 0.1))
    }
    assert kinds == {("hard", ""), ("own", "none"), ("soft", "none"), ("soft", "randaugment")}


def test_rates_of_random_pairs_are_chosen_per_augmentation_on_val():
    run = run_of(baseline_lrs=(0.1, 0.2), selection_students=1)
    jobs = scores.tuning_jobs(run.evaluate)
    assert {(j.augment, j.lr) for j in jobs} == {(k, lr) for k in ("dsa", "none") for lr in (0.1, 0.2)}
    assert all(j.kind in protocol.SELECTION_KINDS for j in jobs) and len({j.name for j in jobs}) == len(jobs)
    best = {("dsa", 0.2), ("none", 0.1)}
    tried = [(j, {"val": {"R@mean": float((j.augment, j.lr) in best)}}) for j in jobs]
    assert scores.chosen_rates(tried) == {"dsa": 0.2, "none": 0.1}


def test_hard_labels_are_the_identity_at_the_rates_of_the_experts():
    run = run_of()
    pairs = with_hard_labels(training_pairs(run, 1, lr=0.7)[0], run.experts.lr_image, run.experts.lr_text)
    assert torch.equal(pairs.similarity, torch.eye(7))
    assert (pairs.lr_image, pairs.lr_text) == (run.experts.lr_image, run.experts.lr_text)


def test_random_pairs_get_a_similarity_from_a_teacher_if_the_set_has_one():
    run = run_of()
    teacher = build(run.model, TEXT_WIDTH, SIZE, 0, "expert")
    pairs = soft_pairs(StudentProtocol.of(run), TRAIN, 1, 0.2, teacher, CPU)
    plain = training_pairs(run, 2, lr=0.2)[1]
    assert torch.equal(pairs.images, plain.images) and torch.equal(pairs.texts, plain.texts)
    with torch.no_grad():
        cosine = teacher.embed_images(plain.images) @ teacher.embed_texts(plain.texts).T
    assert torch.allclose(pairs.similarity, 1 / (1 + torch.exp(-cosine / run.model.temperature)))
    none = run.distill.model_copy(update={"similarity": run.distill.similarity.model_copy(update={"kind": "identity"})})
    of_pairs = soft_pairs(StudentProtocol.of(run.model_copy(update={"distill": none})), TRAIN, 1, 0.2, teacher, CPU)
    assert torch.equal(of_pairs.similarity, torch.eye(7)), "a set without a similarity gives random pairs the identity"


def test_both_sides_of_ior_use_the_same_settings(monkeypatch):
    """The jobs that IOR compares, `own` and `soft`, use the loss and temperature of the run; `hard` uses InfoNCE."""
    run, settings = run_of(temperature=0.11, augment="dsa"), {}

    def train(model, subsets, schedule, loss, seed, student, after_pass=None):
        identity = torch.equal(subsets[0].similarity, torch.eye(7))
        settings[job.kind] = (loss, model.temperature, schedule.augment, identity)

    monkeypatch.setattr(protocol, "train_student", train)
    for job in (Job("own", 0, augment="none"), Job("soft", 0, augment="dsa"), Job("hard", 0)):
        record = train_job(job, run, training_pairs(run, 1), VAL, TEST, CPU)
        assert set(record) == {"job", "curve", "val", "test_last"}
    loss = run.distill.loss
    expected = {"own": (loss, 0.11, "none", True), "soft": (loss, 0.11, "dsa", True)}
    assert settings == expected | {"hard": ("infonce", 0.11, "dsa", True)}


@pytest.mark.parametrize("augment", ["dsa", "randaugment"])
def test_augmented_students_depend_only_on_the_job(augment):
    run, job = run_of(augment=augment, epochs=2), Job("student", 0)
    first = train_job(job, run, training_pairs(run), VAL, TEST, CPU)
    torch.manual_seed(3)
    assert train_job(job, run, training_pairs(run), VAL, TEST, CPU) == first
    assert train_job(job, run_of(epochs=2), training_pairs(run), VAL, TEST, CPU) != first


def test_student_i_is_the_same_for_every_kind_of_job(monkeypatch):
    """In every kind of job, student i starts from the same parameters and gets the same seed for batches."""
    starts, seeds = {}, {}
    original = protocol.train_student

    def train(model, subsets, schedule, loss, seed, student, after_pass=None):
        starts[job.kind] = {n: p.clone() for n, p in model.named_parameters()}
        seeds[job.kind] = (seed, student)
        original(model, subsets, schedule, loss, seed, student, after_pass)

    monkeypatch.setattr(protocol, "train_student", train)
    run = run_of(epochs=1)
    for job in (Job("student", 1), Job("baseline", 1, lr=0.1), Job("reference", 1), Job("hard", 1), Job("soft", 1)):
        train_job(job, run, training_pairs(run, 1), VAL, TEST, CPU)
    first = starts["student"]
    assert all(torch.equal(first[n], p) for params in starts.values() for n, p in params.items())
    assert len(starts) == 5 and set(seeds.values()) == {(run.seed_of("evaluate"), 1)}


def test_test_scores_are_stored_apart_from_the_file_that_selections_read(tmp_path):
    run, ranks = run_of(), []
    for kind in ("student", "reference"):
        path = tmp_path / f"{kind}.json"
        on = {"on_ranks": ranks.append}
        record = train_job(Job(kind, 0), run, training_pairs(run), VAL, TEST, CPU, **on) | {"value": "v"}
        records.write(path, record)
        assert records.read(path, "v") == record and records.read(path, "w") is None
        open_to_all = path.read_text().replace(f"{kind}.test.json", "")
        assert "test_" not in open_to_all and '"test": {' not in open_to_all
        assert set(read_json(records.test_file(path))) > {"value"}
        records.test_file(path).unlink()
        assert records.read(path, "v") is None, "a record without its file of test scores is incomplete"
    assert len(ranks) == 1 and ranks[0].recalls().as_dict() == record_of(run)["test_last"]
    chosen = train_and_score(
        Job("select", 0, snapshot=0), StudentProtocol.of(run), training_pairs(run), VAL, None, CPU
    ) | {"value": "v"}
    records.write(tmp_path / "select.json", chosen)
    assert records.read(tmp_path / "select.json", "v") == chosen
    assert not records.test_file(tmp_path / "select.json").exists()
    with pytest.raises(TestIsClosed):
        train_job(Job("soft_tune", 0), run, training_pairs(run), VAL, POISON, CPU)


def record_of(run):
    return train_job(Job("student", 0), run, training_pairs(run), VAL, TEST, CPU)
