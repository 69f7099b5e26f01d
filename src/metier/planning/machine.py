"""What this machine has: memory to use, and how fast it multiplies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from metier.core.evidence import Value
from metier.core.memory import free_memory_bytes

PROCESS_PAGES = Path("/proc/self/statm")
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
