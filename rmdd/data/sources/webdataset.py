"""WebDataset tar files as img2dataset writes them (LAION, DataComp): `key.jpg` with `key.txt`, `key.json`, or both.

A sample is a run of consecutive tar members whose paths are equal up to the first dot of the file name. Its caption is
the text file, or the field `caption` or `captions` of the JSON file. A tar file is read sequentially, with one sample
in memory.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rmdd.config import Data
from rmdd.data.counts import IngestCounts, is_text
from rmdd.data.decode import ImageError
from rmdd.data.inputs import InputPath, input_path
from rmdd.data.source import Candidate, SampleSource, as_captions, sample_files

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "heic", "heif")
MEMBER_BYTES = 2**28
_SAMPLES_CHECKED = 64


@dataclass
class Sample:
    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    """Content of each file of the sample by lower-case file extension; None for a file larger than `MEMBER_BYTES`."""

    @property
    def image(self) -> bytes | ImageError:
        for extension, data in self.members.items():
            if extension in IMAGES:
                return data or ImageError(
                    *(("too_large", f"more than {MEMBER_BYTES} bytes") if data is None else ("truncated", "0 bytes"))
                )
        return ImageError("no_image", f"no image among {', '.join(self.members) or 'its members'}")

    @property
    def captions(self) -> tuple[Any, ...]:
        """The captions of this sample before any check."""
        if text := self.members.get("txt"):
            return (caption_in(text),)
        try:
            facts = json.loads(self.members.get("json") or b"null")
        except ValueError:
            return ()
        if not isinstance(facts, dict):
            return ()
        return as_captions(next((facts[k] for k in ("caption", "captions") if facts.get(k) is not None), ()))


def caption_in(text: bytes) -> str | bytes:
    """Return the caption in a text file; the bytes themselves if they are not UTF-8."""
    try:
        return text.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        return text


class TruncatedTar(Exception):
    """Error for a tar file that ends, or is damaged, before its end mark."""


class _Header(tarfile.TarInfo):
    """A tar header that raises `TruncatedTar` if damaged; `tarfile` would take it for the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise TruncatedTar(str(error)) from None


def files(data: Data) -> list[tuple[str, int, str | None]]:
    """Return the path relative to `data.root`, the size in bytes and the split of each tar file.

    Raises `ValueError` if the first samples of the first tar file have no image with a caption.
    """
    tars = sample_files(data, "webdataset")
    _check_layout(input_path(data.root) / tars[0][0])
    return tars


def candidates(
    file: str, _range: tuple[int, int], split: str | None, data: Data, counts: IngestCounts
) -> Iterator[Candidate]:
    """Yield the usable samples of a tar file in order. If the tar is damaged, its rest is quarantined as one row."""
    keys: set[str] = set()
    try:
        for sample in samples(input_path(data.root) / file):
            if candidate := _candidate(sample, file, split, keys, counts):
                yield candidate
    except (TruncatedTar, tarfile.TarError, EOFError) as error:
        counts.rows_in += 1
        problem = " ".join(str(error).split())[:160]
        counts.reject(file, "truncated_tar", file, f"everything after {len(keys)} samples is lost: {problem}", 0)


def samples(tar: InputPath) -> Iterator[Sample]:
    """Yield the samples of a tar file; for a damaged file, raise `TruncatedTar`, `tarfile.TarError` or `EOFError`."""
    with tar.open("rb") as f, tarfile.open(fileobj=f, mode="r|*", tarinfo=_Header) as archive:
        sample = None
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # saves memory: tarfile keeps a list of all members
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, dot, extension = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            content = archive.extractfile(member) if member.size <= MEMBER_BYTES else None
            sample.members.setdefault(extension.lower(), None if content is None else content.read())
        if sample is not None:
            yield sample


def _candidate(sample: Sample, file: str, split: str | None, keys: set[str], counts: IngestCounts) -> Candidate | None:
    captions, image, origin = sample.captions, sample.image, f"{file} {sample.key}"
    counts.rows_in += 1
    counts.captions_in += len(captions)
    if not is_text(sample.key):
        counts.reject(sample.key, "no_path", origin, "its name is not UTF-8", len(captions))
        return None
    pair_id = f"{file}/{sample.key}"
    if sample.key in keys:
        counts.reject(pair_id, "duplicate_key", origin, "an earlier sample of this tar has the same key", len(captions))
        return None
    keys.add(sample.key)
    usable: dict[str, None] = {}
    counts.keep_captions(usable, captions, pair_id, origin)
    if not usable:
        counts.reject(pair_id, "no_caption", origin, f"no caption among {', '.join(sample.members)}", 0)
        return None
    return Candidate(pair_id, tuple(usable), split, "webdataset", origin, image)


def _check_layout(tar: InputPath) -> None:
    """Raise `ValueError` unless one of the first samples of a tar file has an image and a caption."""
    extensions: set[str] = set()
    try:
        for number, sample in enumerate(samples(tar)):
            extensions |= sample.members.keys()
            if sample.captions and not isinstance(sample.image, ImageError):
                return
            if number == _SAMPLES_CHECKED:
                break
    except (TruncatedTar, tarfile.TarError, EOFError) as error:
        if not extensions:
            raise ValueError(f"{tar} is not a tar file: {error}; correct data.webdataset.files") from None
    raise ValueError(
        f"{tar}: none of its first samples has an image ({', '.join(IMAGES[:4])}, ...) and a caption (txt, or json "
        f"with `caption`); found members of type {', '.join(sorted(extensions)) or 'none'}; correct data.webdataset"
    )


SOURCE = SampleSource(files, candidates)
