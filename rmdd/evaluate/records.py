"""Student records on disk: NAME.json without test scores, NAME.test.json with test scores.

Code that chooses a snapshot or a setting opens only NAME.json. NAME.test.json is written first, so an existing
NAME.json means a complete record.
"""

from pathlib import Path
from typing import Any

from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json, write_json
from rmdd.core.storage import Storage
from rmdd.evaluate.retrieval import Ranks


def test_file(path: Path) -> Path:
    """Return the path of the file with the test scores that belong to the student record at `path`."""
    return path.with_name(f"{path.stem}.test.json")


def ranks_file(path: Path) -> Path:
    """Return the path of the file with the test ranks that belong to the student record at `path`."""
    return path.with_name(f"{path.stem}.ranks.safetensors")


def ranks_of(path: Path, storage: Storage) -> Ranks:
    """Load the ranks of the test queries for the student whose record is at `path`."""
    storage.fetch(ranks_file(path))
    return Ranks.load(ranks_file(path))


def write(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as two files; test scores, and a curve that contains test scores, go into NAME.test.json."""
    of_test = {k: v for k, v in record.items() if _is_of_test(k, v)}
    if of_test:
        write_json(test_file(path), {"value": record["value"], **of_test})
    rest = {k: v for k, v in record.items() if k not in of_test}
    write_json(path, rest | ({"test": test_file(path).name} if of_test else {}))


def read(path: Path, value: str) -> dict[str, Any] | None:
    """Return the record at `path` with its test scores; None if a file is missing or its hash differs from `value`."""
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    if record["value"] != value:
        return None
    if "test" not in record:
        return record
    del record["test"]
    file = test_file(path)
    return record | read_json(file) if file.is_file() and read_json(file)["value"] == value else None


def _is_of_test(key: str, value: Any) -> bool:
    return key.startswith("test") or (key == "curve" and any("test" in point for point in value))


def verify(record: Path, check: DiskCheck, again: str = "run again") -> None:
    """Check that the file `record` can be read as JSON; `again` is the command that recreates a damaged file."""
    check.json(record, f"delete it and {again} to create it again")


BASELINES = Format((), "baselines/*/*.json", verify)
