"""Comparisons and transfers that were begun, opened again by their folder."""

from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import transfer
from rmdd.comparisons.compare import Comparison
from rmdd.comparisons.entries import open_entries
from rmdd.comparisons.transfer import Transfer
from rmdd.core.files import read_json
from rmdd.core.layout import locate_file


def begun_in(place: Path | str) -> Comparison | Transfer | None:
    """What was begun in a folder or at a URI, also in a storage that was moved; None where that is no comparison.

    Raises `ConfigError` when the sets are not there any more, `ValueError` when the storage has another layout.
    """
    storage, file = locate_file(str(place), "comparison.json", depth=2)
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file)
    before, raw["run"]["runtime"]["storage"] = raw["run"]["runtime"]["storage"], storage
    words = [word.replace(before, storage, 1) for word in raw["words"]]
    if raw["verb"] == "compare":
        return Comparison(tuple(open_entries(words)), config.load(raw["run"]), raw["against"], raw["reencode"])
    return transfer.begin(words[0], raw["to"], raw["run"], [], random=raw["random"], full=raw["full"])
