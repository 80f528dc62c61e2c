"""Fixtures shared by tests of several methods."""

import pytest
import torch
from objectives import prepared_split


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Fixture: the folder of a tiny BERT whose vocabulary holds the words of the toy captions."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({w for caption in prepared_split().split.captions for w in caption.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=5 + len(words), max_position_embeddings=16, **shape)).save_pretrained(folder)
    return str(folder)
