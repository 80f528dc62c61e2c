"""Runs with probes, and how a test writes them."""

import copy

from rmdd import config

WIDTH = 16
BASE = {
    "name": "probed",
    "data": {"source": "scenes", "image_size": 16, "scenes": {"train": 10, "val": 4, "test": 4, "size": 16}},
    "model": {
        "image": {"name": "convnet", "weights": "random", "widths": [4], "groups": 2, "projection": "linear"},
        "text": {"name": "hashing", "width": WIDTH, "projection": "linear"},
        "width": 8,
    },
    "experts": {"num": 1, "epochs": 1, "batch": 16, "augment": {"crop": False, "flip": 0, "randaugment_ops": 0}},
    "distill": {
        "budget": 5,
        "phases": [{"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 2}],
        "batch": 3,
        "steps": 1,
        "snapshots": 1,
        **{name: 0.1 for name in ("lr_image", "lr_text", "lr_similarity")},
        "lr_lr": 1e-5,
    },
    "evaluate": {
        "epochs": 1,
        "students": 2,
        "reference": False,
        "baseline_lrs": [0.1],
        "baseline_losses": ["infonce"],
        "baseline_draws": 1,
    },
}


def run_of(storage, asked, *overrides, **data):
    raw = copy.deepcopy(BASE) | {"runtime": {"storage": str(storage), "ray": "off", "track": "none"}}
    raw["evaluate"]["probes"] = asked
    raw["data"] |= data
    return config.load(raw, overrides)


def zero_shot_probe(root, classes=(), **options):
    return {"kind": "zero_shot", "data": {"root": str(root), "classes": {"images": "val", **dict(classes)}}, **options}


def vqa_probe(root, **options):
    return {"kind": "vqa", "data": {"root": str(root)}, **options}


def textcaps_probe(root):
    data = {
        "source": "lists",
        "layout": "textcaps",
        "root": str(root),
        "annotations": {"test": "TextCaps_0.1_val.json"},
    }
    return {"kind": "retrieval", "data": data}
