"""Reopen a comparison or transfer from its folder, to resume it."""

from pathlib import Path
from typing import Any

from rmdd import config
from rmdd.comparisons import transfer
from rmdd.comparisons.compare import Comparison
from rmdd.comparisons.entries import open_entries
from rmdd.comparisons.transfer import Transfer
from rmdd.core.files import read_json
from rmdd.core.layout import locate_file
from rmdd.core.storage import is_uri


def comparison_in(folder: Path | str) -> Comparison | Transfer | None:
    """Return the comparison or transfer in a folder or at a URI; None if there is neither.

    Raises `ConfigError` if a compared set is missing, and `ValueError` if this version of rmdd cannot read the
    layout of the storage.
    """
    storage, file = locate_file(str(folder), "comparison.json", depth=2)
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file)
    old_storage, raw["run"]["runtime"]["storage"] = raw["run"]["runtime"]["storage"], storage
    relative = not is_uri(old_storage) and not Path(old_storage).is_absolute()  # it says not where the sets were
    words = raw["words"] if relative else [word.replace(old_storage, storage, 1) for word in raw["words"]]
    if raw["verb"] == "compare":
        return Comparison(tuple(open_entries(words)), config.load(raw["run"]), raw["against"], raw["reencode"])
    return transfer.prepare_transfer(words[0], raw["to"], raw["run"], [], random=raw["random"], full=raw["full"])
