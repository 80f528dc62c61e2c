"""The record of a student on disk: NAME.json holds what choices may read, NAME.test.json the scores on test.

Selection opens only the first. The second is written before it, so a record that is there is whole.
"""

from pathlib import Path
from typing import Any

from rmdd.core.checks import DiskCheck, Format
from rmdd.core.files import read_json, write_json
from rmdd.core.storage import Storage
from rmdd.evaluate.retrieval import Ranks


def test_file(path: Path) -> Path:
    """Where the scores on test of the record at `path` lie."""
    return path.with_name(f"{path.stem}.test.json")


def ranks_file(path: Path) -> Path:
    """Where the ranks on test of the record at `path` lie."""
    return path.with_name(f"{path.stem}.ranks.safetensors")


def ranks_of(path: Path, storage: Storage) -> Ranks:
    """What the queries of test found for the student whose record lies at `path`."""
    storage.fetch(ranks_file(path))
    return Ranks.load(ranks_file(path))


def write(path: Path, record: dict[str, Any]) -> None:
    """Write `record` in two: a curve of scores on test goes with them."""
    of_test = {k: v for k, v in record.items() if _is_of_test(k, v)}
    if of_test:
        write_json(test_file(path), {"value": record["value"], **of_test})
    rest = {k: v for k, v in record.items() if k not in of_test}
    write_json(path, rest | ({"test": test_file(path).name} if of_test else {}))


def read(path: Path, value: str) -> dict[str, Any] | None:
    """The whole record, if it is there and of `value`."""
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    if record["value"] != value:
        return None
    if "test" not in record:
        return record
    del record["test"]
    apart = test_file(path)
    return record | read_json(apart) if apart.is_file() and read_json(apart)["value"] == value else None


def _is_of_test(key: str, value: Any) -> bool:
    return key.startswith("test") or (key == "curve" and any("test" in point for point in value))


def verify(record: Path, check: DiskCheck, again: str = "run again") -> None:
    """It can be read; `again` makes it anew."""
    check.json(record, f"delete it and {again}: it is made anew")


BASELINES = Format((), "baselines/*/*.json", verify)
