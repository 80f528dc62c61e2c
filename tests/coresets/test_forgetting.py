"""Check the counts of forgetting events for given visits, and the counts that are stored with a trained expert."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmdd import config
from rmdd.core.progress import Progress
from rmdd.coresets import forgetting
from rmdd.coresets.forgetting import ForgettingCounts
from rmdd.experts.store import Store
from rmdd.experts.train import expert_model
from rmdd.pipeline import open_pipeline
from rmdd.runs.paths import paths_of
from rmdd.searches.formats import verify

EPOCHS = 4


def counted(*visits, margins=None):
    """Return the forgetting counts after `visits`; each has 1 (correct), 0 (wrong) or None (not visited) per record."""
    counts = ForgettingCounts.new(len(visits[0]))
    for epoch, visit in enumerate(visits, 1):
        there = torch.tensor([i for i, v in enumerate(visit) if v is not None], dtype=torch.int64)
        correct = torch.tensor([bool(visit[i]) for i in there])
        margin = None if margins is None else torch.tensor(margins)[there]
        counts = counts.visited(epoch, correct, margin, there)
    return counts


def events(*sequence):
    counts = counted(*[[v] for v in sequence])
    return int(counts.events), bool(counts.learned)


def test_events_are_changes_from_correct_to_wrong():
    assert events(1, 0, 1, 0) == (2, True)
    assert events(0, 0, 0) == (0, False)
    assert events(1, 1, 1) == (0, True) == events(0, 1, 1)
    assert events(0) == (0, False) and events(1) == (0, True)


@given(visits=st.lists(st.booleans(), max_size=12))
def test_events_are_at_most_half_the_visits(visits):
    if visits:
        result, learned = events(*visits)
        assert result == sum(a and not b for a, b in pairwise(visits)) <= len(visits) // 2
        assert learned == any(visits)


def test_records_that_an_epoch_skips_keep_their_state():
    counts = counted([1, 1], [None, 0], [0, 1], [None, 0])
    assert counts.events.tolist() == [1, 2] and counts.last.tolist() == [3, 4] and counts.visits.tolist() == [2, 4]


def test_counts_are_loaded_and_continued(tmp_path):
    counts = counted([1, 0, 1], [0, 0, 1], margins=[0.1, 0.2, 0.3])
    counts.save(tmp_path)
    more = torch.tensor([True, True, False])
    a, b = ForgettingCounts.load(tmp_path).visited(3, more), counts.visited(3, more)
    assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    with pytest.raises(ValueError, match="holds no forgetting counts; train the expert with experts.forgetting"):
        ForgettingCounts.load(tmp_path / "other")


def test_ties_go_by_last_event_then_margin_then_number():
    # record:  0  1  2  3  4  5  6
    visits = [[1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0]]
    counts = counted(*visits, margins=[0.5, 0.5, 0.3, 0.2, 0.1, -0.1, -0.2])
    learned = [0, 1, 3, 2, 4]
    assert counts.ranking("last").tolist() == [*learned, 6, 5]
    assert counts.ranking("first").tolist() == [6, 5, *learned]
    assert counts.ranking("exclude").tolist() == learned
    assert counts.summary() == {"never_learned": pytest.approx(2 / 7), "records_by_events": [1, 3, 1]}
    equal = counted([1] * 5, [0] * 5, margins=[0.1] * 5)
    assert equal.ranking("last").tolist() == list(range(5))


# -- counting while an expert is trained ------------------------------------------------------------------------------


def run_of(storage, forgetting_=5, **experts):
    return config.load(
        {
            "name": "tiny",
            "seed": 2,
            "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 24, "val": 5, "test": 5, "size": 16}},
            "model": {
                "image": {"name": "convnet", "weights": "random", "widths": [8], "groups": 2, "projection": "linear"},
                "text": {"name": "hashing", "width": 32, "projection": "linear"},
                "width": 8,
                "dropout": 0.2,
            },
            "experts": {
                "num": 1,
                "epochs": EPOCHS,
                "batch": 16,
                "keep": "all",
                "lr_image": 1.0,
                "lr_text": 1.0,
                "forgetting": forgetting_,
                **experts,
            },
            "distill": {"budget": 9, "batch": 4, "phases": [{"pairs": 8, "stop": 1, "endpoint": 2, "iterations": 1}]},
            "runtime": {"storage": str(storage), "ray": "off", "track": "none"},
        }
    )


def trained(run):
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        return pipeline.experts(), pipeline.prepared_split("train")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("watched"))
    return run, *trained(run)


def lead(model, train, record, pool):
    """Return the margin of one caption record over the pool, computed directly from the definition of the margin."""
    split = train.split

    def image(i):
        pixels = torch.from_numpy(split.images[i : i + 1].copy()).float() / 255
        mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (train.mean, train.std))
        return model.embed_images((pixels - mean) / std)[0]

    def text(t):
        return model.embed_texts(torch.from_numpy(train.texts[t : t + 1].copy()))[0]

    own = int(split.image_of[record])
    others = [int(p) for p in pool if split.image_of[p] != own]
    to_texts = max(float(image(own) @ text(p)) for p in others)
    to_images = max(float(text(record) @ image(int(split.image_of[p]))) for p in others)
    return float(image(own) @ text(record)) - max(to_texts, to_images)


def test_counts_are_those_of_the_checkpoints(watched):
    run, store, train = watched
    pool = forgetting.pool_of(train.split.image_of, 5, run.seed_of("experts"))
    model = expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, 32).eval()
    correct = np.zeros((EPOCHS, len(train.texts)), bool)
    with torch.no_grad():
        for epoch in range(1, EPOCHS + 1):
            model.load_trained(store.read(0, epoch))
            correct[epoch - 1] = [lead(model, train, t, pool) > forgetting.MARGIN for t in range(len(train.texts))]
    counts = ForgettingCounts.load(store.folder(0))
    assert counts.visits.tolist() == [EPOCHS] * len(train.texts)
    assert counts.events.tolist() == (correct[:-1] & ~correct[1:]).sum(axis=0).tolist()
    assert counts.learned.tolist() == correct.any(axis=0).tolist() and 0 < counts.learned.sum() < len(train.texts)
    assert counts.events.sum() > 3 and counts.facts == {"pool": 5, "epochs": EPOCHS, "records": len(train.texts)}


def test_counting_does_not_change_the_expert(watched, tmp_path):
    run, store, _ = watched
    plain = run_of(tmp_path, 0)
    other, _ = trained(plain)
    for epoch in range(EPOCHS + 1):
        a, b = (s.folder(0) / f"epoch-{epoch:04d}.safetensors" for s in (store, other))
        assert a.read_bytes() == b.read_bytes()
    assert store.record(0)["metrics"] == other.record(0)["metrics"]
    assert not (other.folder(0) / forgetting.FILE).exists()
    unasked = plain.model_copy(update={"experts": plain.experts.model_copy(update={"forgetting": 0})})
    assert (
        "forgetting" not in unasked.hashed("experts", "experts")
        and unasked.hash_of() == plain.hash_of() != run.hash_of()
    )


def test_damaged_counts_are_refused(watched, tmp_path):
    _, store, _ = watched
    assert verify(str(store.path)).faults == []
    copy = shutil.copytree(store.path, tmp_path / "store")
    path = copy / "expert-000" / forgetting.FILE
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    assert [str(path)] == [f.path for f in verify(str(copy)).faults]
    with pytest.raises(ValueError, match="is damaged"):
        ForgettingCounts.load(copy / "expert-000")


KILLED_AT = """
import os, signal, sys
from rmdd import config
from rmdd.experts import store
from rmdd.pipeline import open_pipeline
from rmdd.core.progress import Progress

add = store.Writer.add
def killed(self, *given, **named):
    add(self, *given, **named)
    if self.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store.Writer.add = killed
with open_pipeline(config.load(sys.argv[1]), Progress(quiet=True)) as pipeline:
    pipeline.experts()
"""


def test_a_killed_expert_resumes_bit_identically(watched, tmp_path):
    _, full, _ = watched
    run = run_of(tmp_path / "runs")
    (tmp_path / "run.yaml").write_text(config.dump(run))
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(tmp_path / "run.yaml")], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    broken = next((tmp_path / "runs" / "experts").glob("*/expert-000"))
    assert (broken / "running.safetensors").is_file()
    store, _ = trained(run)
    assert (store.folder(0) / forgetting.FILE).read_bytes() == (full.folder(0) / forgetting.FILE).read_bytes()
    assert store.record(0) == full.record(0) and Store.open(store.path).complete() == [0]
    with open_pipeline(run, Progress(quiet=True)) as pipeline:
        assert paths_of(run, pipeline.ingest()).store == store.path


def test_a_pool_of_one_image_is_refused():
    with pytest.raises(ValueError, match="a forgetting pool of 1 records has only one image"):
        forgetting.pool_of(np.array([0, 0, 1]), 1, 0)
