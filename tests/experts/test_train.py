import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rmdd import config
from rmdd.core.seeding import generator
from rmdd.data.images import normalise
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.evaluate.students import score
from rmdd.experts.store import Store
from rmdd.experts.train import begin_store, expert_model, train_expert
from rmdd.models.dual import build, tower_of
from rmdd.models.prepared import PreparedSplit

SIZE, TEXT_WIDTH, IMAGES, CAPTIONS, EPOCHS = 8, 6, 11, 2, 3
CPU = torch.device("cpu")


class Killed(BaseException):
    """Raised to end training without any cleanup, as SIGKILL would."""


class MemorySplit(Split):
    """A dataset split in memory, whose images are encoded when read; raises `Killed` after `killed_at` images."""

    killed_at = None

    def encoded(self, i):
        if self.killed_at is not None:
            object.__setattr__(self, "killed_at", self.killed_at - 1)
            if self.killed_at == 0:
                raise Killed
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.images[i].transpose(1, 2, 0))).save(file, "PNG")
        return file.getvalue()


def model_of(run, expert):
    return expert_model(run.model, run.data.image_size, run.seed_of("experts"), expert, TEXT_WIDTH)


def prepared_split(seed=0, images=IMAGES):
    """Return a split of single-colour images, and captions whose embeddings encode the colour with some noise."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (images, 3))
    noise = random.integers(-20, 21, (images, 3, SIZE, SIZE))
    pictures = np.clip(colours[:, :, None, None] + noise, 0, 255).astype(np.uint8)
    image_of = np.repeat(np.arange(images), CAPTIONS)
    signal = np.concatenate([colours, 255 - colours], axis=1)[image_of] / 128 - 1
    texts = (signal + 0.1 * random.standard_normal(signal.shape)).astype(np.float32)
    names = [str(i) for i in range(images)]
    split = MemorySplit(
        "train", pictures, ["a"] * len(image_of), image_of, names, {}, Dataset(Path(), {}), np.arange(images), Path()
    )
    return PreparedSplit(split, texts, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def run_of(*, augment=False, dropout=0.0, image=None, **experts):
    image = image or {"name": "convnet", "weights": "random", "widths": (4,), "groups": 2, "projection": "linear"}
    rule = {"num": 2, "epochs": EPOCHS, "batch": 4, "keep": "all", "lr_image": 0.05, "lr_text": 0.02}
    return config.Run(
        seed=5,
        data=config.Data(image_size=image.pop("size", SIZE)),
        model=config.Model(
            image=config.ImageTower(**image),
            text=config.TextTower(name="hashing"),
            width=6,
            dropout=dropout,
            temperature=0.3,
        ),
        experts=config.Experts(augment=config.Augment() if augment else config.NO_AUGMENT, **{**rule, **experts}),
        distill=config.Distill(phases=(config.Phase(pairs=20, stop=1, endpoint=1),)),
    )


def val_score(model):
    return score(model, prepared_split(1, 5), CPU, 256).mean


def train(run, path, *, expert=0, data=None, **hooks):
    store = begin_store(run, path, TEXT_WIDTH, {})
    done = train_expert(run, expert, store, data or prepared_split(), val_score, CPU, **hooks)
    return store, done


def stop_after(epochs):
    """Return callbacks `on_epoch` and `should_stop`, which end training after a number of epochs."""
    done = []
    return {"on_epoch": done.append, "should_stop": lambda: len(done) >= epochs}


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def distance(a, b):
    a, b = (torch.cat([p.flatten() for p in params.values()]).double() for params in (a, b))
    return ((a - b).norm() / b.norm()).item()


NOISY = {"augment": True, "dropout": 0.3, "momentum": 0.9, "weight_decay": 1e-3}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_stopped_and_resumed_is_bit_identical(tmp_path, stop, momentum):
    run = run_of(**{**NOISY, "momentum": momentum})
    assert train(run, tmp_path / "whole")[1]
    store, done = train(run, tmp_path / "broken", **stop_after(stop))
    assert not done and store.complete() == []
    torch.manual_seed(stop)
    assert train(run, tmp_path / "broken")[1]
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


@pytest.mark.parametrize("keep", ["all", "endpoints"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16-delta"])
@pytest.mark.parametrize("pictures", [3, 25, 50])
def test_killed_within_an_epoch_and_resumed_is_bit_identical(tmp_path, pictures, keep, dtype):
    run, mortal = run_of(keep=keep, dtype=dtype, **NOISY), prepared_split()
    object.__setattr__(mortal.split, "killed_at", pictures)
    train(run, tmp_path / "whole")
    with pytest.raises(Killed):
        train(run, tmp_path / "broken", data=mortal)
    assert Store.open(tmp_path / "broken").complete() == []
    train(run, tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_loader_processes_do_not_change_results(tmp_path):
    run = run_of(**NOISY, epochs=1)
    train(run, tmp_path / "none")
    train(run, tmp_path / "two", loader_workers=2)
    assert files(tmp_path / "none") == files(tmp_path / "two")


def test_training_is_the_plain_loop(tmp_path):
    """Compare training with a plain loop: torch's cross entropy, shuffled captions, without the last short batch."""
    run, data = run_of(), prepared_split()
    store, _ = train(run, tmp_path, data=data)
    model, rates = (
        model_of(run, 0),
        {"image": 0.05, "text": 0.02},
    )
    pixels = normalise(torch.from_numpy(data.split.images), data.mean, data.std)
    labels = torch.arange(4)
    for epoch in range(EPOCHS):
        assert distance(store.read(0, epoch), model.trained()) < 1e-5
        order = torch.randperm(IMAGES * CAPTIONS, generator=generator(5, "expert order", 0, epoch)).tolist()
        losses = []
        for first in range(0, 20, 4):
            records = order[first : first + 4]
            logits = model(pixels[[r // CAPTIONS for r in records]], torch.from_numpy(data.texts[records]))
            entropy = torch.nn.functional.cross_entropy
            loss = (entropy(logits, labels) + entropy(logits.T, labels)) / 2
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= rates[tower_of(name)] * p.grad
            losses.append(loss.item())
        assert store.record(0)["metrics"][epoch + 1]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert distance(store.read(0, EPOCHS), model.trained()) < 1e-5
    final = score(model, prepared_split(1, 5), CPU).mean
    assert store.record(0)["metrics"][EPOCHS]["val"] == pytest.approx(final)


@pytest.mark.parametrize("change", [{}, NOISY])
def test_the_loss_falls(tmp_path, change):
    store, _ = train(run_of(epochs=8, **change), tmp_path)
    losses = [m["loss"] for m in store.record(0)["metrics"][1:]]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]


def test_reports_every_epoch(tmp_path):
    logged = []
    store, _ = train(run_of(), tmp_path, on_epoch=logged.append)
    assert [m["epoch"] for m in logged] == [1, 2, 3] and {m["expert"] for m in logged} == {0}
    assert [{k: v for k, v in m.items() if k != "expert"} for m in logged] == store.record(0)["metrics"][1:]
    assert list(store.record(0)["metrics"][0]) == ["epoch", "val"]


def test_a_finished_expert_is_not_changed(tmp_path):
    run = run_of()
    train(run, tmp_path)
    before, logged = files(tmp_path), []
    assert train(run, tmp_path, on_epoch=logged.append)[1]
    assert not logged and files(tmp_path) == before


def test_experts_differ_from_one_another(tmp_path):
    run = run_of()
    for expert in (0, 1):
        store, _ = train(run, tmp_path, expert=expert)
    assert store.complete() == [0, 1]
    assert all(distance(store.read(0, e), store.read(1, e)) > 0.1 for e in (0, EPOCHS))


def test_step_norms_are_those_of_the_checkpoints(tmp_path):
    store, _ = train(run_of(**NOISY), tmp_path)
    points = [store.read(0, e) for e in range(EPOCHS + 1)]
    for name, steps in store.norms(0).items():
        expected = [(b[name] - a[name]).double().norm().item() for a, b in pairwise(points)]
        assert steps.tolist() == pytest.approx(expected, rel=1e-6)


def test_endpoints_are_those_the_phases_read(tmp_path):
    store, _ = train(run_of(keep="endpoints"), tmp_path)
    assert store.spec["keep"] == [0, 1, EPOCHS]
    files = sorted(p.name for p in store.folder(0).glob("*.safetensors"))
    assert files == [f"epoch-000{e}.safetensors" for e in (0, 1, EPOCHS)]


def test_only_the_listed_epochs_are_kept(tmp_path):
    run = run_of(keep=(EPOCHS, 1, 2, 2))
    store, _ = train(run, tmp_path)
    assert store.spec["keep"] == sorted({0, 1, 2, EPOCHS})
    files = sorted(p.name for p in store.folder(0).glob("*.safetensors"))
    assert files == [f"epoch-{e:04d}.safetensors" for e in store.spec["keep"]]
    assert all(torch.isfinite(p).all() for p in store.read(0, 2).values())


def test_a_list_without_a_needed_epoch_is_refused():
    with pytest.raises(ValueError, match=rf"experts.keep \[2\] lacks the epochs \[1, {EPOCHS}\], which this run"):
        run_of(keep=(2,))


def test_a_seeded_tower_is_shared_and_heads_are_not(tmp_path):
    image = {"name": "convnet", "weights": "random:7", "widths": (4,), "groups": 2, "projection": "linear"}
    run = run_of(image=dict(image), epochs=1)
    experts = [model_of(run, e).trained() for e in (0, 1)]
    student = build(run.model, TEXT_WIDTH, SIZE, run.seed + 1, "student", 3).trained()
    other = model_of(run_of(image=image | {"weights": "random:8"}), 0).trained()
    for name, p in experts[0].items():
        tower = name.startswith("image_tower.")
        norm = bool((p == 1).all() or (p == 0).all())  # all models start with equal normalisation weights
        assert torch.equal(p, experts[1][name]) == torch.equal(p, student[name]) == (tower or norm), name
        assert torch.equal(p, other[name]) == (not tower or norm), name
    store = begin_store(run, tmp_path, TEXT_WIDTH, {})
    assert store.spec["shared"] == sorted(n for n in store.shapes if n.startswith("image_tower."))


def test_a_frozen_tower_is_neither_trained_nor_stored(tmp_path):
    image = {
        "name": "convnet",
        "weights": "random",
        "widths": (4,),
        "groups": 2,
        "projection": "block",
    }
    tower = model_of(run_of(image=dict(image)), 0).image_tower.state_dict()
    save_file(tower, tmp_path / "weights.safetensors")
    image |= {"weights": str(tmp_path / "weights.safetensors"), "trainable": False}
    run = run_of(image=image, dropout=0.1)
    store, done = train(run, tmp_path)
    assert done and {n.split(".")[0] for n in store.shapes} == {"image_head", "text_head"}


def test_experts_of_given_weights_share_their_start(tmp_path):
    image = {"name": "test_vit", "weights": "random", "projection": "linear", "size": 32}
    tower = model_of(run_of(image=dict(image)), 9).image_tower.state_dict()
    save_file(tower, tmp_path / "weights.safetensors")
    run = run_of(image={**image, "weights": str(tmp_path / "weights.safetensors")}, epochs=1)
    store = begin_store(run, tmp_path / "store", TEXT_WIDTH, {})
    assert store.spec["shared"] == sorted(n for n in store.shapes if n.startswith("image_tower."))
    start = [model_of(run, e).trained() for e in (0, 1)]
    for name in store.shapes:
        same = torch.equal(start[0][name], start[1][name])
        if name in store.spec["shared"]:
            assert same and torch.equal(start[0][name], tower[name.removeprefix("image_tower.")])
    assert not torch.equal(start[0]["text_head.first.weight"], start[1]["text_head.first.weight"])


def test_a_diverging_expert_stops_with_its_last_good_epoch(tmp_path):
    run = run_of(lr_text=1e38, lr_image=1e38)
    with pytest.raises(ValueError, match=r"expert 0 diverged in epoch 1.*lower experts.lr_image and experts.lr_text"):
        train(run, tmp_path)
    store = Store.open(tmp_path)
    assert store.complete() == [] and all(torch.isfinite(p).all() for p in store.read(0, 0).values())


def test_a_store_of_another_protocol_is_refused(tmp_path):
    begin_store(run_of(), tmp_path, TEXT_WIDTH, {})
    spec = json.loads((tmp_path / "store.json").read_text())
    assert spec["epochs"] == EPOCHS and spec["keep"] == "all"
    with pytest.raises(ValueError, match="holds other experts"):
        begin_store(run_of(epochs=2), tmp_path, TEXT_WIDTH, {})


def test_a_split_smaller_than_the_batch_is_one_batch(tmp_path):
    few = prepared_split(images=2)
    store, done = train(run_of(batch=64), tmp_path, data=few)
    assert done and np.isfinite([m["loss"] for m in store.record(0)["metrics"][1:]]).all()
