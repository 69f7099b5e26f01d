"""RMSNorm and the gated feed-forward part with their gradients written out: fewer passes over memory, less kept.

Shapes: ... tokens, H hidden, F feed-forward.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.models.lean.numbers import exact

CHUNK = 64
"""Tokens whose feed-forward values stay in a core's cache from one pass to the next. Measured at F = 1536."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset). Source: Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        """Take over the weight of the module that this one stands for."""
        super().__init__()
        self.weight = weight
        self._eps, self._offset = eps, offset

    def forward(self, hidden: Tensor) -> Tensor:
        """The normed states, in their own format."""
        normed: Tensor = _RMSNorm.apply(hidden, self.weight, self._eps, self._offset)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.offset, ctx.eps, ctx.by_kernel = offset, eps, has_kernels(given)
        if ctx.by_kernel:
            ctx.save_for_backward(given, weight)
            from metier.models.lean import kernels

            return kernels.norm(given, weight, eps, offset)
        x = given.to(exact(given.dtype))
        shrink = (x.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(given, shrink, weight)
        return (x * shrink).mul_(weight + offset if offset else weight).to(given.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        if ctx.by_kernel:
            given, weight = ctx.saved_tensors
            from metier.models.lean import kernels

            slopes = kernels.norm_slopes(given, weight, slope, ctx.eps, ctx.offset, learns=ctx.needs_input_grad[1])
            return *slopes, None, None
        given, shrink, weight = ctx.saved_tensors
        normed = given.to(shrink.dtype) * shrink
        slope = slope.to(shrink.dtype)
        of_weight = (slope * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_x = slope * (weight + ctx.offset if ctx.offset else weight)
        share = (of_x * normed).mean(-1, keepdim=True)
        return of_x.sub_(normed.mul_(share)).mul_(shrink).to(given.dtype), of_weight, None, None


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        """Take over the layers of the module that this one stands for, under their names."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, hidden: Tensor) -> Tensor:
        """The feed-forward part's answer."""
        inner = _SwiGLU.apply(self.gate_proj(hidden), self.up_proj(hidden))  # type: ignore[no-untyped-call]
        answer: Tensor = self.down_proj(inner)
        return answer


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if has_kernels(gate):
            from metier.models.lean import kernels

            return kernels.gated(gate, up)
        inner = torch.empty_like(up)
        for g, u, out in _pieces(gate, up, inner):
            torch.mul(F.silu(g), u, out=out)
        return inner

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        if has_kernels(gate):
            from metier.models.lean import kernels

            return kernels.gated_slopes(gate, up, slope)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, given, to_gate, to_up in _pieces(gate, up, slope, of_gate, of_up):
            gating = torch.sigmoid(g)
            silu = g * gating
            torch.mul(given, silu, out=to_up)
            # The derivative of g * sigmoid(g) is sigmoid(g) + silu(g) * (1 - sigmoid(g)).
            torch.mul(given, u, out=to_gate).mul_(torch.addcmul(gating, silu, 1 - gating))
        return of_gate, of_up


class Dropout(nn.Module):
    """Dropout whose chances are drawn four at a time. Source: Srivastava et al. 2014, JMLR 15, 1929-1958."""

    def __init__(self, p: float) -> None:
        """Share of what is dropped, kept to a whole number of 65,536ths."""
        super().__init__()
        self.p, self._dropped = p, round(p * DRAWS)  # BERT's attention asks its dropout layer for p

    def forward(self, given: Tensor) -> Tensor:
        """What is given, with some of it zero and the rest scaled up; all of it outside of training."""
        if not self.training:
            return given
        draws = torch.empty(-(-given.numel() // 4), dtype=torch.int64, device=given.device).random_(-(2**63), None)
        kept = (draws.view(torch.int16)[: given.numel()] >= self._dropped - DRAWS // 2).view(given.shape)
        return given * kept * (DRAWS / (DRAWS - self._dropped))


DRAWS = 1 << 16
"""Values of a 16-bit draw."""


def has_kernels(x: Tensor) -> bool:
    """Whether the GPU's kernels take these states."""
    return x.device.type == "cuda" and x.dtype in KINDS and x.numel() > 0 and has_triton()


KINDS = (torch.bfloat16, torch.float16, torch.float32)
"""Formats that the kernels take; their sums are in float32."""


@cache
def has_triton() -> bool:
    """Whether there is what compiles kernels for a GPU."""
    return find_spec("triton") is not None


def _pieces(*tensors: Tensor) -> Any:
    """The same tokens of every tensor, a few at a time; a device takes them all at once."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    size = CHUNK if tensors[0].device.type == "cpu" else max(1, len(flat[0]))
    return zip(*(tensor.split(size) for tensor in flat), strict=True)
