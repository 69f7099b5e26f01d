"""RMSNorm and the gate of a feed-forward part on a GPU, each in one pass over its memory; sums are in float32.

Shapes: N rows, H width of a row.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2048
"""Numbers of one program: sixteen for each thread of four warps. Judgement."""
PROGRAMS = 1024
"""Programs that share the rows of a norm's gradient: several for each processor of the largest cards."""


@triton.jit
def _norm(x, weight, out, rows, eps, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    states = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    shrink = tl.rsqrt(tl.sum(states * states, axis=1) / WIDTH + eps)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    tl.store(out + place, states * shrink[:, None] * scale[None, :], mask=inside)


@triton.jit
def _norm_slopes(
    x, weight, given, of_x, of_weight, rows, turns, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(turns):
        row = (turn * tl.num_programs(0) + program).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        states = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(given + place, mask=inside, other=0.0).to(tl.float32)
        shrink = tl.rsqrt(tl.sum(states * states, axis=1) / WIDTH + eps)
        normed = states * shrink[:, None]
        of_normed = slope * scale[None, :]
        share = tl.sum(of_normed * normed, axis=1) / WIDTH
        tl.store(of_x + place, (of_normed - normed * share[:, None]) * shrink[:, None], mask=inside)
        if LEARNS:
            total += tl.sum(slope * normed, axis=0)
    if LEARNS:
        tl.store(of_weight + program * WIDTH + column, total, mask=column < WIDTH)


@triton.jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    g = tl.load(gate + place, mask=there).to(tl.float32)
    u = tl.load(up + place, mask=there).to(tl.float32)
    tl.store(out + place, g * tl.sigmoid(g) * u, mask=there)


@triton.jit
def _gate_slopes(gate, up, given, of_gate, of_up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    g = tl.load(gate + place, mask=there).to(tl.float32)
    u = tl.load(up + place, mask=there).to(tl.float32)
    slope = tl.load(given + place, mask=there).to(tl.float32)
    gating = tl.sigmoid(g)
    silu = g * gating
    tl.store(of_up + place, slope * silu, mask=there)
    tl.store(of_gate + place, slope * u * (gating + silu * (1 - gating)), mask=there)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """RMSNorm over the last dimension, x / sqrt(mean(x^2) + eps) * (weight + offset), in the format of x."""
    x, out = x.contiguous(), x.new_empty(x.shape)
    block, at_once = _sizes(x)
    rows = x.numel() // x.shape[-1]
    grid = (triton.cdiv(rows, at_once),)
    with torch.cuda.device_of(x):
        _norm[grid](
            x, weight, out, rows, eps, offset, WIDTH=x.shape[-1], BLOCK=block, ROWS=at_once, num_warps=_warps(block)
        )
    return out


def norm_slopes(
    x: Tensor, weight: Tensor, given: Tensor, eps: float, offset: float, *, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Slopes of `norm` by x, and by the weight where it learns."""
    x, given, of_x = x.contiguous(), given.contiguous(), x.new_empty(x.shape)
    block, at_once = _sizes(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    programs = min(PROGRAMS, triton.cdiv(rows, at_once))
    partial = weight.new_empty((programs, width), dtype=torch.float32) if learns else of_x
    with torch.cuda.device_of(x):
        _norm_slopes[(programs,)](
            x, weight, given, of_x, partial, rows, triton.cdiv(rows, at_once * programs), eps, offset,
            WIDTH=width, BLOCK=block, ROWS=at_once, LEARNS=learns, num_warps=_warps(block),
        )  # fmt: skip
    return of_x, partial.sum(0).to(weight.dtype) if learns else None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up, out = gate.contiguous(), up.contiguous(), up.new_empty(up.shape)
    grid = (triton.cdiv(up.numel(), AT_ONCE),)
    with torch.cuda.device_of(up):
        _gate[grid](gate, up, out, up.numel(), BLOCK=AT_ONCE)
    return out


def gated_slopes(gate: Tensor, up: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of `gated` by both."""
    gate, up, given = gate.contiguous(), up.contiguous(), given.contiguous()
    of_gate, of_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grid = (triton.cdiv(up.numel(), AT_ONCE),)
    with torch.cuda.device_of(up):
        _gate_slopes[grid](gate, up, given, of_gate, of_up, up.numel(), BLOCK=AT_ONCE)
    return of_gate, of_up


def _sizes(x: Tensor) -> tuple[int, int]:
    """The next power of two from a row's width, and the rows of one program."""
    block: int = triton.next_power_of_2(x.shape[-1])
    return block, max(1, AT_ONCE // block)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
