"""MDM on drawn scenes: a tiny run, its training split, and experts that are random walks."""

from dataclasses import replace
from types import SimpleNamespace

import tiny
import torch
from toy import CPU, store_of

from rmdd import config
from rmdd.core.progress import Progress
from rmdd.distill.distribution import matching as features
from rmdd.execution.backend import Backend
from rmdd.execution.in_turn import SequentialExecutor
from rmdd.execution.parts import LocalParts
from rmdd.experts.train import expert_model
from rmdd.methods import method_of
from rmdd.methods.mdm import MDM, MDMObjective
from rmdd.pipeline import Pipeline

PAIRS, ITERATIONS = 6, 7
TINY = tiny.changed(
    data={"image_size": 8, "scenes": {"train": 24, "val": 6, "test": 6}},
    model={"image": {"weights": "random:0", "widths": [8]}, "text": {"projection": "block"}, "width": 6},
    experts={"num": 2, "epochs": 3, "batch": 8, "keep": "all"},
    evaluate={"students": 1, "reference": "auto", "baseline_draws": 1},
) | {
    "distill": {
        "method": "mdm",
        "budget": PAIRS,
        "phases": [{"pairs": PAIRS, "iterations": ITERATIONS}],
        "lr_image": 3.0,
        "lr_text": 2.0,
        "checkpoint_every": 3,
        "snapshots": 2,
        "options": {"real_batch": 8, "synthetic_batch": 4, "clip": 0.1},
    }
}


def run_of(folder, options=None, **distill):
    rule = {**TINY["distill"], **distill, "options": {**TINY["distill"]["options"], **(options or {})}}
    return config.load({**TINY, "distill": rule, "runtime": {"storage": str(folder), "ray": "off", "track": "none"}})


def made(folder):
    """Return a run of MDM, its training split and its expert store."""
    run = run_of(folder)
    pipeline = Pipeline(run, Backend(SequentialExecutor(1)), Progress(quiet=True))
    train = pipeline.embedded("train")
    item = pipeline.item()
    store = store_of(item.paths.store, model_of(run, train).trained(), epochs=3)
    return SimpleNamespace(folder=folder, run=run, train=train, store=store, item=item)


def model_of(run, train):
    return expert_model(run.model, run.data.image_size, run.seed_of("experts"), 0, train.texts.shape[1])


def rank(made, run, number=0, size=1):
    return features.Rank(method_of(run), 0, made.store, model_of(run, made.train), made.train, CPU, number, size)


def distil(made, folder, run=None, ranks=None, **hooks):
    run = run or made.run
    model = model_of(run, made.train)
    return features.distill_phase(
        method_of(run), 0, made.store, model, made.train, folder, CPU, "key", ranks=ranks, **hooks
    )


def side_by_side(made, run, size):
    return LocalParts([rank(made, run, number, size) for number in range(size)])


class Learning(MDM):
    """MDM with one additional learned number that scales its gradients: a minimal stand-in for an online model."""

    def objective(self, phase, store, train, model, device):
        return Learner(self, phase, store, train, model, device)

    def exported(self, synthetic):
        return replace(synthetic, texts=2 * synthetic.texts)


class Learner(MDMObjective):
    weight = torch.ones(())

    def gradient(self, synthetic, iteration, draw):
        gradient, loss_parts = super().gradient(synthetic, iteration, draw)
        return gradient.map(lambda t: self.weight * t), loss_parts

    def after(self, synthetic, iteration):
        self.weight = 0.9 * self.weight + 0.01 * iteration * synthetic.images.mean()

    def tensors(self):
        return {"weight": self.weight}

    def load(self, tensors):
        self.weight = tensors["weight"]
