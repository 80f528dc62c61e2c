"""Exclusive access to a folder: a file lock excludes other processes of this machine, a lease excludes other machines.

The operating system releases the file lock as soon as its process dies. Lock files lie in folders `.locks`, each beside
the folders that it has locks for. They are never removed: if a process removed the lock file that another process waits
for, the two could lock different files of the same name. The lease is a small file beside the folder; it names the
process that holds the folder (the holder), which removes the lease at its end. The holder rewrites the lease every
`BEAT` seconds. If the lease does not change for `EXPIRES` seconds, by the clock of the machine that watches it, its
holder counts as dead.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rmdd.core.files import alive, listener_of, machine, read_json, remove, write_json

BEAT = 5.0
"""Seconds between two writes of a lease by its holder."""
EXPIRES = 30.0
"""Seconds after which a lease expires if its holder has not rewritten it."""
SETTLE = 1.0
"""Seconds between writing a lease and reading it back. Cloud storage cannot create a file atomically: if two processes
write a lease at the same time, the one that reads back its own text holds the folder."""
POLL = 0.2
"""Seconds between two attempts to get the file lock."""
PROBE = 0.05
"""Seconds after which a lock file is free again that `held_in` has locked to see whether a process holds it."""
LOCKS = ".locks"
"""Name of the folders of lock files."""


class FolderInUse(RuntimeError):
    """Another process holds the folder that this process needs (see `hold_folder`)."""


@runtime_checkable
class LeaseCell(Protocol):
    """The place where a lease is stored: a local file or an object at a URI."""

    exact: bool
    """Whether the file lock excludes all other writers. If not, a written lease must be read back (see `SETTLE`)."""

    def read(self) -> dict[str, Any] | None: ...

    def write(self, value: dict[str, Any]) -> None: ...

    def remove(self) -> None: ...


class LocalLeaseCell:
    """A lease in a file beside the folder, on a disk or a network file system."""

    exact = True

    def __init__(self, folder: Path):
        self.path = folder.with_name(f"{folder.name}.lease")

    def read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = read_json(self.path)
            return content
        except (FileNotFoundError, ValueError):
            return None

    def write(self, value: dict[str, Any]) -> None:
        write_json(self.path, value)

    def remove(self) -> None:
        remove(self.path)


class Lease:
    """A lease by which this process holds a folder; `lost` is true if another process took the folder over."""

    def __init__(self, folder: Path, cell: LeaseCell):
        self.folder, self.cell = folder, cell
        self.id, self.beats = uuid.uuid4().hex, 0
        self._lost, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {folder.name}", daemon=True)

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `FolderInUse` if another process has taken over the folder."""
        if self.lost:
            raise FolderInUse(
                f"{self.folder} was taken over by {_successor(self.cell.read())} while this process was paused; let "
                "the other process finish, or end it and resume"
            )

    def write(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = {"machine": _holder_machine(), "host": socket.gethostname(), "pid": os.getpid(), "seen": now}
        self.cell.write({"id": self.id, "beats": self.beats, **who})

    def owned(self) -> bool:
        return (self.cell.read() or {}).get("id") == self.id

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if not self.lost and self.owned():
                self.cell.remove()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(OSError):  # an unreachable storage may come back before the lease expires
                if not self.owned():  # another process took over the folder, and may have ended since
                    self._lost.set()
                    return
                self.beats += 1
                self.write()


@contextlib.contextmanager
def hold_folder(folder: Path | str, *, wait: bool) -> Iterator[Lease]:
    """Hold `folder` for this process inside the block, so that no other process can hold it at the same time.

    If another process holds the folder, wait until it is free; if `wait` is False, raise `FolderInUse` instead, with
    the name of that process. A lease of another machine is watched: if it changes, its holder is alive; if it expires,
    its holder counts as dead.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    listener = listener_of(folder)
    cell: LeaseCell = LocalLeaseCell(folder) if listener is None else listener.cell(folder)
    lock_of(folder).parent.mkdir(exist_ok=True)
    with open(lock_of(folder), "a") as lock:
        while not _locked(lock):
            if not wait:
                time.sleep(PROBE)
                if _locked(lock):
                    break
                raise _in_use(folder, cell.read())
            time.sleep(POLL)
        lease = Lease(folder, cell)
        while not _take(lease):
            if not wait:
                raise _in_use(folder, cell.read())
        lease.start()
        try:
            yield lease
        finally:
            lease.end()


def lock_of(folder: Path) -> Path:
    return folder.parent / LOCKS / f"{folder.name}.lock"


def held_in(path: Path) -> list[Path]:
    """Return the folders inside `path` that a process of this machine holds (see `hold_folder`)."""
    held = []
    for file in path.rglob("*.lock"):
        parent = file.parents[1] if file.parent.name == LOCKS else file.parent  # older versions: beside it
        folder = parent / file.name.removesuffix(".lock")
        try:
            with open(file) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            held.append(folder)
        except PermissionError:  # the lock file of another user, whose process removes its lease at its end
            held += [folder] if LocalLeaseCell(folder).path.exists() else []
        except (FileNotFoundError, IsADirectoryError):  # not a lock file of rmdd
            continue
    return held


def _locked(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(lease: Lease) -> bool:
    """Write the lease if there is none or its holder is dead; return whether this process holds the folder now."""
    cell, before = lease.cell, lease.cell.read()
    foreign = before is not None and _may_live(before)
    deadline = time.monotonic() + EXPIRES
    while foreign and (now := cell.read()) is not None:
        if now != before:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(BEAT / 4)
    lease.write()
    if foreign or not cell.exact:
        time.sleep(SETTLE)
        return lease.owned()
    return True


def _may_live(lease: dict[str, Any]) -> bool:
    """Return whether the process that wrote a lease may still run. Hold the file lock of the folder meanwhile."""
    if lease.get("machine") == _holder_machine():
        return False
    return lease.get("machine") != machine() or alive(lease["pid"])


def is_of_this_machine(lease: dict[str, Any]) -> bool:
    """Return whether a process of this machine wrote a lease, of this version or of an older one."""
    return lease.get("machine") in (machine(), _holder_machine())


def _holder_machine() -> str:
    """Return the name of this machine in leases.

    Older versions put lock files beside the folders, so their processes do not see ours. In their leases, the name is
    `machine()`. As the names differ, old and new processes watch each other's leases like those of other machines.
    """
    return f"{machine()}/{LOCKS}"


def _in_use(folder: Path, lease: dict[str, Any] | None) -> FolderInUse:
    return FolderInUse(
        f"{folder.name} is in use by {_holder(lease)}; wait until that run is done, end it, or give this run another "
        f"name or another runtime.storage (folder: {folder})"
    )


def _successor(lease: dict[str, Any] | None) -> str:
    return "a process that has since ended" if lease is None else _holder(lease)


def _holder(lease: dict[str, Any] | None) -> str:
    if lease is None:
        return "another process on this machine"
    return f"process {lease.get('pid')} on {lease.get('host')} (last seen {lease.get('seen')})"
