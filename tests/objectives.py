"""Shared code for tests of distribution matching: real pairs in memory, and a simple loop over an objective."""

from pathlib import Path

import numpy as np
import torch
import toy

from rmdd import config, methods
from rmdd.data.shards import Dataset
from rmdd.data.splits import Split
from rmdd.models.dual import build
from rmdd.models.prepared import PreparedSplit

WORDS = ("red circle", "green square by a tree", "blue thing")


def prepared_split(images=24, width=toy.TEXT_WIDTH, captions=2):
    """Return images of three colours and caption embeddings of three directions, with noise."""
    random = np.random.default_rng(0)
    colour = np.array([(250, 20, 20), (20, 250, 20), (20, 20, 250)])[np.arange(images) % 3]
    pictures = np.clip(colour[:, :, None, None] + random.integers(-90, 90, (images, 3, toy.SIZE, toy.SIZE)), 0, 255)
    image_of = np.repeat(np.arange(images), captions)
    texts = np.eye(width)[image_of % 3] + 0.2 * random.standard_normal((len(image_of), width))
    said = [f"{WORDS[i % 3]} {n}" for n, i in enumerate(image_of)]
    names = [str(i) for i in range(images)]
    pixels = pictures.astype(np.uint8)
    split = Split("train", pixels, said, image_of, names, {}, Dataset(Path(), {}), np.arange(images), Path())
    return PreparedSplit(split, texts.astype(np.float32), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))


def run_of(method, options, *, pairs=6, iterations=5, text=None, weights="random:0", **distill):
    image = toy.TINY["model"]["image"] | {"weights": weights}
    model = toy.TINY["model"] | {"image": image} | ({"text": text} if text else {})
    plan = {"method": method, "phases": [{"pairs": pairs, "iterations": iterations}], "options": options}
    rule = {"budget": pairs, "lr_image": 0.1, "lr_text": 0.1, **distill}
    return config.load({**toy.TINY, "model": model, "distill": plan | rule})


def opened(run, store, train):
    """Return a distribution-matching method, its initial set, and its objective."""
    method = methods.find(run.distill.method)(run)
    begun = method.initial(0, train, method.records(0, train, store))
    return method, begun, objective_of(method, store, train)


def objective_of(method, store, train):
    run = method.run
    model = build(run.model, train.texts.shape[1], run.data.image_size, run.seed_of("experts"), "expert", 0)
    return method.objective(0, store, train, model, torch.device("cpu"))


def descend(objective, synthetic, iterations, *, start=0, lr=0.1):
    """Take gradient steps without momentum, with one draw each; return the last synthetic set and all losses."""
    losses = []
    for iteration in range(start, start + iterations):
        result, parts = objective.gradient(synthetic, iteration, 0)
        losses.append(parts)
        moved = {n: t - lr * result.tensors()[n] for n, t in synthetic.tensors().items()}
        synthetic = synthetic.with_tensors(moved)
        objective.after(synthetic, iteration)
    return synthetic, losses
