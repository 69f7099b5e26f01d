"""The C library's heap while a network trains on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Names of the settings. Source: malloc.h of the GNU C library."""
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""What the library itself arrives at once large blocks come and go. Source: mallopt(3), M_MMAP_THRESHOLD."""
DENSE = ("glibc.malloc.tcache_count=0", "glibc.malloc.mxfast=0")
"""Settings that the library reads when a process begins, and never again. A tensor's memory is aligned, for which the
library takes a little more and frees the end that is left over. By default it sets such ends aside for small requests,
and the place that a tensor leaves is then too small for the next one of its size. Measured: bench/results/heap.md.
Source: glibc's manual, 39.2 Memory Allocation Tunables."""
_TUNABLES = "GLIBC_TUNABLES"
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


def is_dense() -> bool:
    """Whether this process began with the settings that keep holes out of its heap."""
    said = os.environ.get(_TUNABLES, "").split(":")
    return all(setting in said for setting in DENSE) and _library() is not None


def begin_dense() -> None:
    """Begin this process anew with a dense heap; nothing is done where it has one, or where one cannot be had.

    To be called before anything is worth keeping: the program is started again with the same words, as the same
    process. Who has set one of these settings himself keeps it.
    """
    said = os.environ.get(_TUNABLES, "")
    if any(setting.partition("=")[0] in said for setting in DENSE) or _library() is None or not sys.executable:
        return
    os.environ[_TUNABLES] = ":".join(filter(None, (said, *DENSE)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same program, no shell


def trim() -> None:
    """Give the system back what was freed and is still held, wherever in the heap it lies; not while `kept` runs."""
    library = _library()
    if library is not None and not _IS_KEPT.get():
        library.malloc_trim(0)


@cache
def _library() -> ctypes.CDLL | None:
    """The GNU C library; None where the process has another."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
