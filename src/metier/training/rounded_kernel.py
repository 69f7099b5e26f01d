"""Adam on bf16 weights in one pass over a GPU's memory; the formulas are those of `rounding`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK = 4096
"""Numbers of one program: sixteen for each thread of eight warps. Judgement."""
SEEDS = (1 << 31) - 1
"""Largest seed."""


@triton.jit
def _move(
    addresses, counts, seeds, owners, begins, keep, fast, slow, root, eps, rate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    # Torch lays tensors at multiples of 256 bytes; told so, four and more numbers travel at once.
    weight = tl.multiple_of(tl.load(addresses + 4 * owner).to(tl.pointer_type(tl.bfloat16)), 16)
    gradient = tl.multiple_of(tl.load(addresses + 4 * owner + 1).to(tl.pointer_type(tl.bfloat16)), 16)
    first = tl.multiple_of(tl.load(addresses + 4 * owner + 2).to(tl.pointer_type(tl.float32)), 16)
    second = tl.multiple_of(tl.load(addresses + 4 * owner + 3).to(tl.pointer_type(tl.float32)), 16)
    place = (program - tl.load(begins + owner)) * BLOCK + tl.arange(0, BLOCK)
    there = place < tl.load(counts + owner)
    g = tl.load(gradient + place, mask=there).to(tl.float32)
    m = tl.load(first + place, mask=there)
    v = tl.load(second + place, mask=there)
    w = tl.load(weight + place, mask=there).to(tl.float32)
    m += (g - m) * fast
    v += (g * g - v) * slow
    w = w * keep - rate * m / (tl.sqrt(v) / root + eps)
    bits = w.to(tl.uint32, bitcast=True) + (tl.randint(tl.load(seeds + owner), place) & 0xFFFF)
    bits = (bits >> 16) << 16
    tl.store(first + place, m, mask=there)
    tl.store(second + place, v, mask=there)
    tl.store(weight + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=there)


def move(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor],
    seeds: Sequence[int], *, keep: float, fast: float, slow: float, root: float, eps: float, rate: float,
) -> None:  # fmt: skip
    """Move bf16 weights and the two float32 moments of their gradients, in place and in one call.

    All are contiguous, on one device, and begin at a multiple of sixteen bytes.

    Args:
        weights: What moves.
        gradients: Their gradients.
        firsts: Running means of the gradients.
        seconds: Running means of their squares.
        seeds: For the rounding, one for each.
        keep: What weight decay leaves of a weight.
        fast: Share of a gradient in its mean.
        slow: Share of its square in that mean.
        root: Root of the share of the squares that have come in so far.
        eps: Added to the root of the squares.
        rate: Learning rate over the share of the gradients that have come in so far.
    """
    device = weights[0].device
    addresses = torch.tensor(
        [[x.data_ptr() for x in four] for four in zip(weights, gradients, firsts, seconds, strict=True)]
    )
    given = torch.tensor([seed & SEEDS for seed in seeds])
    counts, owners, begins = _layout(tuple(x.numel() for x in weights), device)
    with torch.cuda.device_of(weights[0]):
        _move[(len(owners),)](
            addresses.to(device, non_blocking=True), counts, given.to(device, non_blocking=True), owners, begins,
            keep, fast, slow, root, eps, rate, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _layout(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of each tensor, the tensor that each program works on, and each tensor's first program."""
    programs = torch.tensor([triton.cdiv(count, BLOCK) for count in counts])
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(programs)
    begins = (programs.cumsum(0) - programs).int()
    return torch.tensor(counts).to(device), owners.to(device), begins.to(device)
