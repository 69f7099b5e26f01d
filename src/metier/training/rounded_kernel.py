"""Adam on bf16 weights in one pass over a GPU's memory; the formulas are those of `rounding`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Numbers of one program. Judgement: four or eight for each thread."""
SEEDS = (1 << 31) - 1
"""Largest seed, so that the kernel is compiled for one kind of number."""


@triton.jit(do_not_specialize=["seed"])
def _move(
    weight, gradient, first, second, count, seed, keep, fast, slow, root, eps, rate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    g = tl.load(gradient + place, mask=there).to(tl.float32)
    m = tl.load(first + place, mask=there)
    v = tl.load(second + place, mask=there)
    w = tl.load(weight + place, mask=there).to(tl.float32)
    m += (g - m) * fast
    v += (g * g - v) * slow
    w = w * keep - rate * m / (tl.sqrt(v) / root + eps)
    bits = w.to(tl.uint32, bitcast=True) + (tl.randint(seed, place) & 0xFFFF)
    bits = (bits >> 16) << 16
    tl.store(first + place, m, mask=there)
    tl.store(second + place, v, mask=there)
    tl.store(weight + place, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=there)


def move(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, seed: int, keep: float, fast: float,
    slow: float, root: float, eps: float, rate: float,
) -> None:  # fmt: skip
    """Move bf16 weights and the two float32 moments of their gradient, in place; all are contiguous.

    Args:
        weight: What moves.
        gradient: Its gradient.
        first: Running mean of the gradient.
        second: Running mean of its square.
        seed: For the rounding.
        keep: What weight decay leaves of a weight.
        fast: Share of the gradient in its mean.
        slow: Share of its square in that mean.
        root: Root of the share of the squares that have come in so far.
        eps: Added to the root of the squares.
        rate: Learning rate over the share of the gradients that have come in so far.
    """
    count = weight.numel()
    grid = (triton.cdiv(count, BLOCK),)
    with torch.cuda.device_of(weight):
        _move[grid](
            weight, gradient, first, second, count, seed & SEEDS, keep, fast, slow, root, eps, rate, BLOCK=BLOCK
        )
