"""What this machine has: memory to use, and how fast it multiplies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from metier.core.evidence import Value

MEMORY_INFO = Path("/proc/meminfo")
PROCESS_PAGES = Path("/proc/self/statm")
CONTROL_GROUP = Path("/sys/fs/cgroup")
GEMM_SIZE = 1024
"""Rows and columns of the matrices that are timed."""
GEMM_SECONDS = 0.3
"""How long they are multiplied."""


class Machine(Value):
    """Where the run would take place."""

    device: Literal["cpu", "cuda", "mps"]
    """Kind of device."""
    memory_bytes: int | None
    """Memory that can be used now, by this process; None where the system does not say."""
    bf16_gpu: bool = False
    """Whether the device is a GPU that computes in bf16."""


def this_machine(device: str = "auto") -> Machine:
    """The machine as it is, for the recipe's `model.device`.

    Args:
        device: "auto", "cpu", "mps", "cuda" or "cuda:N". "auto" takes a GPU where there is one.
    """
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        place = torch.device("cuda" if device == "auto" else device)
        free, _ = torch.cuda.mem_get_info(place)
        free += torch.cuda.memory_reserved(place)
        return Machine(device="cuda", memory_bytes=free, bf16_gpu=torch.cuda.is_bf16_supported())
    if device == "mps":
        return Machine(device="mps", memory_bytes=int(torch.mps.recommended_max_memory()))
    return Machine(device="cpu", memory_bytes=free_memory_bytes())


def free_memory_bytes() -> int | None:
    """Memory that a process of this machine may still take, the limit of its container included."""
    limits = [limit for limit in (_available(), _left_in_control_group()) if limit is not None]
    return min(limits, default=None)


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    if not PROCESS_PAGES.exists():
        return None
    return int(PROCESS_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_flops_per_second(device: str = "cpu", *, bf16: bool = False) -> float:
    """Floating-point operations a second of a square matrix product: what the hardware reaches, not what training does.

    Takes about half a second; uses the threads that torch uses.
    """
    import torch

    kind = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.rand(GEMM_SIZE, GEMM_SIZE, device=device, dtype=kind) for _ in range(2))
    torch.mm(left, right).sum().item()  # the first product also starts threads and loads kernels
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < GEMM_SECONDS:
        result = left
        for _ in range(4):
            result = torch.mm(left, right)
        result[0, 0].item()  # waits for the device
        products += 4
    return 2.0 * GEMM_SIZE**3 * products / (time.perf_counter() - began)


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
