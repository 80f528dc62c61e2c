"""Counts of the rows and captions that an ingest reads, keeps and rejects; rejections are counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class IngestCounts:
    """Counts of rows and captions of an ingest, and one quarantine entry for each rejected row or caption."""

    rows_in: int = 0
    rows_merged: int = 0
    captions_in: int = 0
    rotated: int = 0
    """Kept images whose EXIF data say that the stored pixels must be rotated or mirrored."""
    quarantine: Counter[str] = field(default_factory=Counter)
    captions_dropped: Counter[str] = field(default_factory=Counter)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, file: Any, reason: str, origin: str, detail: str, captions: int) -> None:
        """Reject a row: count it under `reason`, count its captions as dropped, and add a quarantine entry."""
        self.quarantine[reason] += 1
        self.captions_dropped["image_quarantined"] += captions
        self._add_entry("pair", file, reason, origin, detail)

    def keep_captions(self, usable: dict[str, None], captions: Iterable[Any], file: str, origin: str) -> None:
        """Add to `usable` each new caption that is text and not blank; count all other captions as dropped."""
        for caption in captions:
            if not isinstance(caption, str) or not is_text(caption):
                self._drop(file, "caption_not_text", origin, caption)
            elif not caption.strip():
                self._drop(file, "empty_caption", origin, caption)
            elif caption in usable:
                self._drop(file, "duplicate_caption", origin, caption)
            else:
                usable[caption] = None

    def as_json(self) -> dict[str, Any]:
        """Return the counts as JSON values, without the quarantine entries."""
        return {
            "rows_in": self.rows_in,
            "rows_merged": self.rows_merged,
            "captions_in": self.captions_in,
            "rotated": self.rotated,
            "quarantine": dict(self.quarantine),
            "captions_dropped": dict(self.captions_dropped),
        }

    def add(self, counts: dict[str, Any]) -> None:
        """Add the counts of one part of the ingest to this total; `counts` is the result of `as_json` for that part."""
        self.rows_in += counts["rows_in"]
        self.rows_merged += counts["rows_merged"]
        self.captions_in += counts["captions_in"]
        self.rotated += counts["rotated"]
        self.quarantine.update(counts["quarantine"])
        self.captions_dropped.update(counts["captions_dropped"])

    def _drop(self, file: str, reason: str, origin: str, caption: Any) -> None:
        self.captions_dropped[reason] += 1
        self._add_entry("caption", file, reason, origin, _printable(caption))

    def _add_entry(self, kind: str, file: Any, reason: str, origin: str, detail: str) -> None:
        name = file if isinstance(file, str) and is_text(file) else _printable(file)
        self.entries.append({"what": kind, "file": name, "reason": reason, "origin": origin, "detail": detail})


def is_text(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8; half a surrogate pair, which JSON allows, cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(value: Any) -> str:
    return ascii(value)[:120] if not isinstance(value, str) or not is_text(value) else repr(value)[:120]
