"""Run files for tests of probes, which evaluate trained students on other tasks and datasets."""

from tiny import changed, stored

from rmdd import config

WIDTH = 16
BASE = changed(
    name="probed",
    data={"scenes": {"train": 10, "val": 4, "test": 4}},
    model={"text": {"width": WIDTH}},
    experts={"epochs": 1},
    distill={
        "budget": 5,
        "phases": [{"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 2}],
        "steps": 1,
        "snapshots": 1,
        **dict.fromkeys(("lr_image", "lr_text", "lr_similarity"), 0.1),
    },
    evaluate={"epochs": 1, "baseline_draws": 1},
)


def run_of(storage, asked, *overrides, **data):
    raw = stored(storage, BASE)
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
