"""Next-token prediction: what chat, completion and label words have in common.

Shapes: B rows, T tokens of the longest one, N learnt tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from metier.adapt import output_layer, wrapped_base
from metier.core import Batch, Loss
from metier.tasks.protocol import Shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A tokenized example.

    Attributes:
        where: File and line of the row.
        ids: Token ids, shape (T,), int64.
        learnt: Whether the token is to be predicted, shape (T,), bool; the first token never is.
    """

    where: str
    ids: Tensor
    learnt: Tensor


@dataclass(frozen=True, slots=True)
class Predicted:
    """Scores for the learnt tokens of a batch.

    Attributes:
        logits_NV: Scores of every token at each learnt position.
        target_N: The token that stands there.
        row_N: Row of the batch it belongs to.
    """

    logits_NV: Tensor
    target_N: Tensor
    row_N: Tensor


class TokenTask:
    """What a task whose examples are `TokenRow`s has in common; the task brings the tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def size(self, example: TokenRow) -> int:
        """Tokens of the row."""
        return len(example.ids)

    def collate(self, examples: Sequence[TokenRow]) -> Batch:
        """Pad on the right."""
        return collate(examples, int(self.tokenizer.pad_token_id or 0))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Nats of each row's learnt tokens."""
        return loss(model, batch)

    def show(self, example: TokenRow) -> Shown:
        """The row as text, with what is learnt marked."""
        return show(example, self.tokenizer)


def collate(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Pad on the right; padding is never learnt, by position and not by its id (which may be the end token's)."""
    return {
        "ids": pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad_id),
        "learnt": pad_sequence([row.learnt for row in rows], batch_first=True, padding_value=False),
    }


def predict(model: nn.Module, batch: Batch) -> Predicted:
    """Score the learnt tokens: position t predicts token t + 1.

    A causal model cannot look at what stands to its right, so padding there needs no attention mask, and attention
    without a mask runs on the fast path. The head is computed only where something is learnt.
    """
    ids_BT, learnt_BT = batch["ids"], batch["learnt"]
    row_N, place_N = learnt_BT[:, 1:].nonzero(as_tuple=True)
    with _head_only_at(output_layer(wrapped_base(model)), row_N, place_N):
        logits = model(input_ids=ids_BT, use_cache=False).logits
    # A network that computes its scores in another way has scored every place.
    logits_NV = logits[0] if logits.shape[:2] == (1, len(row_N)) else logits[row_N, place_N]
    return Predicted(logits_NV, ids_BT[:, 1:][row_N, place_N], row_N)


@contextmanager
def _head_only_at(head: nn.Module | None, row_N: Tensor, place_N: Tensor) -> Iterator[None]:
    """Let the head see only the chosen places, as one row; what the network does to the scores afterwards stays."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][row_N, place_N][None], *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Sum of token cross-entropies for each row, in nats."""
    return sum_by_row(predict(model, batch), rows=len(batch["ids"]))


def sum_by_row(predicted: Predicted, *, rows: int) -> Loss:
    """Cross-entropies in float32, added up by row."""
    nats_N = F.cross_entropy(predicted.logits_NV.float(), predicted.target_N, reduction="none")
    total_B = nats_N.new_zeros(rows).index_add(0, predicted.row_N, nats_N)
    weight_B = torch.bincount(predicted.row_N, minlength=rows).to(nats_N.dtype)
    return Loss(total_B, weight_B)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a piece of text, with nothing put before or after it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, for tokenizers that put one before every text, else nothing."""
    begin = tokenizer.bos_token_id
    return [int(begin)] if begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin] else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, where the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def token_row(where: str, ids: Sequence[int], *, learnt_from: int) -> TokenRow:
    """A row whose tokens are learnt from an index on; the first token never is, for nothing predicts it."""
    return TokenRow(where, torch.tensor(ids), torch.arange(len(ids)) >= max(learnt_from, 1))


def show(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """The row as text, cut where learnt and not learnt meet."""
    parts: list[tuple[str, bool]] = []
    start = 0
    flags = row.learnt.tolist()
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            parts.append((str(tokenizer.decode(row.ids[start:end])), flags[start]))
            start = end
    return Shown(row.where, tuple(parts))


def cut_by_tokens(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Group indices, longest first, so that count x longest stays within `most` tokens; one always fits."""
    group: list[int] = []
    longest = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if group and (len(group) + 1) * longest > most:
            yield group
            group = []
        if not group:
            longest = sizes[index]
        group.append(index)
    if group:
        yield group
