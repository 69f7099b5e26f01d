"""Memory that this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """Memory that a process of this machine may still take, the limit of its container included."""
    limits = [limit for limit in (_available(), _left_in_control_group()) if limit is not None]
    return min(limits, default=None)


def _available() -> int | None:
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, and some systems lack a name
        return None


def _left_in_control_group() -> int | None:
    limit, used = CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    word = limit.read_text().strip()
    return None if word == "max" else max(0, int(word) - int(used.read_text()))
