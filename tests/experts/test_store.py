import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmdd.experts.store import Store, Writer

SHAPES = {"image_tower.w": (4, 3), "image_tower.b": (4,), "text_head.w": (3, 2)}
EPOCHS = 4


def create(path, *, keep=None, shared=None, dtype="float32", epochs=EPOCHS, facts=None):
    return Store.create(
        path, SHAPES, shared=shared or {}, epochs=epochs, keep=keep, dtype=dtype, facts=facts or {"data": "abc"}
    )


def walk(seed=0, start=None):
    random = torch.Generator().manual_seed(seed)
    theta = {n: torch.randn(s, generator=random) for n, s in SHAPES.items()} | (start or {})
    points = [theta]
    for _ in range(EPOCHS):
        points.append({n: p + 0.1 * torch.randn(p.shape, generator=random) for n, p in points[-1].items()})
    return points


def momentum_of(theta):
    return {n: 0.5 * p for n, p in theta.items()}


def write(store, expert, points):
    writer = Writer(store, expert)
    for epoch, theta in enumerate(points):
        writer.add(theta, {"loss": float(epoch)})
    writer.finish()


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_parameters_are_read_back_exactly(tmp_path):
    store, points = create(tmp_path), walk()
    write(store, 3, points)
    again = Store.open(str(tmp_path))
    assert again.complete() == [3] and again.is_complete(3) and not again.is_complete(0)
    assert again.epochs == EPOCHS and again.spec["data"] == "abc"
    assert all(equal(again.read(3, e), points[e]) for e in range(EPOCHS + 1))
    assert [m["loss"] for m in again.record(3)["metrics"]] == [0, 1, 2, 3, 4]
    norms = again.norms(3)
    for name in SHAPES:
        lengths = [(points[e + 1][name] - points[e][name]).double().norm().item() for e in range(EPOCHS)]
        assert norms[name].tolist() == pytest.approx(lengths, rel=1e-7)
    assert again.size() == sum(len(b) for b in files(tmp_path).values())
    assert not list(tmp_path.rglob("running*")) and not list(tmp_path.rglob("*.tmp"))


def test_the_first_last_and_requested_epochs_are_kept(tmp_path):
    store, points = create(tmp_path, keep=[2]), walk()
    write(store, 0, points)
    assert sorted(p.name for p in (tmp_path / "expert-000").glob("*.safetensors")) == [
        f"epoch-{e:04d}.safetensors" for e in (0, 2, 4)
    ]
    assert all(equal(store.read(0, e), points[e]) for e in (0, 2, 4))
    assert all(len(s) == EPOCHS for s in store.norms(0).values())
    with pytest.raises(ValueError, match=r"keeps only epochs \[0, 2, 4\], not 3; train with experts.keep: all"):
        store.read(0, 3)


def test_a_shared_start_is_stored_once(tmp_path):
    shared = {n: p for n, p in walk(7)[0].items() if n.startswith("image_tower.")}
    store = create(tmp_path, shared=shared)
    for expert in (0, 1):
        write(store, expert, walk(expert, shared))
        assert list(load_file(tmp_path / f"expert-00{expert}" / "epoch-0000.safetensors")) == ["text_head.w"]
        assert equal(store.read(expert, 0), walk(expert, shared)[0])


def test_returned_parameters_are_copies(tmp_path):
    shared = {n: p for n, p in walk(7)[0].items() if n.startswith("image_tower.")}
    store, points = create(tmp_path, shared=shared), walk(0, shared)
    write(store, 0, points)
    for epoch in (0, 1):
        for p in store.read(0, epoch).values():
            p.add_(1)
        assert equal(store.read(0, epoch), points[epoch])


def test_bfloat16_deltas_are_small_and_close(tmp_path):
    full, half, points = create(tmp_path / "full"), create(tmp_path / "half", dtype="bfloat16-delta"), walk()
    write(full, 0, points)
    write(half, 0, points)
    assert equal(half.read(0, 0), points[0])
    for epoch in range(1, EPOCHS + 1):
        result = half.read(0, epoch)
        for name, p in points[epoch].items():
            assert result[name].dtype == torch.float32
            delta = (p - points[0][name]).abs()
            assert ((result[name] - p).abs() <= 2**-8 * delta + 1e-6).all()
        stored = load_file(tmp_path / "half" / "expert-000" / f"epoch-{epoch:04d}.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert full.record(0)["step_norms"] == half.record(0)["step_norms"]


def test_reading_a_checkpoint_opens_only_its_file(tmp_path):
    store, points = create(tmp_path), walk()
    write(store, 0, points)
    for path in tmp_path.rglob("*.safetensors"):
        if path.name != "epoch-0002.safetensors":
            path.unlink()
    assert equal(store.read(0, 2), points[2])
    with pytest.raises(ValueError, match="epoch-0003.safetensors is missing.*train that expert again"):
        store.read(0, 3)


def test_an_unfinished_expert_is_not_listed(tmp_path):
    store, points = create(tmp_path), walk()
    writer = Writer(store, 0)
    for theta in points:
        writer.add(theta, {})
        assert store.complete() == [] and not store.is_complete(0)
    writer.finish()
    assert store.complete() == [0]


@pytest.mark.parametrize("stop", range(1, EPOCHS + 2))
def test_a_writer_resumes_after_the_last_epoch(tmp_path, stop):
    points = walk()
    whole, broken = create(tmp_path / "whole", keep=[2]), create(tmp_path / "broken", keep=[2])
    write(whole, 0, points)
    first = Writer(broken, 0)
    for epoch in range(stop):
        first.add(points[epoch], {"loss": float(epoch)}, momentum_of(points[epoch]))
    again = Writer(Store.open(tmp_path / "broken"), 0)
    assert again.epoch == stop - 1
    assert equal(again.params, points[stop - 1])
    momentum = momentum_of(points[stop - 1])
    assert again.momentum.keys() == momentum.keys()
    assert all(torch.equal(again.momentum[n], b) for n, b in momentum.items())
    for epoch in range(stop, EPOCHS + 1):
        again.add(points[epoch], {"loss": float(epoch)})
    again.finish()
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_a_kill_between_the_checkpoint_and_the_running_state_costs_one_epoch(tmp_path):
    points = walk()
    store = create(tmp_path)
    writer = Writer(store, 0)
    for theta in points[:2]:
        writer.add(theta, {})
    before = writer.running.read_bytes()
    writer.add(points[2], {})
    writer.running.write_bytes(before)
    again = Writer(store, 0)
    assert again.epoch == 1
    for theta in points[2:]:
        again.add(theta, {})
    again.finish()
    assert equal(store.read(0, 2), points[2])


def test_leftovers_without_a_running_state_are_deleted(tmp_path):
    store = create(tmp_path)
    leftover = store.folder(0) / "epoch-0000.safetensors"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    assert Writer(store, 0).epoch == -1 and not leftover.exists()


def test_a_finished_expert_is_never_written_again(tmp_path):
    store, points = create(tmp_path), walk()
    write(store, 0, points)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="expert 0 .* is complete"):
        Writer(store, 0)
    assert files(tmp_path) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_diverged_expert_is_refused_before_anything_is_written(tmp_path, number):
    store, points = create(tmp_path), walk()
    writer = Writer(store, 0)
    writer.add(points[0], {})
    before = files(tmp_path)
    points[1]["text_head.w"][0, 0] = number
    with pytest.raises(ValueError, match=r"expert 0 diverged in epoch 1.*text_head.w.*lower experts.lr_image"):
        writer.add(points[1], {})
    assert files(tmp_path) == before and Writer(store, 0).epoch == 0


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    store = create(tmp_path)
    write(store, 0, walk())
    path = store.folder(0) / "epoch-0002.safetensors"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    with pytest.raises(ValueError, match="epoch-0002.safetensors is damaged .*train that expert again"):
        store.read(0, 2)


def test_a_damaged_running_state_is_refused(tmp_path):
    store = create(tmp_path)
    writer = Writer(store, 0)
    writer.add(walk()[0], {})
    writer.running.write_bytes(writer.running.read_bytes()[:-7])
    with pytest.raises(ValueError, match="running.safetensors is damaged .*train that expert again"):
        Writer(store, 0)


def test_parameters_of_another_model_are_refused(tmp_path):
    writer = Writer(create(tmp_path), 0)
    theta = walk()[0]
    with pytest.raises(ValueError, match=r"another model: missing \['text_head.w'\]"):
        writer.add({n: p for n, p in theta.items() if n != "text_head.w"}, {})
    with pytest.raises(ValueError, match=r"different shapes .*text_head.w \(2, 3\) instead of \(3, 2\)"):
        writer.add({n: p.T if n == "text_head.w" else p for n, p in theta.items()}, {})
    with pytest.raises(ValueError, match="another order"):
        writer.add(dict(reversed(theta.items())), {})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    store = create(tmp_path)
    write(store, 0, walk())
    save_file({"text_head.w": torch.zeros(3, 2)}, store.folder(0) / "epoch-0002.safetensors")
    with pytest.raises(ValueError, match="another model: missing"):
        store.read(0, 2)


def test_creating_twice_opens_only_the_same_store(tmp_path):
    write(create(tmp_path, keep=[2]), 0, walk())
    assert create(tmp_path, keep=[2]).complete() == [0]
    for other in (
        {"keep": [3]},
        {"keep": [2], "epochs": 5},
        {"keep": [2], "dtype": "bfloat16-delta"},
        {"keep": [2], "facts": {"data": "x"}},
    ):
        with pytest.raises(ValueError, match="holds other experts.*use another storage folder"):
            create(tmp_path, **other)


def test_opening_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="no expert store at .*train experts first"):
        Store.open(tmp_path)
    create(tmp_path)
    spec = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(spec | {"schema_version": 9}))
    with pytest.raises(ValueError, match="schema version 9, this version of rmdd reads 1"):
        Store.open(tmp_path)
