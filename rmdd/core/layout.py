"""The layout number of a storage is the version of its folder structure and file formats; `storage.json` stores it.

If the number differs from `LAYOUT`, an error is raised before any other file of the storage is read or written.
"""

import json
import re
from pathlib import Path

from rmdd import config
from rmdd.core.files import write_json
from rmdd.core.storage import Storage, is_uri, open_storage

LAYOUT = 2
"""Layout number of the storages that this release reads and writes. A release that cannot read older files increases it
by one. Storages of layout 1 have no `storage.json`."""

FILE = "storage.json"
ADVICE_FOR_COPIES = f"or, if you copied folders of a newer storage, copy its {FILE} too"


def layout_of(storage: Storage) -> int | None:
    """Return the layout number of the storage, or None if the storage has no results yet. Writes no file.

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
            f"{storage.address(path)} is damaged; if this release of rmdd created the storage, write "
            f'{{"layout": {LAYOUT}}} into the file'
        ) from None


def check_layout(storage: Storage) -> None:
    """Raise `ValueError` if the layout number of the storage is not that of this release. Writes no file."""
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
    """Call `check_layout`, which may raise `ValueError`; then write `storage.json` if the storage has none."""
    check_layout(storage)
    if storage.read(storage.root / FILE) is None:
        write_json(storage.root / FILE, {"layout": LAYOUT})


def locate_file(address: str, name: str, depth: int) -> tuple[str, Path]:
    """Find the file `name` in a folder; return the address of the folder's storage, and the local path of the file.

    `address` is the path or the URI of the folder, which is `depth` levels below its storage. A file at a URI is first
    copied to this machine. Raises `ValueError` if the file exists and `check_layout` refuses the storage.
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
