"""What the base says of the rows that will be learnt, asked once before training: guards against forgetting go by it.

What is kept stands with the rows, in memory first and then in a file. No second network is held, whatever the method.

Shapes: T tokens of a row, N learnt tokens, K tokens that are noted of each place, L = K + 1.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from metier.core.lazily import Made
from metier.data.disk import Column, Writer
from metier.models.lean import Teacher
from metier.tasks import causal, store
from metier.tasks.causal import TokenRow, TokenTask
from metier.tasks.scoring import CUT_AT_ONCE, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from metier.core import Batch

NOTED = 20
"""Tokens of the base that are noted at each place. Source: the self-distillation recipe of tinker-cookbook, where the
divergence over 20 tokens and over all of them led to the same."""
READ_AT_ONCE = 4096
"""Tokens that are read in one pass while the base is asked."""


@dataclass(frozen=True, slots=True)
class Surprise:
    """How improbable the base finds each learnt token.

    Attributes:
        task: Suited to the base.
        rows: That were asked about.
        nats: Of the learnt tokens of all rows; 0 for the last of each learnt stretch, which stays whatever the base
            says of it: it ends the reply, and who does not learn it never stops.
    """

    task: TokenTask
    rows: Sequence[TokenRow]
    nats: Column

    def share(self, perplexity: float) -> float:
        """Of the learnt tokens, those whose perplexity is above this."""
        return float((self._all() > math.log(perplexity)).mean())

    def perplexity(self, share: float) -> float:
        """The lowest perplexity above which no more than this share of the learnt tokens lies."""
        nats = self._all()
        place = len(nats) - math.floor(share * len(nats)) - 1
        return math.exp(float(np.partition(nats, place)[place]))

    def masked(self, perplexity: float) -> Sequence[TokenRow]:
        """The rows, in which tokens above this are not learnt. Source: Wu et al. 2025, arXiv:2501.14315."""
        return store.keep(self._narrowed(math.log(perplexity)), vocabulary=len(self.task.tokenizer))

    def _narrowed(self, most: float) -> Iterator[TokenRow]:
        end = 0
        for row in self.rows:
            places = row.learnt.nonzero()[:, 0]
            begin, end = end, end + len(places)
            learnt = row.learnt.clone()
            learnt[places] = torch.from_numpy(self.nats.read(begin, end) <= most)
            yield replace(row, learnt=learnt)

    def _all(self) -> NDArray[np.float32]:
        return self.nats.read(0, len(self.nats))


def surprise(task: TokenTask, base: nn.Module, rows: Sequence[TokenRow]) -> Surprise:
    """Ask the base for the probability of every learnt token.

    Args:
        task: Suited to the base.
        base: Answers as the base does.
        rows: To be learnt.
    """
    nats = Writer(np.float32)
    for row, (nats_N,) in _asked(task, base, rows, lambda batch: (causal.token_nats(base, batch, task.layout),)):
        nats.add(nats_N.masked_fill(_ends(row), 0.0).numpy())
    return Surprise(task, rows, nats.done())


def _ends(row: TokenRow) -> Tensor:
    """Which of the learnt tokens is the last of its stretch, shape (N,)."""
    follows = torch.cat([row.learnt[1:], row.learnt.new_zeros(1)])
    return ~follows[row.learnt]


class Taught(Made[TokenRow]):
    """Rows with what the base says at their learnt tokens, each put together when it is asked for."""

    def __init__(
        self, rows: Sequence[TokenRow], tokens: Column, shares: Column, ends: Sequence[int], weight: float
    ) -> None:
        """Take the rows, columns of tokens and probabilities, where each row's learnt tokens end, and the weight."""
        self._rows, self._tokens, self._shares, self._ends, self._weight = rows, tokens, shares, ends, weight
        self._noted = len(tokens) // ends[-1]

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, place: int) -> TokenRow:
        """The row at a place."""
        begin, end, noted = self._ends[place - 1] if place else 0, self._ends[place], self._noted
        token = self._tokens.read(begin * noted, end * noted).astype(np.int64).reshape(-1, noted)
        share = self._shares.read(begin * (noted + 1), end * (noted + 1)).reshape(-1, noted + 1)
        return replace(
            self._rows[place], teacher=Teacher(torch.from_numpy(token), torch.from_numpy(share), self._weight)
        )


def taught(task: TokenTask, base: nn.Module, rows: Sequence[TokenRow], weight: float) -> Taught:
    """Note what the base says at every learnt token, so that the network is held to it.

    Args:
        task: Suited to the base.
        base: Answers as the base does.
        rows: To be learnt; at least one.
        weight: Of the divergence beside the cross-entropy.
    """
    tokens, shares, ends = Writer(np.int32), Writer(np.float32), array("q")
    asked = _asked(task, base, rows, lambda batch: causal.likeliest(base, batch, task.layout, NOTED))
    for _, (token_NK, share_NL) in asked:
        tokens.add(token_NK.numpy().ravel())
        shares.add(share_NL.numpy().ravel())
        ends.append((ends[-1] if ends else 0) + len(token_NK))
    return Taught(rows, tokens.done(), shares.done(), ends, weight)


@torch.inference_mode()
def _asked(
    task: TokenTask, base: nn.Module, rows: Sequence[TokenRow], ask: Callable[[Batch], tuple[Tensor, ...]]
) -> Iterator[tuple[TokenRow, tuple[Tensor, ...]]]:
    """Each row in order, with its part of the answers, whose first dimension is that of the learnt tokens."""
    device = next(base.parameters()).device
    was_training = base.training
    base.eval()
    try:
        for start in range(0, len(rows), CUT_AT_ONCE):
            some = rows[start : start + CUT_AT_ONCE]
            found: list[tuple[Tensor, ...]] = [()] * len(some)
            for cut in task.cut(some, READ_AT_ONCE):
                batch = task.collate([some[i] for i in cut])
                answers = [answer.cpu().split(batch["count"].tolist()) for answer in ask(to_device(batch, device))]
                for index, parts in zip(cut, zip(*answers, strict=True), strict=True):
                    found[index] = parts
            yield from zip(some, found, strict=True)
    finally:
        base.train(was_training)
