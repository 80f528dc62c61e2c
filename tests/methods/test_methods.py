"""Checks of every method: documented defaults, tensors that updates change, errors for unknown methods and options."""

import pytest
import torch
from slow import fast_loop
from toy import method_run

from rmdd import config, methods
from rmdd.config.recipes import BUILT_IN

LORS = {
    "trajectory": "original",
    "estimator": "first_order",
    "loss": "wbce",
    "similarity.kind": "low_rank",
    "similarity.rank": 10,
    "similarity.alpha": 3.0,
    "lr_image": 100.0,
    "lr_text": 100.0,
    "lr_similarity": 10.0,
    "lr_lr": 1e-2,
    "momentum": 0.5,
    "inner_lr": 0.1,
    "steps": 8,
    "match_epochs": 1,
    "batch": 20,
    "ema": 0.0,
    "start_rule": "exclusive",
    "phases.0.pairs": 99,
    "phases.0.stop": 2,
    "phases.0.iterations": 3000,
}
CARDS = {
    "mtt_vl": {
        "trajectory": "original",
        "estimator": "exact",
        "loss": "infonce",
        "similarity.kind": "identity",
        "batch": 100,
        "batches": "independent",
        "lr_image": 1000.0,
        "lr_text": 1000.0,
        "lr_lr": 1e-2,
        "momentum": 0.5,
        "inner_lr": 0.1,
        "steps": 8,
        "ema": 0.0,
        "phases.0.pairs": 100,
        "phases.0.stop": 2,
        "phases.0.iterations": 2000,
    },
    "tesla_vl": LORS
    | {"similarity.kind": "identity", "similarity.rank": 10, "similarity.alpha": 3.0, "phases.0.pairs": 100},
    "lors": LORS,
    "repblend": LORS | {"branches": "separate"},
    "ptm_st": {
        "trajectory": "shortcut",
        "endpoint_rule": "inclusive",
        "estimator": "first_order",
        "similarity.kind": "full",
        "loss": "wbce",
        "ema": 0.99,
        "steps": 8,
        "momentum": 0.5,
        "inner_dropout": "same_mask",
    },
    "datm": LORS | {"phases.0.start": 0, "phases.0.stop": 4, "phases.0.grow_from": 2, "phases.0.grow_until": 1500},
    "mct": LORS | {"trajectory": "convexified"},
    "amd": LORS | {"init": "prototypes"},
    "mdm": {
        "similarity.kind": "identity",
        "loss": "infonce",
        "lr_image": 1000.0,
        "lr_text": 1000.0,
        "momentum": 0.5,
        "ema": 0.0,
        "inner_lr": 0.1,
        "phases.0.pairs": 100,
        "phases.0.iterations": 3000,
    },
}
PAIRED = {
    "similarity.kind": "identity",
    "loss": "infonce",
    "optimiser": "sgd",
    "momentum": 0.5,
    "ema": 0.0,
    "phases.0.pairs": 100,
}
CARDS |= {
    "ncfm": PAIRED | {"lr_image": 0.1, "lr_text": 0.1},
    "covmatch": PAIRED | {"lr_image": 1.0, "lr_text": 1.0, "phases.0.iterations": 10_000},
}
MADE = {"similarity.kind": "identity", "loss": "infonce", "phases.0.iterations": 1}
CARDS |= {
    "pds": MADE | {"phases.0.pairs": 100},
    "edge": MADE | {"phases.0.pairs": 500},
    "evlf": MADE | {"phases.0.pairs": 100},
}
OPTIONS = {
    "pds": {"rm_ratio": 0.2, "starts": 20, "normalize": False, "noise_level": 10},
    "edge": {"captions_per_image": 2},
    "evlf": {"strength": 0.7, "pull": 0.1, "pull_until": 25},
}
ENDS = ("ptm_st", "mct", "ncfm", "covmatch", "pds", "edge", "evlf")
EXPERTS = {name: "endpoints" if name in ENDS else "all" for name in BUILT_IN}
TRAJECTORY = [name for name in sorted(BUILT_IN) if methods.find(name).family == "trajectory"]


def value_at(section, path):
    for part in path.split("."):
        section = section[int(part)] if part.isdigit() else getattr(section, part)
    return section


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_defaults_are_the_documented_ones(name):
    run = config.load({"distill": {"method": name}})
    assert {path: value_at(run.distill, path) for path in CARDS[name]} == CARDS[name]
    options = methods.find(name)(run).options
    assert {option: getattr(options, option) for option in OPTIONS.get(name, {})} == OPTIONS.get(name, {})
    assert run.experts.keep == EXPERTS[name]
    assert (run.model.image.trainable, run.model.image.projection) == (
        (False, "block") if name == "repblend" else (True, "none")
    )
    assert config.load(run.model_dump(mode="json")) == run, (
        "loading a run file with all defaults written out must not change the run"
    )


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_run_file_overrules_the_defaults(name):
    run = config.load({"distill": {"method": name, "lr_image": 7.5, "ema": 0.5}}, ["distill.steps=5"])
    assert (run.distill.lr_image, run.distill.ema, run.distill.steps) == (7.5, 0.5, 5)


@pytest.mark.parametrize("name", TRAJECTORY)
def test_every_learnable_tensor_moves_in_one_outer_step(make, name):
    """The left low-rank factor moves only in step two: its gradient is a multiple of the right factor, 0 at first."""
    setup = make(method_run(name))
    now = dict.fromkeys(("first", "second"))
    now["first"], now["second"] = (state.raw.tensors() for state in fast_loop(setup, 2))
    begun = setup.begun.tensors()
    assert begun.keys() == now["second"].keys() >= {"images", "texts", "lr_image", "lr_text"}
    low_rank = setup.run.distill.similarity.kind == "low_rank"
    assert {n for n in begun if n.startswith("similarity.")} == (
        {"similarity.scale", "similarity.left", "similarity.right"}
        if low_rank
        else {"similarity.matrix"}
        if name == "ptm_st"
        else set()
    )
    for tensor, before in begun.items():
        moved = now["second" if tensor == "similarity.left" else "first"][tensor]
        assert torch.isfinite(moved).all() and not torch.equal(moved, before), tensor
    if low_rank:
        assert torch.equal(now["first"]["similarity.left"], begun["similarity.left"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lorss", r"unknown method 'lorss'; available: amd, .*datm, .*lors, .*; did you mean lors\?"),
        ("ptm", r"unknown method 'ptm'; available: .*"),
        ("quite_another", r"unknown method 'quite_another'; .*; or give one of your own as module:Class"),
        ("no.such.module:Method", r"cannot import method 'no.such.module:Method': .*install"),
        ("rmdd.methods.lors:Lors", r"cannot import method 'rmdd.methods.lors:Lors'"),
        ("rmdd.config:Run", r"'rmdd.config:Run' is not a method; derive it from rmdd.methods.Method"),
    ],
)
def test_unknown_methods_are_refused_with_a_hint(name, words):
    with pytest.raises(ValueError, match=words):
        methods.find(name)
    with pytest.raises(config.ConfigError, match=rf"distill.method: {words}"):
        config.load({"distill": {"method": name}})


def test_a_built_in_method_takes_no_options():
    with pytest.raises(config.ConfigError, match=r"distill.options.sharpness: unknown key; `rmdd methods lors`"):
        config.load({"distill": {"method": "lors", "options": {"sharpness": 2}}})


def test_every_method_has_a_test_file():
    from pathlib import Path

    tested = {p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py")}
    assert set(BUILT_IN) <= tested
