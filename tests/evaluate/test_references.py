"""Tests that compare each reference protocol with the calls of the paper's released code, listed independently."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from rmdd import config
from rmdd.evaluate import protocol, students
from rmdd.evaluate.protocol import Job, StudentProtocol
from rmdd.evaluate.references import REFERENCES
from rmdd.evaluate.students import TrainingPairs
from tests.evaluate.test_protocol import CPU, SIZE, TEST, TEXT_WIDTH, VAL, train_job

PAIRS = (150, 70)
RATES = ((0.02, 0.04), (0.03, 0.01))
TENS = tuple(range(1, 102, 10))
BOTH = {"image_tower", "image_head", "text_head"}

# Columns of `EXPECTED`: number of passes, batch sizes of a pass over each subset, learning rates, pass after which they
# drop, momentum, weight decay, passes after which students are scored, reported scoring, number of students, trained
# parts of the model, augmentation, loss.
EXPECTED = {
    "lors": (101, ([128] * 2, [70]), "learned, last", 51, 0.9, 5e-4, TENS, "best", 5, BOTH, "none", "wbce"),
    "ptm_st": (101, ([128] * 2, [70]), "learned, last", 51, 0.9, 5e-4, TENS, "best", 5, BOTH, "none", "wbce"),
    "repblend": (
        *(101, ([128] * 2, [70]), "learned, last", 51, 0.9, 5e-4, (1, 21, 41, 61, 81, 101)),
        *("best", 1, {"image_head", "text_head"}, "none", "wbce"),
    ),
    "mtt_vl": (51, ([64, 64, 22], [64, 6]), "image", None, 0.9, 5e-4, (51,), "last", 5, BOTH, "none", "infonce"),
    "mdm": (100, ([150], [70]), 0.1, 51, 0.9, 5e-4, (100,), "last", 5, BOTH, "dsa", "infonce"),
    "pds": (101, ([128] * 2, [70]), 0.2, 51, 0.9, 5e-4, TENS, "best", 5, {"text_head"}, "none", "infonce"),
    "edge": (
        *(100, ([64] * 2, [64]), 0.1, None, 0.0, 0.0, tuple(range(5, 101, 5))),
        *("last", 1, BOTH, "randaugment", "infonce"),
    ),
}


def run_of(method="ptm_st", **evaluate):
    image = config.ImageTower(name="convnet", weights="random", widths=(4,), groups=2, projection="linear")
    return config.Run(
        data=config.Data(image_size=SIZE),
        model=config.Model(image=image, text=config.TextTower(name="hashing"), width=6, dropout=0.0, temperature=0.3),
        distill=config.Distill(method=method, phases=(config.Phase(pairs=20),), temperature=0.2, loss="bce"),
        evaluate=config.Evaluate(**{"batch": 7, "momentum": 0.5, "weight_decay": 0.25, "students": 3, **evaluate}),
    )


def training_pairs():
    g = torch.Generator().manual_seed(0)
    soft = [torch.eye(m) + 0.1 * torch.rand(m, m, generator=g) for m in PAIRS]
    return [
        TrainingPairs(
            torch.randn(len(s), 3, SIZE, SIZE, generator=g), torch.randn(len(s), TEXT_WIDTH, generator=g), s, *r
        )
        for s, r in zip(soft, RATES, strict=True)
    ]


@pytest.fixture
def calls(monkeypatch):
    """Fixture: a record of a protocol's calls: batches and learning rates of steps, scorings, losses, augmentations."""
    log = SimpleNamespace(steps=[], optimisers=[], scored=[], losses=Counter(), targets=[], views=Counter(), model=None)

    class Recorded(torch.optim.SGD):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            log.optimisers.append(self)

        def step(self, closure=None):
            log.steps.append((log.batch, tuple(g["lr"] for g in self.param_groups)))

    def loss_named(name):
        def loss(logits, similarity):
            log.losses[name] += 1
            log.batch = len(logits)
            log.targets.append(bool(torch.equal(similarity, torch.eye(len(logits)))))
            return logits.sum()

        return loss

    def view_named(name, mean, std):
        assert mean == VAL.mean and std == VAL.std

        def view(images, random):
            log.views[name] += 1
            return images

        return view

    def score(model, prepared, device, chunk=256):
        log.model = model
        log.scored.append(({id(VAL): "val", id(TEST): "test"}[id(prepared)], len(log.steps)))
        value = float(-abs(len(log.scored) - 3))
        return SimpleNamespace(as_dict=lambda: {"R@mean": value, "point": len(log.scored)})

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    monkeypatch.setattr(students, "LOSSES", {name: loss_named(name) for name in students.LOSSES})
    monkeypatch.setattr(students, "augmentation", view_named)
    monkeypatch.setattr(protocol, "score", score)
    return log


@pytest.mark.parametrize("name", EXPECTED)
def test_a_protocol_makes_the_calls_of_the_released_code(name, calls):
    epochs, per_pass, rates, drop, momentum, decay, points, reported, number, trained, augment, loss = EXPECTED[name]
    run = run_of(reference=name)
    record = train_job(Job("reference", 0), run, training_pairs(), VAL, TEST, CPU)

    image, text = (rates, rates) if isinstance(rates, float) else RATES[-1]
    first = (image, image) if rates == "image" else (image, text)
    first = first[1:] if trained == {"text_head"} else first
    later = first if drop is None else tuple(0.1 * r for r in first)
    expected = [(b, first if p < (drop or epochs) else later) for p in range(epochs) for b in per_pass[0]]
    expected += [(b, later) for _ in range(epochs) for b in per_pass[1]]
    assert [b for b, _ in calls.steps] == [b for b, _ in expected]
    assert [r for _, r in calls.steps] == [pytest.approx(r) for _, r in expected]

    assert len(calls.optimisers) == 1, "all subsets must share one optimiser"
    for group in calls.optimisers[0].param_groups:
        assert (group["momentum"], group["weight_decay"]) == (momentum, decay) and not group["nesterov"]
    params = {id(p) for g in calls.optimisers[0].param_groups for p in g["params"]}
    names = [n for n, p in calls.model.named_parameters() if id(p) in params]
    assert {n.partition(".")[0] for n in names} == trained

    before = epochs * len(per_pass[0])
    ends = [(p * len(per_pass[0]), p * len(per_pass[1]) + before) for p in points]
    assert calls.scored == [("test", end[s]) for s in (0, 1) for end in ends]
    assert [(p["subset"], p["passes"]) for p in record["curve"]] == [(s, p) for s in (0, 1) for p in points]
    best = max(record["curve"], key=lambda point: point["test"]["R@mean"])
    assert record["test_best_reference"] == (best if reported == "best" else record["curve"][-1])["test"]

    assert set(calls.losses) == {loss} and set(calls.targets) == {loss == "infonce"}
    assert set(calls.views) == ({augment} - {"none"}) and calls.model.temperature == 0.07
    assert StudentProtocol.of(run).reference.students == number


def test_edge_is_scored_on_the_validation_file_of_cc3m(calls):
    run = run_of(reference="edge")
    run = run.model_copy(update={"data": run.data.model_copy(update={"layout": "cc3m"})})
    train_job(Job("reference", 0), run, training_pairs()[1:], VAL, TEST, CPU)
    assert {split for split, _ in calls.scored} == {"val"}


def test_the_config_allows_exactly_the_known_protocols():
    named = config.Evaluate.model_fields["reference"].annotation.__args__
    assert {*named} == {"auto", "none", *REFERENCES} == {"auto", "none", *EXPECTED}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("ptm_st", "ptm_st"), ("lors", "lors"), ("mtt_vl", "mtt_vl"), ("repblend", "repblend")),
        *(("tesla_vl", "lors"), ("datm", "lors"), ("mct", "lors"), ("amd", "lors")),
    ],
)
def test_auto_is_the_protocol_of_the_method_with_values_of_the_run(method, name):
    run = run_of(method, temperature=0.15)
    reference, released = StudentProtocol.of(run).reference, REFERENCES[name]
    assert reference.name == name and reference.points == released.points and reference.reported == released.reported
    schedule = reference.schedule
    assert (schedule.batch, schedule.momentum, schedule.weight_decay) == (7, 0.5, 0.25)
    assert (reference.loss, reference.temperature, reference.students) == ("bce", 0.15, 3)
    assert (schedule.epochs, schedule.drop_after, schedule.trains, schedule.text_rate) == (
        *(released.schedule.epochs, released.schedule.drop_after),
        *(released.schedule.trains, released.schedule.text_rate),
    )


@pytest.mark.parametrize(
    "preset", ["flickr30k_lors_100", "coco_ptm_st_500", "flickr30k_mtt_vl_100", "coco_repblend_100"]
)
def test_auto_equals_the_released_protocol_in_presets_of_a_paper(preset):
    run = config.load(preset, ["data.root=elsewhere"])
    reference, released = StudentProtocol.of(run).reference, REFERENCES[run.distill.method]
    assert reference.schedule == released.schedule and (reference.loss, reference.temperature) == (
        released.loss,
        released.temperature,
    )


def test_true_and_false_of_older_run_files_can_be_read():
    assert config.load({"evaluate": {"reference": True}}).evaluate.reference == "auto"
    off = config.load({"evaluate": {"reference": False}})
    assert off.evaluate.reference == "none" and StudentProtocol.of(off).reference is None
    with pytest.raises(config.ConfigError, match="evaluate.reference"):
        config.load({"evaluate": {"reference": "tesla"}})
