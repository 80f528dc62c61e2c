"""The version of a storage's file layout: a number in `storage.json`, written when the storage is first used.

A storage with another layout raises an error before any other file in it is read or written.
"""

import json
import re
from pathlib import Path

from rmdd import config
from rmdd.core.files import write_json
from rmdd.core.storage import Storage, is_uri, open_storage

LAYOUT = 2
"""Version of the layout that this release reads; a release that cannot read older files increases it by one. Layout 1
had no `storage.json`."""

FILE = "storage.json"
ADVICE_FOR_COPIES = f"or, if you copied folders of a newer storage, copy its {FILE} too"


def layout_of(storage: Storage) -> int | None:
    """Return the layout number of the storage, or None if nothing was stored yet. Writes nothing.

    Raises `ValueError` if `storage.json` cannot be read.
    """
    path = storage.root / FILE
    content = storage.read(path)
    if content is None and storage.has_results():
        content = storage.read(path) or b"{}"  # another process may have just created the storage
    try:
        return None if content is None else json.loads(content).get("layout", 1)
    except (ValueError, AttributeError):
        raise ValueError(
            f'{storage.address(path)} is damaged; write {{"layout": {LAYOUT}}} there if this release made it'
        ) from None


def check_layout(storage: Storage) -> None:
    """Raise `ValueError` if the storage has another layout. Writes nothing."""
    layout = layout_of(storage)
    if layout in (None, LAYOUT):
        return
    advice = ["set runtime.storage to another folder or URI", "or continue with the release of rmdd that wrote it"]
    advice += [ADVICE_FOR_COPIES] if layout == 1 else []
    raise ValueError(
        f"this release of rmdd reads storages of layout {LAYOUT}, and {storage.address(storage.root)} has layout "
        f"{layout}; {', '.join(advice)}; the distilled sets in it still load "
        "with rmdd.load"
    )


def require_layout(storage: Storage) -> None:
    """Raise `ValueError` if the storage has another layout; write `storage.json` into a storage without results."""
    check_layout(storage)
    if storage.read(storage.root / FILE) is None:
        write_json(storage.root / FILE, {"layout": LAYOUT})


def locate_file(address: str, name: str, depth: int) -> tuple[str, Path]:
    """Return the address of the storage that contains a folder, and the local path of the file `name` in that folder.

    `address` is the path or the URI of the folder; from a URI the file is fetched. The storage is the folder `depth`
    levels above. Raises `ValueError` if the file exists and the storage has another layout.
    """
    if not is_uri(address):
        folder = Path(address).absolute()
        opened, file = Storage(folder.parents[depth - 1]), folder / name
    else:
        uri, *names = address.rstrip("/").rsplit("/", depth)
        if not re.fullmatch(r".+://.*[^/]", uri):
            return address, Path(address) / name
        opened = open_storage(config.load({"runtime": {"storage": uri}}).runtime)
        file = opened.root.joinpath(*names, name)
        opened.fetch(file)
    if file.is_file():
        check_layout(opened)
    return opened.address(opened.root), file
