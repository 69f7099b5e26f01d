"""Whether an HDF5 file may be opened at all, as found out by a process that may be stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from metier.core import DataError
from metier.core.children import begin
from metier.data.faults import excerpt

WORKER = Path(__file__).with_name("hdf5_worker.py")
SECONDS = 2
"""Of the processor; a small file takes a tenth of one."""
BYTES_A_SECOND = 25_000_000
"""A larger file has more annotations, and more time: a quarter of the pace at which they are read from a cold disk."""
WALL = 10
"""Times as long by the clock, for a disk that keeps a reader waiting."""
MEGABYTES = 256
HINT = "copy or write the file again with a current anndata"

Facts = tuple[int, int, int]
"""Which file it is, its size and when it was last written."""


def facts(path: Path) -> Facts:
    """What changes when a file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def look_through(path: Path) -> None:
    """See a file through to its end in a process of its own, before this one opens it.

    What is written to the file between this look and a later reading is not seen by it; `facts` tells of it unless
    whoever wrote also set the clock back.

    Raises:
        DataError: If the HDF5 library comes to no end with it, dies of it, or would be led to other files.
    """
    seconds = SECONDS + path.stat().st_size // BYTES_A_SECOND
    child = begin(WORKER, path, seconds, MEGABYTES)
    try:
        told, _ = child.communicate(timeout=WALL * seconds)
    except subprocess.TimeoutExpired:
        told = b""
    finally:
        child.kill()
        child.wait()
    if not told:
        what = f"cannot be looked through within {seconds} seconds and {MEGABYTES} MiB: it is damaged, or made to be"
        raise DataError(what, where=str(path), hint=HINT)
    if refused := json.loads(told).get("refused"):
        raise DataError(excerpt(refused, 200), where=str(path), hint=HINT)
