"""Processes that read what others made, with little time and memory: a child is begun here, and limits itself here.

| | Linux | macOS | Windows |
|---|---|---|---|
| processor time, writing files | kernel | kernel | no |
| memory | kernel | no | no |

Wall-clock time is for whoever waits. The limits are set by the child itself, after its imports: code between fork and
exec would be unsafe beside the threads of the process that starts it.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ADDRESS_SPACE = Path("/proc/self/statm")


def begin(script: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Run a file of ours in a process of its own; what it reads and writes is piped, what it complains of is lost."""
    return subprocess.Popen(  # noqa: S603 - our own file
        [sys.executable, "-P", "-B", str(script), *map(str, arguments)],
        # Threads that nobody needs would take address space from what is limited.
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def limit(megabytes: int, *, seconds: int | None = None) -> None:
    """Bound what this process may take beyond what it has taken, memory and processor time; forbid writing files.

    What the system cannot bound stays unbounded.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has none of it, macOS no RLIMIT_AS
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if seconds is not None:
            end = math.ceil(time.process_time()) + seconds
            resource.setrlimit(resource.RLIMIT_CPU, (end, end))
        most = _taken_bytes() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _taken_bytes() -> int:
    """Address space of this process; 0 where the system does not tell it."""
    if not ADDRESS_SPACE.exists():
        return 0
    return int(ADDRESS_SPACE.read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
