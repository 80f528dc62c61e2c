"""The distilled set, the result of a run: in memory (`DistilledSet`) and on disk.

M pairs of a subset, images of H x W pixels, text embeddings of width F, R rank of a low-rank similarity.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rmdd.config.budget import pair_parameters
from rmdd.config.order import Between, Order, stages
from rmdd.config.upgrade import upgraded
from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json, replaced_folder, sha256_file, write_json
from rmdd.core.tensors import Damaged, flatten_groups, load_checked, split_groups
from rmdd.data.images import denormalise
from rmdd.distill import similarity
from rmdd.distill.sets import ENTRY, write_subsets
from rmdd.distill.synthetic import enlarged

SCHEMA_VERSION = 2
READABLE = (1, 2)
DESCRIPTION, TENSORS, CAPTIONS = "set.json", "tensors.safetensors", "captions.parquet"
PREVIEW, CARD = "preview.png", "README.md"
AS_WRITTEN = ("model", "method", "loss", "config", "provenance", "metrics")


@dataclass(frozen=True, eq=False, repr=False)
class Subset:
    """The M distilled pairs of one phase. Students train on the subsets of a set in the order that the set states.

    All tensors are finite float32. `similarity` holds `matrix` (M, M), or `scale` (M,), `left` and `right` (M, R), or
    nothing (identity). Rows stand for images, columns for texts. Raises `ValueError` when shapes or types do not match.
    """

    images: Tensor  # (M, 3, H, W), normalised pixels
    texts: Tensor  # (M, F), text-encoder outputs, not normalised
    similarity: dict[str, Tensor]
    alpha: float  # for a low-rank similarity S = diag(scale) + alpha/R left right^T
    lr_image: float  # learned SGD learning rate of the image tower
    lr_text: float  # learned SGD learning rate of the text tower
    captions: Sequence[str]  # the real caption nearest to each pair's text embedding
    source_ids: Sequence[str]  # `pair_id` of the real pair that each pair started from
    captions_before: Sequence[str] = ()  # the caption that each pair started from; empty if unknown

    def __post_init__(self) -> None:
        m = len(self.images)
        rank = self.similarity["left"].shape[-1] if "left" in self.similarity else 0
        shapes = {"": {}, "matrix": {"matrix": (m, m)}, "left": {"scale": (m,), "left": (m, rank), "right": (m, rank)}}
        kind = next((name for name in ("matrix", "left") if name in self.similarity), "")
        actual = {name: tuple(t.shape) for name, t in self.similarity.items()}
        if not m or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be (M, 3, H, W) with M at least 1, found {tuple(self.images.shape)}")
        if self.texts.ndim != 2 or len(self.texts) != m:
            raise ValueError(f"{m} images need texts of shape ({m}, F), found {tuple(self.texts.shape)}")
        if actual != shapes[kind]:
            allowed = "empty, matrix (M, M), or scale (M), left (M, R) and right (M, R)"
            raise ValueError(f"similarity of {m} pairs must be {allowed}; found {actual}")
        for name in ("captions", "source_ids", "captions_before"):
            count = len(getattr(self, name))
            if count != m and (count or name != "captions_before"):
                raise ValueError(f"{m} pairs need {m} {name}, found {count}")
        for name, t in self.tensors().items():
            if t.dtype != torch.float32 and t.ndim:
                raise ValueError(f"{name} must be float32, found {t.dtype}; convert it with .float()")
            if not t.isfinite().all():
                raise ValueError(f"{name} holds {int((~t.isfinite()).sum())} numbers that are not finite")

    def __repr__(self) -> str:
        kind = self.kind + (f" of rank {self.rank}" if self.rank else "")
        shape = " x ".join(map(str, self.images.shape[1:]))
        return f"Subset({self.pairs} pairs, images {shape}, texts of width {self.texts.shape[1]}, similarity {kind})"

    @property
    def pairs(self) -> int:
        return len(self.images)

    @property
    def kind(self) -> str:
        """Kind of the similarity matrix: `full`, `low_rank` or `identity`."""
        return "full" if "matrix" in self.similarity else "low_rank" if "left" in self.similarity else "identity"

    @property
    def rank(self) -> int | None:
        return self.similarity["left"].shape[1] if "left" in self.similarity else None

    @property
    def matrix(self) -> Float[Tensor, "M M"]:
        """The similarity as a full matrix (M, M); rows are images, columns are texts."""
        return similarity.dense(self.similarity, self.alpha, self.texts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the learned tensors by their names on disk (without `<subset>.`); learning rates are float64."""
        rates = {n: torch.tensor(getattr(self, n), dtype=torch.float64) for n in ("lr_image", "lr_text")}
        named = {"images": self.images, "texts": self.texts}
        return named | {f"similarity.{n}": t for n, t in self.similarity.items()} | rates


@dataclass(frozen=True, eq=False, repr=False)
class DistilledSet:
    """A distilled set: subsets in training order, and the information needed to use and to reproduce the set."""

    subsets: tuple[Subset, ...]
    mean: Sequence[float]  # per channel: pixels in [0, 1] = image * std + mean
    std: Sequence[float]
    model: dict[str, Any]  # describes the encoders, the projections and the temperature
    method: str
    loss: str
    config: dict[str, Any]
    image_size: int = 0  # images are enlarged to this side in pixels; 0: as stored
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    order: str = "sequence"  # how students learn the subsets: sequence, cumulative or union
    between: str = "zeros"  # joined subsets: images and texts of different ones have similarity 0, or are masked

    def __post_init__(self) -> None:
        object.__setattr__(self, "subsets", tuple(self.subsets))
        if self.subsets and not self.image_size:
            object.__setattr__(self, "image_size", self.subsets[0].images.shape[-1])
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        for name, allowed in (("order", get_args(Order)), ("between", get_args(Between))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        shapes = {(tuple(s.images.shape[1:]), s.texts.shape[1], s.kind) for s in self.subsets}
        if len(shapes) != 1:
            actual = shapes or "no subsets"
            raise ValueError(f"subsets must share image shape, text width and kind of similarity; found {actual}")

    def __repr__(self) -> str:
        counts = " + ".join(str(s.pairs) for s in self.subsets)
        return f"DistilledSet({counts} pairs, method {self.method}, loss {self.loss}, image_size {self.image_size})"

    @property
    def num_pairs(self) -> int:
        return sum(s.pairs for s in self.subsets)

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The subsets of each stage of a student's training; the subsets of a stage form one training set."""
        return stages(self.order, len(self.subsets))

    def similarity_of(self, stage: int) -> Float[Tensor, "M M"]:
        """Return the similarity of all pairs of a stage: a block per subset, and zeros between the blocks.

        If `between` is masked, ignore these zeros: the loss does not compare images and texts of different subsets.
        """
        matrix: Tensor = torch.block_diag(*(self.subsets[k].matrix for k in self._subsets_of(stage)))
        return matrix

    def _subsets_of(self, stage: int) -> tuple[int, ...]:
        if not 0 <= stage < len(self.stages):
            raise ValueError(f"stage must be from 0 to {len(self.stages) - 1}; found {stage}")
        return self.stages[stage]

    def budget(self) -> dict[str, Any]:
        """Return the size of the set in parameters, in stored bytes, and in real pairs of `unit` parameters each.

        The learning rates count only if the set has a similarity (see `rmdd.config.budget`).
        """
        unit = pair_parameters(self.image_size, self.subsets[0].texts.shape[1])
        parts = {part: {"parameters": 0, "bytes": 0} for part in ("images", "texts", "similarity", "rates")}
        for subset in self.subsets:
            for name, t in subset.tensors().items():
                part = parts["rates" if name.startswith("lr_") else name.split(".")[0]]
                part["parameters"] += t.numel()
                part["bytes"] += t.numel() * t.element_size()
        total = {measure: sum(part[measure] for part in parts.values()) for measure in ("parameters", "bytes")}
        counted = total["parameters"] - (0 if parts["similarity"]["parameters"] else parts["rates"]["parameters"])
        return {
            "unit": unit,
            "pairs": self.num_pairs,
            "in_pairs": counted / unit,
            **parts,
            "total": total,
        }

    def as_dataset(self, stage: int | None = None) -> torch.utils.data.Dataset[dict[str, Any]]:
        """Return the pairs of a stage, or all pairs once, as a torch dataset.

        An element has `image` (3, S, S) with S = `image_size`, `text` (F,), the number `subset`, and `index` in the
        subset. The rows and columns of `similarity_of(stage)` are in the order of the elements of that stage.
        """
        chosen = range(len(self.subsets)) if stage is None else self._subsets_of(stage)
        return Pairs(self.subsets, self.image_size, chosen)

    def save(
        self, path: Path | str, overwrite: bool = False, extra_files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Path:
        """Write the set as a folder in one atomic step; `rmdd.artefact.card.export` adds the card and the preview.

        `overwrite` allows replacing an existing set. `extra_files` maps names of further files to their content.
        """
        path = Path(path)
        _check_free(path, overwrite)
        with replaced_folder(path) as folder:
            tensors = [subset.tensors() for subset in self.subsets]
            write_subsets(folder / TENSORS, tensors, [subset.alpha for subset in self.subsets])
            _write_captions(self.subsets, self.mean, self.std, folder / CAPTIONS)
            for name, content in extra_files.items():
                (folder / name).write_bytes(content)
            write_json(folder / DESCRIPTION, self._description(folder))
        return path

    def _description(self, folder: Path) -> dict[str, Any]:
        tensors = flatten_groups({str(k): subset.tensors() for k, subset in enumerate(self.subsets)})
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "loss": self.loss,
            "num_pairs": self.num_pairs,
            "image_size": self.image_size,
            "subsets": [
                {
                    "pairs": s.pairs,
                    "similarity": {"kind": s.kind, "rank": s.rank, "alpha": s.alpha},
                    "lr_image": s.lr_image,
                    "lr_text": s.lr_text,
                }
                for s in self.subsets
            ],
            "training": {"order": self.order, "between": self.between},
            "stages": [list(stage) for stage in self.stages],
            "budget": self.budget(),
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "model": self.model,
            "provenance": self.provenance,
            "metrics": self.metrics,
            "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
            "sha256": {name: sha256_file(folder / name) for name in (TENSORS, CAPTIONS)},
            "config": self.config,
        }

    @classmethod
    def load(cls, path: Path | str) -> "DistilledSet":
        """Load a saved set. Raises `ValueError` for a missing or altered file or a different schema version."""
        path = Path(path)
        info = _read_description(path)
        try:
            for name, sha256 in info["sha256"].items():
                _check_bytes(path / name, sha256)
            tensors = _read_tensors(path / TENSORS, info["schema_version"])
            if info["schema_version"] == 1:
                info["config"] = upgraded(info["config"])
            _check_tensors(path, tensors, info["tensors"])
            rows, named = _read_captions(path / CAPTIONS), split_groups(tensors)
            return cls(
                subsets=tuple(_subset(named[str(k)], s, rows[k]) for k, s in enumerate(info["subsets"])),
                **info["normalisation"],
                **{name: info[name] for name in AS_WRITTEN},
                **info.get("training", {}),
                image_size=info.get("image_size", 0),
            )
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{path / DESCRIPTION} has missing or wrong fields ({error!r})"
            raise ValueError(f"{problem}; copy the set again") from error


load = DistilledSet.load


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """The pairs of the subsets with the numbers `chosen`, as a torch dataset."""

    def __init__(self, subsets: Sequence[Subset], image_size: int, chosen: Iterable[int]):
        self.subsets, self.image_size = subsets, image_size
        self.positions = [(k, i) for k in chosen for i in range(subsets[k].pairs)]

    def __repr__(self) -> str:
        return f"Pairs({len(self)} pairs, image_size {self.image_size})"

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        k, i = self.positions[item]
        image = enlarged(self.subsets[k].images[i : i + 1], self.image_size)[0]
        return {"image": image, "text": self.subsets[k].texts[i], "subset": k, "index": i}


def _subset(tensors: dict[str, Tensor], entry: dict[str, Any], strings: dict[str, list[Any]]) -> Subset:
    return Subset(
        images=tensors["images"],
        texts=tensors["texts"],
        similarity={n.removeprefix("similarity."): t for n, t in tensors.items() if n.startswith("similarity.")},
        alpha=entry["similarity"]["alpha"],
        lr_image=tensors["lr_image"].item(),
        lr_text=tensors["lr_text"].item(),
        **strings,
    )


def _write_captions(subsets: Sequence[Subset], mean: Sequence[float], std: Sequence[float], path: Path) -> None:
    """Write a row per pair with its captions and its image as PNG, so that Hugging Face datasets shows the pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "subset": k,
            "index": i,
            "image": {"bytes": png, "path": None},
            "caption": subset.captions[i],
            "source_id": subset.source_ids[i],
            "caption_before": subset.captions_before[i] if subset.captions_before else None,
        }
        for k, subset in enumerate(subsets)
        for i, png in enumerate(map(_as_png, denormalise(subset.images, mean, std)))
    ]
    strings = ("caption", "source_id", "caption_before")
    columns = [("subset", pa.int32()), ("index", pa.int32())]
    columns += [("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})), *((s, pa.string()) for s in strings)]
    features: dict[str, Any] = {name: {"dtype": "int32", "_type": "Value"} for name in ("subset", "index")}
    features |= {"image": {"_type": "Image"}} | {name: {"dtype": "string", "_type": "Value"} for name in strings}
    schema = pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _as_png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


def _read_captions(path: Path) -> dict[int, dict[str, list[Any]]]:
    import pyarrow.parquet as pq

    by_subset: dict[int, dict[str, list[Any]]] = {}
    strings_only = pq.read_table(path, columns=["subset", "index", "caption", "source_id", "caption_before"])
    for row in sorted(strings_only.to_pylist(), key=lambda r: (r["subset"], r["index"])):
        strings = by_subset.setdefault(row["subset"], {"captions": [], "source_ids": [], "captions_before": []})
        strings["captions"].append(row["caption"])
        strings["source_ids"].append(row["source_id"])
        if row["caption_before"] is not None:
            strings["captions_before"].append(row["caption_before"])
    return by_subset


def _read_description(path: Path) -> dict[str, Any]:
    if not (path / DESCRIPTION).is_file():
        raise ValueError(f"no distilled set at {path}: {DESCRIPTION} is missing; give the `set` folder of a run")
    try:
        info: dict[str, Any] = read_json(path / DESCRIPTION)
    except ValueError as error:
        raise ValueError(f"{path / DESCRIPTION} is not valid JSON ({error}); copy the set again") from None
    version = info.get("schema_version") if isinstance(info, dict) else None
    if version not in READABLE:
        raise ValueError(
            f"{path} has schema version {version} and this rmdd reads {READABLE[0]} to {READABLE[-1]}; "
            "use the version of rmdd that wrote it, or write the set again"
        )
    return info


def _read_tensors(path: Path, version: int) -> dict[str, Tensor]:
    """Return the tensors of a set by name. A file of schema version 2 has a checksum inside, which is checked."""
    if version == 1:
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return load_checked(path, ENTRY)[0]
    except Damaged as error:
        raise ValueError(f"{path} is damaged ({error}); copy the set again") from error


def _check_bytes(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the set again")
    if (actual := sha256_file(file)) != sha256:
        raise ValueError(f"{file} was altered: SHA-256 {actual[:12]}, set.json says {sha256[:12]}; copy the set again")


def _check_tensors(path: Path, tensors: dict[str, Tensor], listed: dict[str, dict[str, Any]]) -> None:
    actual = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
    for name in sorted(actual.keys() | listed.keys()):
        if actual.get(name) != listed.get(name):
            problem = f"{TENSORS} has {name} as {actual.get(name)}, {DESCRIPTION} says {listed.get(name)}"
            raise ValueError(f"{path}: {problem}; copy the set again")


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path} exists and is not a distilled set; choose another folder")
    if not overwrite:
        raise ValueError(f"{path} already holds a distilled set; choose another folder or pass overwrite=True")


def verify(path: Path, check: DiskCheck) -> None:
    """Check that all files of the distilled set at `path` are intact and that the set can be loaded."""
    if not check.begin(path):
        return
    remedy = "copy the set again, or write it again with `rmdd report`"
    before = len(check.findings.faults)
    info = check.json(path / DESCRIPTION, remedy)
    for name, sha256 in (info or {}).get("sha256", {}).items():
        if not (path / name).is_file():
            check.fault(path / name, "is missing", remedy)
        elif sha256_file(path / name) != sha256:
            check.fault(path / name, f"has another SHA-256 than {DESCRIPTION} says", remedy)
    if len(check.findings.faults) == before:
        with check.errors_as_faults(path, remedy):
            DistilledSet.load(path)


FORMAT = Format((DESCRIPTION,), "", verify)
