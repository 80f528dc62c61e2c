"""The `data` section of a run file: where the image-text pairs come from, and how they are preprocessed."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field

from rmdd.config import sources
from rmdd.config.hashing import Purpose, hash_only, no_hash
from rmdd.config.numbers import PositiveInt
from rmdd.config.runfile import Clash, Section


class Captions(Section):
    """Caption preprocessing. The defaults are those of the papers; with all steps off, captions stay unchanged."""

    lowercase: bool = Field(True, description="convert captions to lower case")
    strip_punctuation: bool = Field(True, description='replace . ! " ( ) * # : ; ~ by spaces')
    max_words: PositiveInt | None = Field(30, description="number of words after which a caption is cut; null: never")


class Scenes(Section):
    """The built-in source `scenes`: generated images of coloured shapes with five captions each."""

    train: PositiveInt = Field(1000, description="number of images in the split train")
    val: PositiveInt = Field(200, description="number of images in the split val, on which all choices are made")
    test: PositiveInt = Field(200, description="number of images in the split test, for the final score")
    size: Annotated[int, Field(ge=16)] = Field(48, description="side of the square images, in pixels")
    seed: int = Field(0, description="random seed with which the images are generated")


class Annotations(Section):
    """Annotation files or tables, one per split, relative to data.root."""

    train: str | None = Field(None, description="file of the split train")
    val: str | None = Field(None, description="file of the split val, on which all choices are made")
    test: str | None = Field(None, description="file of the split test, for the final score")

    def clashes(self) -> list[Clash]:
        empty = "data.annotations or data.table.file is an empty mapping; set it to {train: ..., val: ..., test: ...}"
        return [] if self.files else [Clash(empty, "data.annotations", "data.table.file", "train", "val", "test")]

    @property
    def files(self) -> dict[str, str]:
        return {split: file for split, file in self if file is not None}


class TableSource(Section):
    """The source `table`: a folder of images and one CSV, TSV, JSONL or Parquet table, or a table per split."""

    file: str | Annotations = Field(
        "captions.csv",
        description="path of the table, relative to data.root; or a path per split: {train: ..., val: ...}",
    )
    image: str = Field("image", description="name of the column with the path of the image file")
    caption: str = Field("caption", description="name of the column with a caption or a list of captions")
    split: str | None = Field(
        "split", description="column with train, val or test; if missing or null, rows are split by a hash of the path"
    )


class ImageFolder(Section):
    """The source `imagefolder`: images with a metadata table, as Hugging Face has them, or with a text file each."""

    files: str = Field(
        "**/metadata.{csv,jsonl,parquet}",
        description="tables: glob patterns below data.root, separated by ::; without one, the caption of 0001.jpg is "
        "the text of 0001.txt",
    )
    image: str | None = Field(
        None,
        description="column with the path of the image, relative to its table; null: file_name, or the one *_file_name",
    )
    caption: str | None = Field(
        None,
        description="column with a caption or a list of captions; null: caption, captions, text or a similar name",
    )
    split: str | None = Field(
        "split", description="column with train, val or test; if missing or null, split by folder name or hash"
    )


class Tars(Section):
    """The source `webdataset`: tar files written by img2dataset; the captions of KEY.jpg are in KEY.txt or KEY.json."""

    files: str = Field(
        "**/*.tar", description="tar files: glob patterns or name-{000..146}.tar below data.root, separated by ::"
    )
    split_by_name: bool = Field(
        True, description="take the split from train, val or test in a file or folder name; otherwise split by a hash"
    )


class Parquet(Section):
    """The source `parquet`: Parquet files that contain images, as Hugging Face datasets stores them, or list paths."""

    files: str = Field(
        "**/*.parquet",
        description="Parquet files: glob patterns or name-{000..146}.parquet below data.root, separated by ::",
    )
    image: str = Field(
        "image", description="name of the column with the image: bytes, {bytes, path}, or a path relative to data.root"
    )
    caption: str = Field("caption", description="name of the column with a caption or a list of captions")
    split: str | None = Field(
        "split", description="column with train, val or test; if missing or null, split by file name or hash"
    )
    split_by_name: bool = Field(
        True, description="take the split from train, val or test in a file or folder name; otherwise split by a hash"
    )


class HuggingFace(Section):
    """The source `huggingface`: a folder that `save_to_disk` of the library `datasets` wrote, or a dataset of the hub.

    The library is only needed for the hub: `pip install 'rmdd[hub]'`.
    """

    folder: str = Field("", description="folder that save_to_disk wrote, relative to data.root")
    hub: str | None = Field(None, description="id of a dataset of the hub, such as user/name, instead of a folder")
    config: str | None = Field(None, description="configuration (subset) of the dataset of the hub; null: its default")
    revision: str | None = Field(None, description="branch, tag or commit of the dataset of the hub; null: main")
    image: str = Field(
        "image", description="name of the column with the image: bytes, {bytes, path}, or a path relative to data.root"
    )
    caption: str = Field("caption", description="name of the column with a caption or a list of captions")
    split: str | None = Field(
        "split", description="column with train, val or test; if missing or null, split as the dataset or by a hash"
    )


class Splits(Section):
    """Splits of the dataset: whether those of the source hold, what they are called, and what is taken from train."""

    from_source: bool = Field(
        True, description="keep the splits that the source names; false: ignore them, as if the source named none"
    )
    names: dict[str, Literal["train", "val", "test", "none"]] = Field(
        {},
        description="splits by their names in the source, such as {holdout: test}; none leaves the images out. Known "
        "already: train, training, restval, val, valid, validation, dev, eval, evaluation, test",
    )
    val: int | float | None = Field(
        None,
        description="share (0.1) or number (500) of the train images that become the split val, chosen by a hash; "
        "null: the source's val, or the share of data.split_fractions if the source names no splits",
    )
    test: int | float | None = Field(
        None, description="share or number of the train images that become the split test; null: as for val"
    )

    @property
    def carves(self) -> bool:
        """Whether these settings choose the split of some images by a hash, against what the source says."""
        return not self.from_source or self.val is not None or self.test is not None

    def clashes(self) -> list[Clash]:
        mistakes = []
        sizes = {"val": self.val, "test": self.test}
        for split, size in sizes.items():
            if size is not None and (size < 0 or (isinstance(size, float) and not 0 < size < 1)):
                text = f"data.splits.{split} is a share such as 0.1 or a number of images such as 500, found {size}"
                mistakes.append(Clash(text, f"data.splits.{split}"))
        if not mistakes and sum(size for size in sizes.values() if isinstance(size, float)) >= 1:
            text = f"data.splits.val ({self.val}) and test ({self.test}) leave no image for train; lower them"
            mistakes.append(Clash(text, "data.splits", "val", "test"))
        return mistakes


class Data(Section):
    """Where the image-text pairs come from, and how their images and captions are preprocessed."""

    source: str = Field(
        "scenes",
        description="where the pairs come from: scenes, karpathy, lists (files per split, as BLIP and LoRS have "
        "them), table, imagefolder, huggingface, parquet, textcaps, webdataset, a source that an installed package "
        "adds, or dataset (a folder that `rmdd ingest` wrote)",
        json_schema_extra=hash_only("run", "ingest"),
    )
    root: str | None = Field(
        None,
        description="folder or URI (s3://, gs://) that other paths of this section are relative to; not hashed",
        json_schema_extra=no_hash(),
    )
    layout: Literal["flickr30k", "flickr8k", "coco", "cc3m", "textcaps"] | None = Field(
        None,
        description="for the sources lists and karpathy: published dataset whose file names are used",
        json_schema_extra=hash_only("run", "ingest"),
    )
    annotations: str | Annotations | None = Field(
        None,
        description="annotations below data.root: one file (karpathy) or one per split (lists); null: by data.layout",
        json_schema_extra=hash_only("run", "ingest"),
    )
    scenes: Scenes = Field(Scenes(), json_schema_extra=hash_only("run", "ingest"))
    table: TableSource = Field(TableSource(), json_schema_extra=hash_only("run", "ingest"))
    imagefolder: ImageFolder = Field(ImageFolder(), json_schema_extra=hash_only("run", "ingest"))
    webdataset: Tars = Field(Tars(), json_schema_extra=hash_only("run", "ingest"))
    parquet: Parquet = Field(Parquet(), json_schema_extra=hash_only("run", "ingest"))
    huggingface: HuggingFace = Field(HuggingFace(), json_schema_extra=hash_only("run", "ingest"))
    split_fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1),
        description="shares of train, val and test if the source has no splits; images are split by a hash of the path",
        json_schema_extra=hash_only("run", "ingest"),
    )
    splits: Splits = Field(Splits(), json_schema_extra=hash_only("run", "ingest"))
    train_limit: PositiveInt | None = Field(
        None,
        description="use only N pairs of train, which a hash of their ids draws, so that a first run on large data "
        "ends soon; null: all pairs",
        json_schema_extra=hash_only("run", "view"),
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="images of train that are also in val or test, byte for byte: keep them (with a warning), or drop "
        "them from train",
        json_schema_extra=hash_only("run", "ingest"),
    )
    eval_limit: PositiveInt | None = Field(
        None,
        description="use only the first N pairs of val and of test (N is often 10000 for CC3M); null: all pairs",
        json_schema_extra=hash_only("run", "view"),
    )
    reencode: PositiveInt | None = Field(
        None,
        description="store images as square PNG files with this side in pixels; null: store the original files",
        json_schema_extra=hash_only("run", "ingest"),
    )
    shard_mb: Annotated[float, Field(gt=0)] = Field(
        128, description="size in MiB of a file (shard) of the dataset", json_schema_extra=hash_only("run", "ingest")
    )
    max_loss: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="largest share of images that an ingest may reject (missing, unreadable, without a caption); if it "
        "is exceeded, the ingest fails; not hashed",
        json_schema_extra=no_hash(),
    )
    max_pixels: PositiveInt = Field(
        89_478_485,
        description="number of pixels above which an image is skipped, as a possible decompression bomb",
        json_schema_extra=hash_only("run", "ingest"),
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255),
        description="colour (R, G, B; 0 to 255) behind transparent pixels",
        json_schema_extra=hash_only("run", "ingest", "view", "features"),
    )
    exif_orientation: bool = Field(
        True,
        description="rotate images as their EXIF data says; the published loaders do not, so presets say false",
        json_schema_extra=hash_only("run", "ingest", "view", "features"),
    )
    image_size: Annotated[int, Field(ge=8)] = Field(
        224,
        description="side in pixels of the squares to which images are resized; the aspect ratio is not kept",
        json_schema_extra=hash_only("run", "view", "features"),
    )
    normalise: Literal["clip", "imagenet", "half", "tower"] = Field(
        "clip",
        description="mean and standard deviation to normalise by; papers use clip; tower: the timm model's values",
        json_schema_extra=hash_only("run", "view", "features"),
    )
    captions: Captions = Field(Captions(), json_schema_extra=hash_only("run", "view", "features"))

    def limit_of(self, split: str) -> int | None:
        """Return the number of pairs of a split that are used; None: all."""
        return self.train_limit if split == "train" else self.eval_limit

    def clashes(self) -> list[Clash]:
        source, mistakes = self.source, []
        if source != "dataset" and (mistake := sources.mistake(source)):
            mistakes.append(Clash(f"data.source: {mistake}", "data.source"))
        elif source in sources.OF_PROBES and not hasattr(self, source):
            text = f"data.source '{source}' can only be used in evaluate.probes; set another source"
            mistakes.append(Clash(text, "data.source", "evaluate.probes"))
        if self.root is not None and _holds_secret(self.root):
            text = (
                "data.root contains a password or key; remove it and set it in the environment "
                "(such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
            mistakes.append(Clash(text, "data.root"))
        if source == "huggingface" and not (self.root or self.huggingface.hub):
            text = "source 'huggingface' needs data.root (a folder of save_to_disk) or data.huggingface.hub (user/name)"
            mistakes.append(Clash(text, "data.source", "data.root", "data.huggingface.hub"))
        elif source not in ("scenes", "huggingface") and self.root is None:
            text = f"source '{source}' reads files; set data.root (--set data.root=FOLDER)"
            mistakes.append(Clash(text, "data.source", "data.root"))
        if source in ("karpathy", "lists") and self.layout is None and self.annotations is None:
            text = f"source '{source}' needs data.layout or data.annotations; set one of them"
            mistakes.append(Clash(text, "data.source", "data.layout", "data.annotations"))
        if source == "karpathy" and isinstance(self.annotations, Annotations):
            text = "source 'karpathy' reads one data.annotations file; with a file per split, use source: lists"
            mistakes.append(Clash(text, "data.source", "data.annotations"))
        if source == "lists" and isinstance(self.annotations, str):
            text = "source 'lists' reads a file per split; set data.annotations: {train: ..., val: ..., test: ...}"
            mistakes.append(Clash(text, "data.source", "data.annotations"))
        if any(f < 0 for f in self.split_fractions) or abs(sum(self.split_fractions) - 1) > 1e-6:
            text = f"data.split_fractions must be three shares that sum to 1, found {self.split_fractions}"
            mistakes.append(Clash(text, "data.split_fractions"))
        for field in ("splits", "duplicates"):
            if source == "dataset" and not self._is_default(field):
                text = (
                    f"data.{field} has no effect on an ingested dataset; set it in the run file that ingests the data"
                )
                mistakes.append(Clash(text, f"data.{field}", "data.source"))
        return mistakes

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Leave out default values of new fields and unused new sources of all hashes, and more of a dataset's.

        New ones are those added after version 0.1. A dataset is the same for all values of the fields of unused
        sources and, without `reencode`, of the fields about decoding.
        """
        unused = tuple(name for name in ("imagefolder", "huggingface") if name != self.source)
        unused += tuple(name for name in ("splits", "duplicates") if self._is_default(name))
        if purpose != "ingest":
            return (*unused, *(("train_limit",) if self.train_limit is None else ()))
        others = [n for n, v in self if isinstance(v, Section) and n not in (self.source, "annotations", "splits")]
        return (*unused, *others, *(() if self.reencode else ("background", "exif_orientation")))


def _holds_secret(uri: str) -> bool:
    parts = urlsplit(uri)
    words = r"secret|password|token|credential|signature|(access|account|api|shared)_?key|^(sig|sas|key|auth)$"
    secret = re.compile(words, re.IGNORECASE)
    return "://" in uri and (":" in parts.netloc.rpartition("@")[0] or any(map(secret.search, parse_qs(parts.query))))
