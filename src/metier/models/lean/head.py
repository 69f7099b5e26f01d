"""Cross-entropy over a vocabulary without ever holding the scores of all places.

Shapes: N places, n places of a chunk, H width, V vocabulary, K tokens that a teacher names, L = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.models.lean.numbers import exact, working
from metier.models.lean.pointwise import has_kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 256
"""Places whose scores exist at once. Measured on a 2-core CPU with 49,152 tokens: smaller chunks read the head's weight
more often than they save, larger ones leave the cache."""


PIECE = 32
"""Places whose scores stay in the cache from one pass to the next."""
ON_DEVICE = 1 << 28
"""Scores that exist at once on a device: 1 GiB in float32, enough to keep a large one busy. Judgement."""


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


class Teacher(NamedTuple):
    """What another network says at each place: its K likeliest tokens, and all others as one.

    Attributes:
        token_NK: The tokens.
        share_NL: Their probabilities, and in one more column that of all others; L = K + 1, and each row sums to 1.
        weight: What the divergence from it counts beside the cross-entropy: one number.
    """

    token_NK: Tensor
    share_NL: Tensor
    weight: Tensor | float

    def at(self, places: slice) -> Teacher:
        """The same for some places."""
        return Teacher(self.token_NK[places], self.share_NL[places], self.weight)


def cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    finish: Finish = PLAIN,
    teacher: Teacher | None = None,
) -> Tensor:
    """Nats of each target under softmax(finish(hidden @ weight.T + bias)), shape (N,), at least float32.

    With a teacher q, its weight times KL(q || p) is added, where p is that softmax with all tokens but the teacher's
    taken as one.

    The gradient is computed on the way, chunk by chunk, for a training that sums all places alike, which is what a
    loss kept as sums does; where places are weighted unequally it is computed again.
    """
    head = _Head(weight_VH, bias_V, target_N, finish, teacher, learns=torch.is_grad_enabled())
    hidden_NH = hidden_NH.to(working(hidden_NH))
    nats_N: Tensor = _CrossEntropy.apply(hidden_NH, weight_VH, bias_V, head)  # type: ignore[no-untyped-call]
    return nats_N


@torch.no_grad()
def likeliest(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, count: int, finish: Finish = PLAIN
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each place, (N, K), and their shares as a `Teacher` has them, (N, L)."""
    hidden_NH = hidden_NH.to(working(hidden_NH))
    matrix_VH = weight_VH.to(hidden_NH.dtype)
    bias = None if bias_V is None else bias_V.to(hidden_NH.dtype)
    found = [
        top_shares(finish(F.linear(hidden_nH, matrix_VH, bias).to(exact(hidden_NH.dtype))), count)
        for hidden_nH in hidden_NH.split(CHUNK)
    ]
    tokens, shares = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(shares)


def top_shares(scores_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same of scores that are there already."""
    share_NV = torch.softmax(scores_NV, dim=-1)
    top_NK, token_NK = share_NV.topk(min(count, share_NV.shape[-1] - 1), dim=-1)
    # The others are added up, not taken from 1: where the top has it all, nothing would be left of them.
    rest_N1 = share_NV.scatter(1, token_NK, 0.0).sum(dim=-1, keepdim=True)
    return token_NK, torch.cat([top_NK, rest_N1], dim=-1)


def divergence(scores_NV: Tensor, teacher: Teacher) -> Tensor:
    """KL of the teacher from softmax(scores), tokens that it does not name taken as one, in nats, shape (N,)."""
    whole_N1 = torch.logsumexp(scores_NV, dim=-1, keepdim=True)
    rest_N1 = torch.logsumexp(scores_NV.scatter(1, teacher.token_NK, -torch.inf), dim=-1, keepdim=True)
    log_NL = torch.cat([scores_NV.gather(1, teacher.token_NK), rest_N1], dim=-1) - whole_N1
    return _relative_entropy(teacher.share_NL.to(log_NL.dtype), log_NL)


def _relative_entropy(share_NL: Tensor, log_NL: Tensor) -> Tensor:
    return (torch.xlogy(share_NL, share_NL) - share_NL * log_NL.clamp(min=-1e4)).sum(dim=-1)


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
    teacher: Teacher | None
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
        on_cpu = hidden_NH.device.type == "cpu"
        places = CHUNK if on_cpu else max(CHUNK, ON_DEVICE // len(matrix_VH))
        answer = self._chunk if on_cpu or self.teacher is not None or self.finish != PLAIN else self._plain_chunk
        with torch.autocast(hidden_NH.device.type, enabled=False), torch.no_grad():
            for begin in range(0, len(hidden_NH), places):
                chunk = slice(begin, begin + places)
                nats_N[chunk], slope_nV = answer(hidden_NH[chunk], matrix_VH, chunk)
                if not any(wanted):
                    continue
                if given_N is not None:
                    slope_nV *= given_N[chunk, None]
                _take(slopes, slope_nV.to(hidden_NH.dtype), hidden_NH[chunk], matrix_VH, chunk)
        return nats_N, slopes

    def _plain_chunk(self, hidden_nH: Tensor, matrix_VH: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """The same as `_chunk` where nothing follows the layer, in the fewest passes over a device's memory."""
        target_n1 = self.target_N[chunk, None]
        bias = None if self.bias_V is None else self.bias_V.detach().to(hidden_nH.dtype)
        scores_nV = F.linear(hidden_nH, matrix_VH, bias)
        if has_kernels(scores_nV):
            from metier.models.lean import kernels

            return kernels.surprise_(scores_nV, self.target_N[chunk], learns=self.learns), scores_nV
        log_nV = torch.log_softmax(scores_nV, dim=-1, dtype=exact(scores_nV.dtype))
        wanted_n1 = log_nV.gather(1, target_n1)
        slope_nV = torch.exp(log_nV, out=scores_nV) if self.learns else scores_nV
        # p - 1 before rounding: in bf16 it would be nothing from p = 0.998 on.
        slope_nV.scatter_(1, target_n1, wanted_n1.expm1().to(slope_nV.dtype))
        return -wanted_n1[:, 0], slope_nV

    def _chunk(self, hidden_nH: Tensor, matrix_VH: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Nats of a chunk, and their slope by the scores as the layer puts them out."""
        target_n1 = self.target_N[chunk, None]
        bias = None if self.bias_V is None else self.bias_V.detach().to(hidden_nH.dtype)
        scores_nV = self.finish(F.linear(hidden_nH, matrix_VH, bias).to(exact(hidden_nH.dtype)))
        wanted_n = scores_nV.gather(1, target_n1)[:, 0]
        # The cap's slope asks for the scores themselves; else they may go.
        slope_nV = scores_nV.clone() if self.learns and self.finish.cap is not None else scores_nV
        nats_n = torch.cat([_softmax_(piece) for piece in slope_nV.split(PIECE)]) - wanted_n
        if self.teacher is not None:
            nats_n += _pull_(slope_nV, self.teacher.at(chunk))
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


def _pull_(share_nV: Tensor, teacher: Teacher) -> Tensor:
    """Weighted divergence of the teacher from probabilities, shape (n,), whose slope is added to them in place.

    With p the probabilities and q the teacher's, r the sum of all that it does not name: the slope of KL(q || p) by the
    scores is p - q at its tokens, and p (1 - q_r / p_r) at all others.
    """
    token_nK, weight = teacher.token_NK, teacher.weight
    wanted_nL = teacher.share_NL.to(share_nV.dtype)
    top_nK = share_nV.gather(1, token_nK)
    rest_n1 = share_nV.scatter_(1, token_nK, 0.0).sum(dim=-1, keepdim=True)
    rest_n1 = rest_n1.clamp(min=torch.finfo(share_nV.dtype).tiny)
    nats_n = weight * _relative_entropy(wanted_nL, torch.cat([top_nK, rest_n1], dim=-1).log())
    share_nV *= 1 + weight * (1 - wanted_nL[:, -1:] / rest_n1)
    share_nV.scatter_(1, token_nK, (1 + weight) * top_nK - weight * wanted_nL[:, :-1])
    return nats_n


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
