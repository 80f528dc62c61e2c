"""Run files of tiny sweeps and searches, with a search space."""

import json

import tiny

from rmdd import config

TINY = tiny.changed(experts={"keep": "all"}, distill={"snapshots": 1})
METHODS = [f"distill.{key}={json.dumps(value)}" for key, value in TINY["distill"].items() if key != "budget"]
"""Overrides of the presets of LoRS; their budget also pays for the factors of the low-rank similarity."""
METHODS += ["distill.similarity.rank=2", "distill.budget=10"]
LR = {"loguniform": [0.1, 100]}
BOTH = {
    "distill.similarity.kind": {"choice": ["full", "low_rank"]},
    "distill.similarity.rank": {"int": [1, 2], "when": {"distill.similarity.kind": "low_rank"}},
}


def swept(storage):
    """Return the run file of a sweep."""
    return tiny.stored(storage, TINY)


def searched(place, space=None, snapshots=3, **rule):
    """Return the run file of a search over the image learning rate, or over `space`."""
    distill = {**TINY["distill"], "snapshots": snapshots, "budget": 10, "checkpoint_every": 1}
    search = {"space": space or {"distill.lr_image": LR}, "startup": 3, **rule}
    return tiny.stored(place, TINY, distill=distill, search=search)


def base_of(place="runs", space=None, **rule):
    return config.load(searched(place, space, **rule))
