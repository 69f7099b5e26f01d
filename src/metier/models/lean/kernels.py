"""RMSNorm, rotary positions, gates and cross-entropy on a GPU, in as few passes as each needs; sums are in float32.

What differs from pack to pack is not specialized: a kernel compiled anew in the middle of a run costs many steps.

Shapes: B rows, T tokens, H heads, K key heads, D width of a head.
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
SCORES_AT_ONCE = 4096
"""Scores that a program reads at once: sixteen for each thread of eight warps. Judgement."""
PROGRAMS = 1024
"""Programs that share the rows of a norm's gradient: several for each processor of the largest cards."""


@triton.jit(do_not_specialize=["rows"])
def _norm(x, weight, out, rows, eps, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    states = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    shrink = tl.rsqrt(tl.sum(states * states, axis=1) / WIDTH + eps)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    tl.store(out + place, states * shrink[:, None] * scale[None, :], mask=inside)


@triton.jit(do_not_specialize=["rows", "turns"])
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


@triton.jit
def _turn(
    x, out, cos, sin, block, rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    place = row[:, None] * (2 * HALF) + column[None, :]
    angle = (row // HEADS)[:, None] * (2 * HALF) + column[None, :]
    low = tl.load(x + place, mask=inside).to(tl.float32)
    high = tl.load(x + place + HALF, mask=inside).to(tl.float32)
    cos_low, cos_high = tl.load(cos + angle, mask=inside), tl.load(cos + angle + HALF, mask=inside)
    sin_low, sin_high = tl.load(sin + angle, mask=inside), tl.load(sin + angle + HALF, mask=inside)
    if BACK:
        tl.store(out + place, low * cos_low + high * sin_high, mask=inside)
        tl.store(out + place + HALF, high * cos_high - low * sin_low, mask=inside)
    else:
        tl.store(out + place, low * cos_low - high * sin_low, mask=inside)
        tl.store(out + place + HALF, high * cos_high + low * sin_high, mask=inside)


@triton.jit(do_not_specialize=["tokens", "programs"])
def _turn_both(
    query, key, of_query, of_key, cos, sin, tokens, programs,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs:
        _turn(query, of_query, cos, sin, program, tokens * HEADS, HEADS, HALF, BLOCK, ROWS, BACK)
    else:
        _turn(key, of_key, cos, sin, program - programs, tokens * KEY_HEADS, KEY_HEADS, HALF, BLOCK, ROWS, BACK)


@triton.jit
def _surprise(scores, target, nats, WIDTH: tl.constexpr, LEARNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * WIDTH
    wanted = tl.load(target + row)
    column = tl.arange(0, BLOCK)
    most = -1e30
    total = tl.zeros([BLOCK], dtype=tl.float32)
    picked = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        place = begin + column
        x = tl.load(scores + place, mask=place < WIDTH, other=float("-inf")).to(tl.float32)
        before = most
        most = tl.maximum(before, tl.max(x, axis=0))
        total = total * tl.exp(before - most) + tl.exp(x - most)
        picked += tl.where(place == wanted, x, 0.0)
    whole = most + tl.log(tl.sum(total, axis=0))
    tl.store(nats + row, whole - tl.sum(picked, axis=0))
    if LEARNS:
        for begin in range(0, WIDTH, BLOCK):
            place = begin + column
            x = tl.load(scores + place, mask=place < WIDTH, other=float("-inf")).to(tl.float32)
            # p - 1 before rounding: in bf16 it would be nothing from p = 0.998 on.
            slope = tl.exp(x - whole) - tl.where(place == wanted, 1.0, 0.0)
            tl.store(scores + place, slope, mask=place < WIDTH)


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


def turned(
    query_BTHD: Tensor, key_BTKD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, *, back: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions, or with `back` their slopes turned back, in one call."""
    query, key = query_BTHD.contiguous(), key_BTKD.contiguous()
    of_query, of_key = query.new_empty(query.shape), key.new_empty(key.shape)
    *places, heads, width = query.shape
    cos, sin = (x.expand(*places, width).contiguous() for x in (cos_BTD, sin_BTD))
    half, tokens, key_heads = width // 2, cos.numel() // width, key.shape[-2]
    block: int = triton.next_power_of_2(half)
    at_once = max(1, AT_ONCE // block)
    programs, more = (triton.cdiv(tokens * count, at_once) for count in (heads, key_heads))
    with torch.cuda.device_of(query):
        _turn_both[(programs + more,)](
            query, key, of_query, of_key, cos, sin, tokens, programs,
            HEADS=heads, KEY_HEADS=key_heads, HALF=half, BLOCK=block, ROWS=at_once, BACK=back,
        )  # fmt: skip
    return of_query, of_key


def surprise_(scores_NV: Tensor, target_N: Tensor, *, learns: bool) -> Tensor:
    """Nats of each target under softmax(scores), shape (N,), float32; with `learns` the scores become their slopes."""
    nats_N = scores_NV.new_empty(len(scores_NV), dtype=torch.float32)
    with torch.cuda.device_of(scores_NV):
        _surprise[(len(scores_NV),)](
            scores_NV, target_N, nats_N, WIDTH=scores_NV.shape[1], LEARNS=learns, BLOCK=SCORES_AT_ONCE, num_warps=8
        )
    return nats_N


def _sizes(x: Tensor) -> tuple[int, int]:
    """The next power of two from a row's width, and the rows of one program."""
    block: int = triton.next_power_of_2(x.shape[-1])
    return block, max(1, AT_ONCE // block)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
