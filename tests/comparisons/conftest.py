"""Fixtures for tests of comparisons: two tiny finished runs in one storage, and a small BERT with random weights."""

import shutil

import pytest
import torch
from tiny import QUIET, changed, stored
from transformers import BertConfig, BertModel, BertTokenizerFast

import rmdd

TINY = changed(
    name="one",
    model={"image": {"weights": "random:0"}},
    experts={"num": 2, "keep": "all"},
    distill={
        "method": "ptm_st",
        "phases": [
            {"pairs": 4, "start": 0, "stop": 1, "endpoint": 1, "iterations": 2},
            {"pairs": 3, "start": 0, "stop": 1, "endpoint": 2, "iterations": 2},
        ],
        "snapshots": 1,
    },
    evaluate={
        "epochs": 3,
        "students": 3,
        "batch": 4,
        "eval_every": 2,
        "selection_students": 1,
        "baseline_lrs": [0.03, 0.3],
        "baseline_draws": 3,
    },
)
OTHER = {"name": "two", "distill": {**TINY["distill"], "seed": 9, "loss": "infonce", "temperature": 0.3}}


def tiny(storage, **sections):
    return stored(storage, TINY, **sections)


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory):
    """Fixture: the folder of a storage with two finished runs."""
    storage = tmp_path_factory.mktemp("made") / "runs"
    for sections in ({}, OTHER):
        rmdd.run(tiny(storage, **sections), progress=QUIET)
    return storage


@pytest.fixture
def storage(two_runs, tmp_path):
    """Fixture: a copy of the storage `two_runs` that a test may change."""
    return shutil.copytree(two_runs, tmp_path / "runs")


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the red green blue yellow circle square triangle on left right of".split()


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Fixture: the folder of a small BERT with random weights, which transformers can load."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=80, initializer_range=0.5, **shape))
        model.save_pretrained(folder)
    return folder
