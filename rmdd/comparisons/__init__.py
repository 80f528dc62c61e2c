"""Many sets under one protocol, one set under many towers, and what others have published."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmdd.comparisons.compare import Comparison
    from rmdd.comparisons.transfer import Transfer


def begun_in(place: Path | str) -> "Comparison | Transfer | None":
    """What was begun in a folder or at a URI, also in a storage that was moved; None where that is no comparison.

    Raises `ConfigError` when the sets are not there any more.
    """
    from rmdd import config
    from rmdd.core.files import read_json
    from rmdd.core.storage import located

    storage, file = located(str(place), "comparison.json", depth=2)
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file)
    before, raw["run"]["runtime"]["storage"] = raw["run"]["runtime"]["storage"], storage
    words = [word.replace(before, storage, 1) for word in raw["words"]]
    if raw["verb"] == "compare":
        from rmdd.comparisons.compare import Comparison
        from rmdd.comparisons.entries import open_entries

        return Comparison(tuple(open_entries(words)), config.load(raw["run"]), raw["against"], raw["reencode"])
    from rmdd.comparisons.transfer import begin

    return begin(words[0], raw["to"], raw["run"], [], random=raw["random"], full=raw["full"])
