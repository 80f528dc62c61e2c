"""Tests that a tracker shows every step once, also after a resume or a rollback."""

import logging

import pytest

from rmdd import config
from rmdd.core import tracking as track
from rmdd.core.tracking import Tracker


def run_of(storage, *sinks):
    return config.Run(
        name="curves", runtime=config.Run().runtime.model_copy(update={"track": sinks, "storage": str(storage)})
    )


def track_steps(run, folder, first, last, scale=1.0):
    with track.open_tracker(run, "phase 1", "0123abcd", folder) as tracker:
        for step in range(first, last + 1):
            tracker.add(step, {"loss": scale / step})


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]


def test_runtime_track_is_a_list_or_a_word():
    assert config.load({}).runtime.track == ("tensorboard",)
    for value, names in (("none", ()), ("tensorboard", ("tensorboard",)), (["mlflow", "wandb"], ("mlflow", "wandb"))):
        assert config.load({"runtime": {"track": value}}).runtime.track == names
    with pytest.raises(config.ConfigError, match=r"runtime.track.0.*found 'comet'"):
        config.load({"runtime": {"track": ["comet"]}})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    run = run_of(tmp_path, "tensorboard")
    tracker = track.open_tracker(run, "phase 1", "0123abcd", tmp_path)
    for step in range(1, 8):
        tracker.add(step, {"loss": 9.0})  # the tracker is not closed, as after a kill
    track_steps(run, tmp_path, 5, 9)
    assert scalars(tmp_path) == [(s, 9.0) for s in range(1, 5)] + [(s, 1 / s) for s in range(5, 10)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_rollback_replaces_the_steps_after_it(tmp_path):
    with track.open_tracker(run_of(tmp_path, "tensorboard"), "phase 1", "0123abcd", tmp_path) as tracker:
        for step in (1, 2, 3, 2, 3, 4):
            tracker.add(step, {"loss": float(step)})
    assert scalars(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_tracker_that_fails_is_dropped_with_a_warning(tmp_path, caplog):
    class Broken:
        def add(self, step, values):
            raise OSError("no route to the server")

        def close(self):
            raise AssertionError("a dropped tracker is not closed")

    with caplog.at_level(logging.WARNING), Tracker({"wandb": lambda step: Broken()}) as tracker:
        tracker.add(1, {"loss": 1.0})
        tracker.add(2, {"loss": 1.0})
    words = "wandb failed and no longer records this work: no route to the server"
    assert [r.getMessage() for r in caplog.records] == [words]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_each_step_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = run_of(tmp_path, "mlflow")
    track_steps(run, tmp_path / "phase-1", 1, 7)
    track_steps(run, tmp_path / "phase-1", 5, 9)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (row,) = client.search_runs([client.get_experiment_by_name("rmdd").experiment_id])
    assert row.info.run_name == "curves phase 1" and row.data.params["distill.method"] == "ptm_st"
    values = [(m.step, m.value) for m in client.get_metric_history(row.info.run_id, "loss")]
    assert sorted(values) == [(s, pytest.approx(1 / s)) for s in range(1, 10)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_records_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track_steps(run_of(tmp_path, "wandb"), tmp_path, 1, 4)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-0123abcd-phase-1.wandb")
    assert file.stat().st_size > 0
