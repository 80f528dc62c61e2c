"""A coreset on disk: a folder with `subset.json`, which lists pairs of a dataset and how they were chosen."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json, write_json
from rmdd.data.splits import Split

SCHEMA_VERSION = 1
DESCRIPTION, PREVIEW = "subset.json", "preview.png"
MAX_SHOWN = 3


@dataclass(frozen=True, repr=False)
class Coreset:
    """A coreset: real pairs in the order in which they were chosen."""

    method: str
    options: dict[str, Any]
    seed: int
    unit: Literal["image", "record"]
    data_hash: str
    features: dict[str, Any]
    """Encoder and feature space of the selection; empty for a method that uses no features."""
    records: tuple[tuple[str, int], ...]
    """For each chosen pair: its `pair_id`, and the position of the chosen caption among the pair's cleaned captions."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    """Further results for reports, such as mean error, radius, number of pairs, parameters, bytes and seconds."""

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"Coreset({len(self)} pairs of unit {self.unit}, method {self.method}, seed {self.seed})"

    def save(self, folder: Path | str) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DESCRIPTION, {"schema_version": SCHEMA_VERSION, **asdict(self)})
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "Coreset":
        """Load a coreset. Raises `ValueError` when it is missing or damaged, or has a different schema version."""
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise ValueError(f"{folder} holds no subset (no {DESCRIPTION}); choose one with `rmdd coreset`")
        try:
            facts = read_json(path)
            version = facts.pop("schema_version")
            records = tuple((str(pair_id), int(caption)) for pair_id, caption in facts.pop("records"))
            subset = cls(**facts, records=records)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {folder} and run `rmdd coreset` again") from None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}, not {SCHEMA_VERSION}; run `rmdd coreset` again")
        return subset

    def rows(self, split: Split) -> list[int]:
        """Return for each chosen pair its caption record in `split`.

        Raises `ValueError` when `split` belongs to a different dataset or lacks some of the pairs.
        """
        if split.dataset.hash != self.data_hash:
            raise ValueError(
                f"this subset was chosen from data {self.data_hash[:12]}, but the dataset at {split.dataset.path} has "
                f"the hash {split.dataset.hash[:12]}; use the dataset that the subset was chosen from"
            )
        first: dict[str, int] = {}
        count = [0] * len(split)
        for record, image in enumerate(split.image_of.tolist()):
            first.setdefault(split.pair_ids[image], record)
            count[image] += 1
        captions = dict(zip(split.pair_ids, count, strict=True))
        missing = [pair for pair, caption in self.records if not 0 <= caption < captions.get(pair, 0)]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.records)} pairs are not in split '{split.name}' (first: "
                f"{missing[:MAX_SHOWN]}); use the split and data.captions that they were chosen with"
            )
        return [first[pair] + caption for pair, caption in self.records]


def verify(path: Path, check: DiskCheck) -> None:
    """Check that the coreset at `path` can be loaded, and report a fault to `check`."""
    if check.begin(path):
        with check.errors_as_faults(
            path / DESCRIPTION, f"delete {check.storage.address(path)} and run `rmdd coreset` again"
        ):
            Coreset.load(path)


FORMAT = Format((DESCRIPTION,), "coresets/*", verify)
