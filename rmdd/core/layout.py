"""The layout of the files in a storage: a number in its `storage.json`, written when the storage is first used.

A storage of another layout is refused before anything in it is read or written.
"""

from rmdd.core.files import read_json, write_json
from rmdd.core.storage import Storage

LAYOUT = 2
"""Raised when a release cannot read what the one before it wrote. Storages of layout 1 have no `storage.json`."""

FILE = "storage.json"


def require_layout(storage: Storage) -> None:
    """Raise `ValueError` when the storage has another layout; write its number into a storage without results."""
    path, used = storage.root / FILE, storage.has_results()  # in this order: the file is written before any result
    storage.fetch(path)
    if not path.is_file() and not used:
        write_json(path, {"layout": LAYOUT})
        return
    layout = read_json(path).get("layout") if path.is_file() else 1
    if layout != LAYOUT:
        raise ValueError(
            f"this release of rmdd reads storages of layout {LAYOUT}, and {storage.address(storage.root)} has layout "
            f"{layout}; set runtime.storage to another folder or URI, or go on with the release of rmdd that wrote it; "
            "the distilled sets in it still load with rmdd.load"
        )
