"""What a part of the work costs: wall time, CPU time of all threads, peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metier.core import heap
from metier.core.evidence import Phase

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Meter:
    """Collects the phases of a run."""

    def __init__(self) -> None:
        """Start with no phase."""
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside the block; a block that fails is measured as well."""
        wall, cpu = time.perf_counter(), time.process_time()
        _forget_peak()
        try:
            yield
        finally:
            self.phases.append(
                Phase(
                    name=name,
                    wall_seconds=time.perf_counter() - wall,
                    cpu_seconds=time.process_time() - cpu,
                    peak_memory_bytes=peak_memory_bytes(),
                )
            )


def peak_memory_bytes() -> int:
    """Highest use since the last phase began: device memory with a GPU, else resident memory of the process.

    Linux lets a process reset its own high-water mark; elsewhere the figure is the peak since the process began.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _peak_since_start()


def _peak_since_start() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    heap.trim()  # what earlier work let go and the heap still holds is no use of memory
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then the one since the process began
