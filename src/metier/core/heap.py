"""The C library's heap while a network trains on the CPU."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Names of the settings. Source: malloc.h of the GNU C library."""
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""What the library itself arrives at once large blocks come and go. Source: mallopt(3), M_MMAP_THRESHOLD."""
_IS_KEPT: ContextVar[bool] = ContextVar("_IS_KEPT", default=False)


@contextmanager
def kept() -> Iterator[None]:
    """Reuse freed memory inside the block instead of handing it back to the system at once; give it back at the end.

    The GNU C library asks the system anew for every block over 32 MiB and returns it when it is freed, so each step
    pays page by page for the gradients of large weights that the step before had just let go. Other C libraries are
    left as they are.
    """
    library = _library()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    token = _IS_KEPT.set(True)
    try:
        yield
    finally:
        _IS_KEPT.reset(token)
        for setting, value in _USUAL.items():
            library.mallopt(setting, value)
        trim()


def trim() -> None:
    """Give the system back what was freed and is still held, wherever in the heap it lies; not while `kept` runs."""
    library = _library()
    if library is not None and not _IS_KEPT.get():
        library.malloc_trim(0)


@cache
def _library() -> ctypes.CDLL | None:
    """The GNU C library; None where the process has another."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
