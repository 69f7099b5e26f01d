"""Columns of numbers that grow and may outgrow memory: then they stand in a file that nobody else sees."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from metier.core.files import cache_root, storage_error

IN_MEMORY_BYTES = 16 << 20
"""A column beyond this is written to a file; small ones never touch the disk."""
READS_KEPT = 16
"""Reads after which the pages that were read are let go: a read may bring in 2 MiB around what is asked."""


class Writer:
    """A column while it grows."""

    def __init__(self, dtype: DTypeLike, *, in_memory: int | None = None) -> None:
        """Begin with nothing; beyond `in_memory` bytes, by default `IN_MEMORY_BYTES`, it goes to a file."""
        self._dtype = np.dtype(dtype)
        self._in_memory = IN_MEMORY_BYTES if in_memory is None else in_memory
        self._waiting = bytearray()
        self._written = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return (self._written + len(self._waiting)) // self._dtype.itemsize

    def add(self, values: Sequence[int] | NDArray[Any]) -> None:
        """Append values.

        Raises:
            StorageError: If the disk is full or the cache folder cannot be written.
        """
        self._waiting += np.asarray(values).astype(self._dtype, copy=False).tobytes()
        if len(self._waiting) > self._in_memory:
            self._write()

    def done(self) -> Column:
        """The finished column."""
        if self._file is None:
            return Column(np.frombuffer(self._waiting, dtype=self._dtype), None)
        self._write()
        self._file.flush()
        pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()  # the mapping holds it open
        return Column(np.frombuffer(pages, dtype=self._dtype), pages)

    def _write(self) -> None:
        folder = cache_root()
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                # Nameless where the system allows it, and gone with the process in any case.
                self._file = tempfile.TemporaryFile(dir=folder, prefix="column.")  # noqa: SIM115 - lives as we do
                weakref.finalize(self, self._file.close)
            self._file.write(self._waiting)
        except OSError as error:
            raise storage_error(folder, error) from error
        self._written += len(self._waiting)
        self._waiting = bytearray()


class Column:
    """A finished column: read like an array, from memory or from a mapped file."""

    def __init__(self, values: NDArray[Any], pages: mmap.mmap | None) -> None:
        """Keep the values and the pages that they stand in, if any."""
        self._values, self._pages, self._reads = values, pages, 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Kind of number."""
        return self._values.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of some values."""
        found: NDArray[Any] = self._values[start:stop].copy()
        self._reads += 1
        if self._reads % READS_KEPT == 0:
            self._let_go()
        return found

    def _let_go(self) -> None:
        """Take the pages out of this process; the system may keep them, and gives them back when they are asked for."""
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
