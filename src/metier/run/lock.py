"""Whom a run folder belongs to while it is written.

The system itself holds the lock, on an open file, and lets it go when the process ends, however it ends: nothing has to
be guessed from the number of a process, which may long be another one's. The file says who it is.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metier.core import BusyError, RecipeError, files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 4
"""How often a lock is tried."""


@contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Hold a folder while writing to it; whether a process before it died there.

    A lock that no process of this machine holds is taken over. One of another machine is respected, for a file system
    that is shared may not tell what is held there.

    Args:
        lock: The file in the folder that names who writes.

    Raises:
        BusyError: If another process holds it.
        RecipeError: If its place is taken by a file.
        StorageError: If the folder cannot be written.
    """
    if lock.parent.exists() and not lock.parent.is_dir():
        hint = "choose another export.folder"
        raise RecipeError("is a file, not a folder", where=f"export.folder: {lock.parent}", hint=hint)
    try:
        files.make_folder(lock.parent)
        handle, left = _take(lock)
    except OSError as error:
        raise files.storage_error(lock.parent, error) from error
    try:
        yield left
    finally:
        # Removed while it is still held: whoever opens it in between sees that it is no longer the one in its place.
        lock.unlink(missing_ok=True)
        os.close(handle)


def holder(lock: Path) -> dict[str, Any] | None:
    """Who writes to a folder now; None where nobody does."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        said = _read(handle)
        return None if _hold(handle, alone=False) and not _is_elsewhere(said) else said
    finally:
        os.close(handle)


def _take(lock: Path) -> tuple[int, bool]:
    """The open lock, and whether it was there."""
    for attempt in range(ATTEMPTS):
        there = lock.exists()
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            said = _read(handle)
            mine = not _is_elsewhere(said) and _hold(handle, alone=not there)
            if mine and _is_in_place(handle, lock):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                return handle, there
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        # Whoever lists runs holds it for a moment, and whoever is done with the folder takes it away.
        time.sleep(attempt * 0.05)
    raise _busy(lock, said)


def _hold(handle: int, *, alone: bool) -> bool:
    """Whether the lock is ours now; where the system has no locks, it is ours if nobody left one."""
    if fcntl is None:
        return alone
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return alone
    return True


def _is_in_place(handle: int, lock: Path) -> bool:
    try:
        there = lock.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_elsewhere(said: dict[str, Any]) -> bool:
    return bool(said.get("host", socket.gethostname()) != socket.gethostname())


def _busy(lock: Path, said: dict[str, Any]) -> BusyError:
    return BusyError(
        f"process {said.get('pid', '?')} on {said.get('host', '?')} writes to this run folder",
        where=str(lock.parent),
        hint="wait for it, choose another export.folder, or delete .lock if that process is gone",
    )
