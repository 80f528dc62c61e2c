"""A subset of real pairs: which ones, who chose them, and from what. A folder with `subset.json`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rmdd.files import read_json, write_json

if TYPE_CHECKING:
    from rmdd.data.splits import Split

SCHEMA_VERSION = 1
DESCRIPTION = "subset.json"


@dataclass(frozen=True)
class Subset:
    """Caption records of the train split, in the order they were chosen."""

    method: str
    options: dict[str, Any]
    seed: int
    unit: Literal["image", "record"]
    """What was chosen: whole images, or single captions with their image."""
    data_hash: str
    features: dict[str, Any]
    """Identity of the encoder and the space that distances were taken in; {} where none were."""
    records: tuple[tuple[str, int], ...]
    """(pair_id, number of the caption among those that the caption rule left of the pair)"""
    facts: dict[str, Any] = field(default_factory=dict)
    """Objective, shares, seconds, bytes."""

    def save(self, folder: Path | str) -> Path:
        """Write the subset as a folder."""
        write_json(Path(folder) / DESCRIPTION, {"schema_version": SCHEMA_VERSION} | asdict(self))
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> Subset:
        """Raises ValueError when there is none, or of another schema version."""
        file = Path(folder) / DESCRIPTION
        if not file.is_file():
            raise ValueError(f"no subset at {folder}: it has no {DESCRIPTION}; give the folder of one")
        raw = read_json(file)
        version = raw.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"{file} has schema version {version}, this rmdd reads {SCHEMA_VERSION}; choose it again")
        try:
            return cls(**raw | {"records": tuple((str(i), int(n)) for i, n in raw["records"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not as this version writes it ({error!r}); choose the subset again") from error

    def rows(self, split: Split) -> list[int]:
        """Numbers of the caption records in the train split; raises ValueError for other data or a missing id."""
        if split.dataset.hash != self.data_hash:
            raise ValueError(
                f"the subset was chosen from other data (hash {self.data_hash}, here {split.dataset.hash}); choose one "
                "from this dataset"
            )
        captions: dict[str, list[int]] = defaultdict(list)
        for row, image in enumerate(split.image_of):
            captions[split.pair_ids[image]].append(row)
        missing = [f"{pair}#{n}" for pair, n in self.records if not 0 <= n < len(captions.get(pair, ()))]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.records)} records are not in split '{split.name}' (first: {missing[0]}); "
                "the captions are read by another rule, or the subset is damaged"
            )
        return [captions[pair][n] for pair, n in self.records]
