"""The toy problem for tests of matching and of distillation methods: a tiny run, its experts, and an initial set."""

import json
from types import SimpleNamespace

import torch

from rmdd import config
from rmdd.distill.similarity import initial as initial_similarity
from rmdd.distill.synthetic import Synthetic
from rmdd.distill.trajectory.matching import Matcher
from rmdd.distill.trajectory.stepping import distill_phase
from rmdd.experts.store import Store, Writer
from rmdd.methods import matching_method
from rmdd.models.dual import build

TEXT_WIDTH, SIZE, PAIRS, EPOCHS, EXPERTS = 5, 8, 6, 3, 2
CPU = torch.device("cpu")
RATES = {"lr_image": 0.5, "lr_text": 0.3, "lr_similarity": 0.7, "lr_lr": 1e-4}
MODEL = {
    "image": {"name": "convnet", "weights": "random", "widths": (4,), "groups": 2, "projection": "linear"},
    "text": {"name": "hashing"},
    "width": 6,
    "dropout": 0.1,
    "temperature": 0.5,
}


def run_of(*, iterations=7, phases=None, **distill):
    """Return a run with two toy experts; `distill` overrides fields of its `distill` section."""
    plan = phases or (config.Phase(pairs=PAIRS, start=0, stop=2, endpoint=EPOCHS, iterations=iterations),)
    rule = {"phases": plan, "budget": 10, "batch": 4, "steps": 2, "checkpoint_every": 3, "snapshots": 2}
    return config.Run(
        seed=3,
        data=config.Data(image_size=SIZE),
        model=config.Model(**MODEL),
        experts=config.Experts(num=EXPERTS, epochs=EPOCHS, keep="all"),
        distill=config.Distill(**{**rule, **RATES, **distill}),
    )


TINY = {
    "seed": 3,
    "data": {"image_size": SIZE},
    "model": {**MODEL, "dropout": 0.0},
    "experts": {"num": EXPERTS, "epochs": EPOCHS, "keep": "all"},
    "distill": {"budget": 10, "batch": 4, "steps": 3, **RATES},
}
PHASE = {"pairs": PAIRS, "start": 0, "stop": 2, "endpoint": EPOCHS, "iterations": 4}


def method_run(method, **changes):
    """Return a run with the defaults of `method` except size and outer learning rates; `changes` go into `distill`."""
    frozen = {"image": {**MODEL["image"], "weights": "random:0", "trainable": False, "projection": "block"}}
    model = TINY["model"] | (frozen if method == "repblend" else {})
    plan = {"method": method, "phases": [PHASE], **TINY["distill"], **changes}
    if plan.get("similarity", {}).get("kind") != "identity" and method not in ("mtt_vl", "tesla_vl", "ptm_st"):
        plan["similarity"] = {"rank": 2, **plan.get("similarity", {})}
    return config.load({**TINY, "model": model, "distill": plan})


def encoder(model=None):
    return build(model or run_of().model, TEXT_WIDTH, SIZE, seed=0, who="expert")


def store_of(path, theta, *, epochs=EPOCHS, experts=EXPERTS):
    """Write a store of experts that are random walks from `theta`, with every epoch kept."""
    shapes = {n: tuple(p.shape) for n, p in theta.items()}
    store = Store.create(path, shapes, shared={}, epochs=epochs, keep=None, dtype="float32", facts={})
    random = torch.Generator().manual_seed(0)
    for expert in range(experts):
        writer, point = Writer(store, expert), theta
        for _ in range(epochs + 1):
            writer.add(point, {})
            point = {n: p + 0.2 * torch.randn(p.shape, generator=random) for n, p in point.items()}
        writer.finish()
    return store


class DoubleStore(Store):
    """A store that returns checkpoints in float64, for comparisons with slow reference implementations."""

    def read(self, expert, epoch):
        return {n: p.double() for n, p in super().read(expert, epoch).items()}


def first_set(kind="full", pairs=PAIRS, **similarity):
    random = torch.Generator().manual_seed(1)
    rule = config.Similarity(**{"kind": kind, "rank": 2, **similarity})
    return Synthetic(
        images=torch.randn(pairs, 3, SIZE, SIZE, generator=random),
        texts=torch.randn(pairs, TEXT_WIDTH, generator=random),
        lr_image=torch.tensor(0.1),
        lr_text=torch.tensor(0.1),
        similarity=initial_similarity(rule, pairs, random),
        alpha=rule.alpha,
    )


def made(run, store, phase=0):
    """Return all parts of a phase in float64 (model, store, initial set, matcher), for a slow second implementation."""
    model, similarity = encoder(run.model).double(), run.distill.similarity.model_dump(exclude={"clamp"})
    store = DoubleStore.open(store.path)
    return SimpleNamespace(
        run=run,
        model=model,
        store=store,
        begun=first_set(pairs=run.distill.phases[phase].pairs, **similarity).map(torch.Tensor.double),
        matcher=Matcher(matching_method(run), phase, store, model, CPU),
    )


def distil(run, store, folder, *, phase=0, kind="full", key="key", **hooks):
    pairs = run.distill.phases[phase].pairs
    return distill_phase(
        matching_method(run), phase, store, encoder(run.model), first_set(kind, pairs), folder, CPU, key, **hooks
    )


def stop_after(steps):
    """Return callbacks `on_step` and `should_stop`, which end a phase after a number of iterations."""
    done = []
    return {"on_step": lambda metrics: done.append(metrics), "should_stop": lambda: len(done) >= steps}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_same_results(a, b):
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names == sorted(p.name for p in b.glob("*.safetensors")) and len(names) > 1
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    untimed = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(folder)] for folder in (a, b)]
    assert untimed[0] == untimed[1]
