"""Holding a folder alone, on one machine and across machines.

Processes of one machine exclude each other by a lock of the operating system, which the death of a process frees at
once. Machines exclude each other by a lease, a small file beside the folder that says who holds it and is written
again every few seconds. A lease that stands still for `EXPIRES` seconds of the reader's own clock has lost its holder.
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

from rmdd.core.files import listener_of, machine, read_json, remove, write_json

BEAT = 5.0
EXPIRES = 30.0
SETTLE = 1.0
"""Seconds after which, on a storage that cannot refuse a second writer, the last of two that came at once is known."""
POLL = 0.2


class FolderInUse(RuntimeError):
    """Somebody else works in a folder."""


@runtime_checkable
class LeaseCell(Protocol):
    """Where a lease is written; `exact` where the lock of the operating system already keeps all others out."""

    exact: bool

    def read(self) -> dict[str, Any] | None: ...

    def write(self, value: dict[str, Any]) -> None: ...

    def remove(self) -> None: ...


class LocalLeaseCell:
    """A lease beside its folder, on a disk or a network file system."""

    exact = True

    def __init__(self, folder: Path):
        self.path = folder.with_name(f"{folder.name}.lease")

    def read(self) -> dict[str, Any] | None:
        try:
            return read_json(self.path)
        except (FileNotFoundError, ValueError):
            return None

    def write(self, value: dict[str, Any]) -> None:
        write_json(self.path, value)

    def remove(self) -> None:
        remove(self.path)


class Lease:
    """What its holder has: `lost` when another took over, which can be after a long standstill only."""

    def __init__(self, folder: Path, cell: LeaseCell):
        self.folder, self.cell = folder, cell
        self.id, self.beats = uuid.uuid4().hex, 0
        self._lost, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {folder.name}", daemon=True)

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `FolderInUse` when another process has taken over."""
        if self.lost:
            raise FolderInUse(
                f"{self.folder} was taken over by {_successor(self.cell.read())} while this process stood still; let "
                "that one finish, or end it and resume"
            )

    def write(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        who = {"machine": machine(), "host": socket.gethostname(), "pid": os.getpid(), "seen": now}
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
            with contextlib.suppress(OSError):  # a storage out of reach may come back before the lease expires
                if not self.owned():  # nobody but a successor, who may be done already, takes it away
                    self._lost.set()
                    return
                self.beats += 1
                self.write()


@contextlib.contextmanager
def hold_folder(folder: Path | str, *, wait: bool) -> Iterator[Lease]:
    """Hold `folder` alone. While another process does, wait for it, or raise `FolderInUse` with its name.

    A lease of another machine is watched until it moves, or has expired.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    listener = listener_of(folder)
    cell: LeaseCell = LocalLeaseCell(folder) if listener is None else listener.cell(folder)
    with open(lock_of(folder), "a") as lock:
        while not _locked(lock):
            if not wait:
                raise _held(folder, cell.read())
            time.sleep(POLL)
        lease = Lease(folder, cell)
        while not _take(lease):
            if not wait:
                raise _held(folder, cell.read())
        lease.start()
        try:
            yield lease
        finally:
            lease.end()


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _locked(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(lease: Lease) -> bool:
    """Write the lease where nobody's is, or one that has no holder; False when its holder lives."""
    cell, before = lease.cell, lease.cell.read()
    foreign = before is not None and before.get("machine") != machine()  # else its holder is dead: the lock is ours
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


def _held(folder: Path, lease: dict[str, Any] | None) -> FolderInUse:
    return FolderInUse(
        f"{folder.name} is in use by {_holder(lease)}; wait until that run is done, end it, or give this one another "
        f"name or another runtime.storage (folder: {folder})"
    )


def _successor(lease: dict[str, Any] | None) -> str:
    return "a process that has ended since" if lease is None else _holder(lease)


def _holder(lease: dict[str, Any] | None) -> str:
    if lease is None:
        return "another process of this machine"
    return f"process {lease.get('pid')} on {lease.get('host')} (last seen {lease.get('seen')})"
