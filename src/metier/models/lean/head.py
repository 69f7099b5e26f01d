"""Cross-entropy over a vocabulary without ever holding the scores of all places.

Shapes: N places, n places of a chunk, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.models.lean.numbers import exact, working

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 256
"""Places whose scores exist at once. Measured on a 2-core CPU with 49,152 tokens: smaller chunks read the head's weight
more often than they save, larger ones leave the cache."""


PIECE = 32
"""Places whose scores stay in the cache from one pass to the next."""


class Finish(NamedTuple):
    """What an architecture does to scores after its head.

    Attributes:
        scale: They are multiplied by it.
        cap: They are then squashed to cap * tanh(x / cap). Source: Gemma 2, arXiv:2408.00118, section 2.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """The finished scores."""
        scores = scores if self.scale == 1.0 else scores * self.scale
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


PLAIN = Finish()
"""Scores are left as they are."""


def cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, finish: Finish = PLAIN
) -> Tensor:
    """Nats of each target under softmax(finish(hidden @ weight.T + bias)), shape (N,), at least float32.

    The gradient is computed on the way, chunk by chunk, for a training that sums all places alike, which is what a
    loss kept as sums does; where places are weighted unequally it is computed again.
    """
    head = _Head(weight_VH, bias_V, target_N, finish, learns=torch.is_grad_enabled())
    hidden_NH = hidden_NH.to(working(hidden_NH))
    nats_N: Tensor = _CrossEntropy.apply(hidden_NH, weight_VH, bias_V, head)  # type: ignore[no-untyped-call]
    return nats_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> Tensor:
        wanted = [head.learns and needed for needed in ctx.needs_input_grad[:3]]
        nats, slopes = head.score(hidden.detach(), wanted, None)
        ctx.save_for_backward(hidden, weight, bias, *slopes)
        ctx.head = head
        return nats

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, _, _, *slopes = ctx.saved_tensors
        first = given[0] if len(given) else given.new_ones(())
        if not bool((given == first).all()):
            _, slopes = ctx.head.score(hidden, ctx.needs_input_grad[:3], given)
        elif first != 1:
            slopes = [None if slope is None else slope * first.to(slope.dtype) for slope in slopes]
        return (*slopes, None)


@dataclass(frozen=True, slots=True)
class _Head:
    """An output layer, what it should say, and how."""

    weight_VH: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    finish: Finish
    learns: bool

    def score(
        self, hidden_NH: Tensor, wanted: Sequence[bool], given_N: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Nats, and the wanted slopes of hidden, weight and bias; `given_N` weights the places."""
        matrix_VH = self.weight_VH.detach().to(hidden_NH.dtype)
        nats_N = torch.empty(len(hidden_NH), dtype=exact(hidden_NH.dtype), device=hidden_NH.device)
        slopes = [
            torch.zeros_like(x) if x is not None and want else None
            for x, want in zip((hidden_NH, self.weight_VH, self.bias_V), wanted, strict=True)
        ]
        with torch.autocast(hidden_NH.device.type, enabled=False), torch.no_grad():
            for begin in range(0, len(hidden_NH), CHUNK):
                chunk = slice(begin, begin + CHUNK)
                nats_N[chunk], slope_nV = self._chunk(hidden_NH[chunk], matrix_VH, self.target_N[chunk, None])
                if not any(wanted):
                    continue
                if given_N is not None:
                    slope_nV *= given_N[chunk, None]
                _take(slopes, slope_nV.to(hidden_NH.dtype), hidden_NH[chunk], matrix_VH, chunk)
        return nats_N, slopes

    def _chunk(self, hidden_nH: Tensor, matrix_VH: Tensor, target_n1: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of a chunk, and their slope by the scores as the layer puts them out."""
        bias = None if self.bias_V is None else self.bias_V.detach().to(hidden_nH.dtype)
        scores_nV = self.finish(F.linear(hidden_nH, matrix_VH, bias).to(exact(hidden_nH.dtype)))
        wanted_n = scores_nV.gather(1, target_n1)[:, 0]
        # The cap's slope asks for the scores themselves; else they may go.
        slope_nV = scores_nV.clone() if self.learns and self.finish.cap is not None else scores_nV
        nats_n = torch.cat([_softmax_(piece) for piece in slope_nV.split(PIECE)]) - wanted_n
        if not self.learns:
            return nats_n, slope_nV
        slope_nV.scatter_add_(1, target_n1, slope_nV.new_full(target_n1.shape, -1.0))
        if self.finish.cap is not None:
            slope_nV *= 1 - (scores_nV / self.finish.cap).square()
        if self.finish.scale != 1.0:
            slope_nV *= self.finish.scale
        return nats_n, slope_nV


def _softmax_(scores_nV: Tensor) -> Tensor:
    """Make scores probabilities in place; their log-sum-exp, shape (n,).

    torch.sum adds in a tree. torch's own log_softmax adds one after the other, which over 49,152 tokens in float32 was
    off by 1e-5 of the loss.
    """
    most_n1 = scores_nV.amax(dim=-1, keepdim=True)
    sum_n1 = scores_nV.sub_(most_n1).exp_().sum(dim=-1, keepdim=True)
    scores_nV.div_(sum_n1)
    return (most_n1 + sum_n1.log())[:, 0]


def _take(slopes: list[Tensor | None], slope_nV: Tensor, hidden_nH: Tensor, matrix_VH: Tensor, chunk: slice) -> None:
    """Add a chunk's share to the slopes of hidden, weight and bias."""
    of_hidden, of_weight, of_bias = slopes
    if of_hidden is not None:
        torch.mm(slope_nV, matrix_VH, out=of_hidden[chunk])
    if of_weight is not None and of_weight.dtype == hidden_nH.dtype:
        of_weight.addmm_(slope_nV.T, hidden_nH)
    elif of_weight is not None:
        of_weight += slope_nV.T @ hidden_nH
    if of_bias is not None:
        of_bias += slope_nV.sum(0)
