"""MDM: initial pairs, teacher and gradient compared with slow implementations, and a run resumed after a kill."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from processes import Rmdd, done
from toy import CPU, same_tensors
from toy_mdm import TINY, distil, made, model_of, run_of

from rmdd import config
from rmdd.core.files import read_json
from rmdd.core.seeding import generator
from rmdd.core.storage import run_folder
from rmdd.data.images import normalise
from rmdd.distill.distribution.joint import Embedded, centres, nearest_pairs
from rmdd.distill.sets import load_set
from rmdd.methods import method_of
from rmdd.methods.mdm import Teacher


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return made(tmp_path_factory.mktemp("mdm"))


def teacher_of(toy, options=None):
    method = method_of(run_of(toy.folder, options))
    return Teacher(method, 0, toy.store, model_of(toy.run, toy.train), CPU)


def params_of(teacher):
    return {n: p.clone() for n, p in teacher.model.named_parameters()}


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


# -- initial pairs ---------------------------------------------------------------------------------------------------


def slow_rows(model, train, side):
    rows = []
    for record in range(len(train.texts)):
        pixels = torch.from_numpy(np.array(train.split.images[train.split.image_of[record]]))[None]
        with torch.no_grad():
            v = model.embed_images(normalise(pixels, train.mean, train.std))[0]
            t = model.embed_texts(torch.from_numpy(np.array(train.texts[record]))[None])[0]
        rows.append({"joint": torch.cat([v, t]) / math.sqrt(2), "image": v, "text": t}[side])
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["joint", "image", "text"])
def test_initial_pairs_are_those_nearest_to_the_cluster_centres(toy, side):
    teacher = teacher_of(toy)
    teacher.load_initial()
    rows = slow_rows(teacher.model, toy.train, side)
    embedded = Embedded.by(teacher.model, toy.train, CPU, side)
    torch.testing.assert_close(embedded.rows(np.arange(len(rows))), rows, rtol=1e-4, atol=1e-5)
    chosen = nearest_pairs(embedded, 6, generator(0, "x"))
    assert chosen == nearest_pairs(embedded, 6, generator(0, "x")) and len(set(chosen)) == 6
    random = generator(0, "x")
    drawn = np.sort(torch.randperm(len(rows), generator=random).numpy())
    middle = centres(embedded.rows(drawn), 6, random)
    assert middle.norm(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    label = (rows @ middle.T).argmax(dim=1)
    for k in range(6):
        members = [r for r in range(len(rows)) if label[r] == k]
        mean = rows[members].sum(dim=0)
        assert cosine(mean, middle[k]) == pytest.approx(1, abs=1e-5), "this test needs a k-means that has converged"
    free = [k for k in range(6) if int(label[chosen[k]]) == k]
    pictures = toy.train.split.image_of[chosen]
    assert len(free) >= 4 and len(set(pictures.tolist())) == 6
    for k in free:
        near = rows @ middle[k]
        better = [r for r in range(len(rows)) if label[r] == k and near[r] > near[chosen[k]] + 1e-6]
        assert all(toy.train.split.image_of[r] in pictures for r in better)


def test_a_cluster_without_an_unused_image_takes_another_pair(toy):
    """With as many clusters as captions, every pair must be chosen; with one per image, every image exactly once."""
    teacher = teacher_of(toy)
    teacher.load_initial()
    total, pictures = len(toy.train.texts), len(toy.train.split)
    embedded = Embedded.by(teacher.model, toy.train, CPU, "image")
    assert total > pictures
    chosen = nearest_pairs(embedded, total, generator(1, "x"))
    assert sorted(chosen) == list(range(total))
    fewer = nearest_pairs(embedded, pictures, generator(1, "x"))
    assert len(set(toy.train.split.image_of[fewer].tolist())) == pictures, (
        "no image may be used twice while others are unused"
    )


@pytest.mark.parametrize(("options", "distill"), [({"cluster": "random"}, {}), ({}, {"init": "noise"})])
def test_random_pairs_and_noise_need_no_teacher(toy, options, distill):
    method = method_of(run_of(toy.folder, options, **distill))
    records = method.records(0, toy.train, None)
    assert len(set(records)) == 6
    begun = method.initial(0, toy.train, records)
    real = torch.from_numpy(toy.train.texts[records])
    assert torch.equal(begun.texts, real) == (not distill)


def test_more_pairs_than_captions_are_rejected(toy):
    run = run_of(toy.folder, budget=5000, phases=[{"pairs": 5000}])
    with pytest.raises(ValueError, match=r"wants 5000 pairs but the train split has \d+ caption records"):
        method_of(run).records(0, toy.train, toy.store)


# -- teacher model ---------------------------------------------------------------------------------------------------


def test_a_mixed_teacher_merges_two_checkpoints_around_the_anchor(toy):
    teacher, teachers = teacher_of(toy), []
    anchor = toy.store.read(0, 0)
    for iteration in range(4):
        teacher.load_draw(iteration, 0)
        teachers.append(params_of(teacher))
        errors = []
        for e1, t1 in [(e, t) for e in range(2) for t in range(1, 4)]:
            for e2, t2 in [(e, t) for e in range(2) for t in range(1, 4)]:
                w1, w2 = toy.store.read(e1, t1), toy.store.read(e2, t2)
                error = 0.0
                for n, w in anchor.items():
                    d1, d2 = (w1[n] - w).flatten().double(), (w2[n] - w).flatten().double()
                    c = min(1.0, max(0.0, cosine(d1, d2))) if d1.norm() * d2.norm() > 0 else 0.0
                    wanted = w.flatten() + 0.5 * c / (1 + c) * (d1 + d2)
                    error = max(error, float((teachers[-1][n].flatten() - wanted).abs().max()))
                errors.append((error, (e1, t1) != (e2, t2)))
        assert min(errors)[0] < 1e-5 and min(errors)[1]
    assert not same_tensors(teachers[0], teachers[1])
    assert len(teacher.pool._cached) <= 7, "the pool must hold at most six checkpoints and the anchor"


def test_each_draw_has_its_own_teacher_for_resample_every_iterations(toy):
    teacher, params = teacher_of(toy, {"resample_every": 3}), {}
    for iteration in range(6):
        for draw in (0, 1):
            teacher.load_draw(iteration, draw)
            params[iteration, draw] = params_of(teacher)
    assert same_tensors(params[0, 0], params[2, 0]) and same_tensors(params[3, 1], params[5, 1])
    assert not same_tensors(params[2, 0], params[3, 0]) and not same_tensors(params[0, 0], params[0, 1])


@pytest.mark.parametrize("kind", ["weighted_sum", "naive", "expert", "pretrained"])
def test_other_teachers(toy, kind):
    teacher, anchor = teacher_of(toy, {"teacher": kind}), toy.store.read(0, 0)
    cells = [(e, t) for e in range(2) for t in ((3,) if kind == "weighted_sum" else (1, 2, 3))]
    for iteration in range(6):
        teacher.load_draw(iteration, 0)
        now = params_of(teacher)
        if kind == "pretrained":
            assert same_tensors(now, anchor)
            continue
        shares = []
        for cell in cells:
            change = {n: p - anchor[n] for n, p in toy.store.read(*cell).items()}
            expert = torch.cat([d.flatten() for d in change.values()]).double()
            merged = torch.cat([(now[n] - anchor[n]).flatten() for n in change]).double()
            share = float(expert @ merged / (expert @ expert))
            if (merged - share * expert).norm() < 1e-5 * expert.norm():
                shares.append(share)
        low, high = {"weighted_sum": (0.2, 0.5), "naive": (0.1, 0.9), "expert": (1.0, 1.0)}[kind]
        assert len(shares) == 1 and low - 1e-5 <= shares[0] <= high + 1e-5


def test_partners_of_one_expert_are_anchored_at_its_start(toy, monkeypatch):
    reads = []
    read = toy.store.read
    monkeypatch.setattr(type(toy.store), "read", lambda self, e, t: reads.append((e, t)) or read(e, t))
    for iteration in range(8):
        teacher = teacher_of(toy, {"partners": "same_expert"})
        reads.clear()
        teacher.load_draw(iteration, 0)
        assert len(reads) == 3 and len({e for e, _ in reads}) == 1 and {0} < {t for _, t in reads}
    mixed = teacher_of(toy)
    reads.clear()
    mixed.load_draw(0, 0)
    assert len(reads) == 3 and (0, 0) in reads, "a merged teacher must read two checkpoints and the anchor only"


# -- gradient of the loss --------------------------------------------------------------------------------------------


def slow_loss(model, o, real, distilled, tau):
    """Compute the loss of the paper with double loops over pairs; each embedding is normalised by a separate call."""

    def units(x):
        return [row / row.norm() for row in x]

    def joint(v, t, sign):
        return [(x + sign * y) / (x + sign * y).norm() for x, y in zip(v, t, strict=True)]

    def mean(a, b):
        total = 0.0
        for x in a:
            for y in b:
                phi = torch.acos((x @ y).clamp(-1 + 1e-6, 1 - 1e-6))
                total = total + torch.exp(-(phi**2) / (2 * o.sigma**2))
        return total / (len(a) * len(b))

    sides = []
    for images, texts in (real, distilled):
        v, t = model.image_head(model.image_tower(images)), model.text_head(texts)
        sides.append((units(v), units(t)))
    (vr, tr), (v, t) = sides
    z = torch.stack([torch.stack([x @ y / tau for y in t]) for x in v])
    both = [torch.logsumexp(z[i], 0) + torch.logsumexp(z[:, i], 0) - 2 * z[i, i] for i in range(len(v))]
    nce = sum(both) / (2 * len(v))
    energies = []
    for sign in (1, -1):
        a, b = joint(vr, tr, sign), joint(v, t, sign)
        energies.append(torch.sqrt((mean(a, a) + mean(b, b) - 2 * mean(a, b)).clamp(min=0) + 1e-8))
    return nce + o.agreement * energies[0] + o.discrepancy * energies[1]


def test_the_gradient_is_that_of_the_double_loop(toy):
    run = run_of(toy.folder, {"agreement": 0.7, "discrepancy": 0.9})
    method = method_of(run)
    model = model_of(run, toy.train).double()
    objective = method.objective(0, toy.store, toy.train, model, CPU)
    begun = method.initial(0, toy.train, [0, 5, 11, 17, 30, 41]).map(torch.Tensor.double)
    for iteration in (0, 3):
        gradient, values = objective.gradient(begun, iteration, 0)
        random = generator(method.seed, "mdm batches", 0, iteration, 0)
        real = torch.randperm(len(toy.train.texts), generator=random)[:8].numpy()
        rows = torch.randperm(6, generator=random)[:4]
        pixels = torch.from_numpy(np.array(toy.train.split.images[toy.train.split.image_of[real]]))
        texts = torch.from_numpy(np.array(toy.train.texts[real])).double()
        real_pairs = normalise(pixels, toy.train.mean, toy.train.std).double(), texts
        leaves = [begun.images.clone().requires_grad_(), begun.texts.clone().requires_grad_()]
        loss = slow_loss(model, method.options, real_pairs, (leaves[0][rows], leaves[1][rows]), run.model.temperature)
        slow = torch.autograd.grad(loss, leaves)
        # The tolerance is wide: to normalise joint features, only the fast version adds a small constant to the norm.
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for actual, wanted in zip((gradient.images, gradient.texts), slow, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
        untouched = sorted(set(range(6)) - set(rows.tolist()))
        assert not gradient.images[untouched].any() and not gradient.texts[untouched].any()
        assert not gradient.lr_image and not gradient.lr_text


def test_dropout_is_off_by_default_and_seeded_if_enabled(toy):
    gradients = {}
    for dropout in (False, True):
        method = method_of(run_of(toy.folder, {"teacher_dropout": dropout}))
        begun = method.initial(0, toy.train, list(range(6)))
        for turn in (0, 1):
            torch.manual_seed(turn)
            objective = method.objective(0, toy.store, toy.train, model_of(toy.run, toy.train), CPU)
            gradients[dropout, turn] = objective.gradient(begun, 0, 0)[0].tensors()
            assert not objective.model.training
        assert same_tensors(gradients[dropout, 0], gradients[dropout, 1])
    assert not same_tensors(gradients[False, 0], gradients[True, 0])


def test_momentum_moves_pairs_that_were_not_drawn(toy, tmp_path):
    run = run_of(toy.folder, {"synthetic_batch": 2}, momentum=0.9)
    distil(toy, tmp_path, run)
    start, end = (load_set(tmp_path / f) for f in ("start.safetensors", "set-000007.safetensors"))
    moved = (start.images != end.images).flatten(1).any(1)
    assert moved.sum() > 2 and torch.equal(start.lr_image, end.lr_image)


# -- complete runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill": {"options": {"synthetic_batch": 1}}}, "synthetic_batch is 1, but a single pair has no negatives"),
        ({"distill": {"options": {"first_epoch": 9}}}, r"first_epoch 9 is larger than experts.epochs 3"),
        ({"distill": {"options": {"kernel": "cosine"}}}, "distill.options.kernel"),
        ({"distill": {"similarity": {"kind": "full"}}}, "set distill.similarity.kind: identity"),
        ({"model": {"image": {"weights": "random"}}}, r"draws new ones for each expert; set random:SEED"),
    ],
)
def test_invalid_settings_are_rejected(change, words):
    from rmdd.config.runfile import filled

    with pytest.raises(config.ConfigError, match=words):
        config.load(filled(change, TINY))


RATES = {"flickr8k": (100, 100, 1000), "flickr30k": (100, 1000, 1000), "coco": (1000, 1000, 5000)}


@pytest.mark.parametrize("data", RATES)
def test_cells_of_table_s3(data):
    for pairs, rate in zip((100, 200, 500), RATES[data], strict=True):
        run = config.load(f"{data}_mdm_{pairs}", ["data.root=somewhere"])
        rule, (phase,), o = run.distill, run.distill.phases, method_of(run).options
        assert (phase.pairs, phase.iterations, rule.lr_image, rule.lr_text) == (pairs, 3000, rate, rate)
        assert (rule.momentum, rule.ema, rule.inner_lr, rule.loss) == (0.5, 0, 0.1, "infonce")
        assert (o.clip, o.real_batch, o.synthetic_batch, o.alpha, o.sigma) == (1.0, 64, 64, 0.5, 0.5)
        assert (o.agreement, o.discrepancy, o.contrastive, o.kernel, o.statistic) == (0.8, 0.8, 1.0, "geodesic", "v")
        assert (o.root, o.teacher, o.partners, o.resample_every, o.first_epoch) == (True, "mixed", "any", 1, 1)
        assert (o.cluster, o.teacher_dropout, o.positive_cosine) == ("joint", False, True)
        assert (run.model.temperature, run.experts.num, run.experts.epochs, run.experts.keep) == (0.07, 20, 10, "all")
        assert (run.evaluate.epochs, run.evaluate.augment, run.evaluate.momentum) == (100, "dsa", 0.9)
        assert (run.evaluate.weight_decay, run.evaluate.lr_drop) == (5e-4, 0.1)


def write_run(folder, **distill):
    rule = {**TINY["distill"], "phases": [{"pairs": 6, "iterations": 60}], **distill}
    folder.mkdir()
    runtime = {"storage": str(folder / "runs"), "ray": "off", "track": "none"}
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY, "distill": rule, "runtime": runtime}))
    return folder / "run.yaml"


def phase_files(folder: Path):
    files = [p for p in (folder / "runs").glob("phases/*/phase-0/*") if p.suffix == ".safetensors"]
    return {p.name: p.read_bytes() for p in files}


def test_a_killed_run_resumes_with_the_same_bits(tmp_path):
    uninterrupted, broken = write_run(tmp_path / "whole"), write_run(tmp_path / "broken")
    done("run", uninterrupted, "--quiet")
    folder = run_folder(config.load(uninterrupted))
    evaluation = read_json(folder / "evaluation.json")
    assert evaluation["table"]["mdm"]["test_last"]["R@mean"]["n"] == 1
    assert len(yaml.safe_load((folder / "run.yaml").read_text())["distill"]["phases"]) == 1
    assert (folder / "report.html").is_file() and (folder / "set" / "set.json").is_file()

    process = Rmdd("distill", broken, "--quiet")
    deadline = time.monotonic() + 300
    checkpoint = "broken/runs/phases/*/phase-0/state.safetensors"
    while time.monotonic() < deadline and not list(tmp_path.glob(checkpoint)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    assert "set-000060.safetensors" not in phase_files(tmp_path / "broken")
    done("distill", broken, "--quiet")
    assert phase_files(tmp_path / "broken") == phase_files(tmp_path / "whole")
    (log,) = (tmp_path / "broken").glob("runs/phases/*/phase-0/metrics.jsonl")
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == list(range(1, 61))
