"""Where pairs come from, and how pictures and captions are seen."""

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
    """The papers' caption rule. Turning a part off keeps the caption as it was written."""

    lowercase: bool = Field(True, description="turn captions to lower case")
    strip_punctuation: bool = Field(True, description='replace . ! " ( ) * # : ; ~ by a space')
    max_words: PositiveInt | None = Field(30, description="keep the first words; null keeps all")


class Scenes(Section):
    """The built-in source: seeded pictures of coloured shapes with five captions each."""

    train: PositiveInt = Field(1000, description="pictures to train on")
    val: PositiveInt = Field(200, description="pictures for every choice")
    test: PositiveInt = Field(200, description="pictures for the final score")
    size: Annotated[int, Field(ge=16)] = Field(48, description="side of the square picture in pixels")
    seed: int = Field(0, description="another seed draws other pictures")


class TableSource(Section):
    """A folder of images plus one CSV, TSV, JSONL or Parquet table."""

    file: str = Field("captions.csv", description="relative to data.root")
    image: str = Field("image", description="column with the path of the image")
    caption: str = Field("caption", description="column with a caption or a list of captions")
    split: str | None = Field("split", description="column with train/val/test; absent or null: cut by hash")


class Tars(Section):
    """Tar files of samples, as img2dataset writes them; captions from key.txt, else from key.json."""

    files: str = Field("**/*.tar", description="glob or name-{000..146}.tar below data.root; several joined by ::")
    split_by_name: bool = Field(True, description="train/val/test in a file's or folder's name; else cut by hash")


class Parquet(Section):
    """Parquet files with the images inside, as Hugging Face datasets has them."""

    files: str = Field("**/*.parquet", description="glob or name-{000..146}.parquet below data.root; joined by ::")
    image: str = Field("image", description="column of {bytes, path} or of bytes")
    caption: str = Field("caption", description="column with a caption or a list of captions")
    split: str | None = Field("split", description="column with train/val/test; absent or null: by name or hash")
    split_by_name: bool = Field(True, description="train/val/test in a file's or folder's name; else cut by hash")


class Annotations(Section):
    """A file per split, relative to data.root."""

    train: str | None = Field(None, description="the list to train on")
    val: str | None = Field(None, description="the list for every choice")
    test: str | None = Field(None, description="the list for the final score")

    def clashes(self) -> list[Clash]:
        empty = "data.annotations is empty; give {train: ..., val: ..., test: ...}"
        return [] if self.files else [Clash(empty, "data.annotations", "train", "val", "test")]

    @property
    def files(self) -> dict[str, str]:
        return {split: file for split, file in self if file is not None}


class Data(Section):
    source: str = Field(
        "scenes",
        description="scenes, karpathy, lists (BLIP/LoRS train/val/test files), table, textcaps, webdataset, parquet, "
        "or one that a package brings; dataset: a folder that `rmdd ingest` wrote",
        json_schema_extra=hash_only("run", "ingest"),
    )
    root: str | None = Field(
        None,
        description="folder or URI (s3://, gs://) that paths are relative to; not part of the hash",
        json_schema_extra=no_hash(),
    )
    layout: Literal["flickr30k", "flickr8k", "coco", "cc3m", "textcaps"] | None = Field(
        None, description="known file names for `lists` and `karpathy`", json_schema_extra=hash_only("run", "ingest")
    )
    annotations: str | Annotations | None = Field(
        None,
        description="karpathy: one file; lists: a file per split; relative to root; null: by layout",
        json_schema_extra=hash_only("run", "ingest"),
    )
    scenes: Scenes = Field(Scenes(), json_schema_extra=hash_only("run", "ingest"))
    table: TableSource = Field(TableSource(), json_schema_extra=hash_only("run", "ingest"))
    webdataset: Tars = Field(Tars(), json_schema_extra=hash_only("run", "ingest"))
    parquet: Parquet = Field(Parquet(), json_schema_extra=hash_only("run", "ingest"))
    split_fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1),
        description="train, val, test; used where the source has no splits; cut by a hash of the path",
        json_schema_extra=hash_only("run", "ingest"),
    )
    eval_limit: PositiveInt | None = Field(
        None, description="first n pairs of val and test (CC3M: 10000)", json_schema_extra=hash_only("run", "view")
    )
    reencode: PositiveInt | None = Field(
        None,
        description="store images as PNG squashed to this side; null: as they came",
        json_schema_extra=hash_only("run", "ingest"),
    )
    shard_mb: Annotated[float, Field(gt=0)] = Field(
        128, description="size in MiB at which a shard is closed", json_schema_extra=hash_only("run", "ingest")
    )
    max_pixels: PositiveInt = Field(
        89_478_485,
        description="larger images are quarantined as decompression bombs",
        json_schema_extra=hash_only("run", "ingest"),
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255),
        description="under transparent pixels",
        json_schema_extra=hash_only("run", "ingest", "view", "features"),
    )
    exif_orientation: bool = Field(
        False,
        description="the published loaders ignore it",
        json_schema_extra=hash_only("run", "ingest", "view", "features"),
    )
    image_size: Annotated[int, Field(ge=8)] = Field(
        224,
        description="square side in pixels; aspect ratio is squashed",
        json_schema_extra=hash_only("run", "view", "features"),
    )
    normalise: Literal["clip", "imagenet", "half", "tower"] = Field(
        "clip",
        description="the papers use CLIP's constants for every tower; `tower` asks the timm model",
        json_schema_extra=hash_only("run", "view", "features"),
    )
    captions: Captions = Field(Captions(), json_schema_extra=hash_only("run", "view", "features"))

    def clashes(self) -> list[Clash]:
        source, found = self.source, []
        if source != "dataset" and (wrong := sources.mistake(source)):
            found.append(Clash(f"data.source: {wrong}", "data.source"))
        elif source in sources.OF_PROBES and not hasattr(self, source):
            text = f"data.source '{source}' is for evaluate.probes alone"
            found.append(Clash(text, "data.source", "evaluate.probes"))
        if self.root is not None and _holds_secret(self.root):
            text = (
                "data.root holds a password or key; leave it out and give it by the environment "
                "(such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
            found.append(Clash(text, "data.root"))
        if source != "scenes" and self.root is None:
            text = f"source '{source}' reads files; give data.root (--set data.root=FOLDER)"
            found.append(Clash(text, "data.source", "data.root"))
        if source in ("karpathy", "lists") and self.layout is None and self.annotations is None:
            text = f"source '{source}' needs data.layout or data.annotations"
            found.append(Clash(text, "data.source", "data.layout", "data.annotations"))
        if source == "karpathy" and isinstance(self.annotations, Annotations):
            text = "source 'karpathy' reads one data.annotations file; for a file per split use source: lists"
            found.append(Clash(text, "data.source", "data.annotations"))
        if source == "lists" and isinstance(self.annotations, str):
            text = "source 'lists' reads a file per split; give data.annotations: {train: ..., val: ..., test: ...}"
            found.append(Clash(text, "data.source", "data.annotations"))
        if any(f < 0 for f in self.split_fractions) or abs(sum(self.split_fractions) - 1) > 1e-6:
            text = f"data.split_fractions must be three shares that sum to 1, found {self.split_fractions}"
            found.append(Clash(text, "data.split_fractions"))
        return found

    def not_hashed(self, purpose: Purpose) -> tuple[str, ...]:
        """Of a dataset as written: settings of other sources, and of decoding where pictures stay as they came."""
        if purpose != "ingest":
            return ()
        others = [n for n, v in self if isinstance(v, Section) and n not in (self.source, "annotations")]
        return tuple(others) if self.reencode else (*others, "background", "exif_orientation")


def _holds_secret(uri: str) -> bool:
    parts = urlsplit(uri)
    words = r"secret|password|token|credential|signature|(access|account|api|shared)_?key|^(sig|sas|key|auth)$"
    secret = re.compile(words, re.IGNORECASE)
    return "://" in uri and (":" in parts.netloc.rpartition("@")[0] or any(map(secret.search, parse_qs(parts.query))))
