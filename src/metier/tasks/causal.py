"""Next-token prediction: what chat, completion and label words have in common.

Shapes: B rows, T tokens of the longest one, N learnt tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from metier.adapt import wrapped_base
from metier.core import Batch, Loss
from metier.models import lean
from metier.models.lean import PADDED, Layout, Teacher
from metier.tasks import cutting
from metier.tasks.protocol import Shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

ARGUMENTS = ("input_ids", "position_ids", "attention_mask")
"""What of a batch the network is given."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A tokenized example.

    Attributes:
        where: File and line of the row.
        ids: Token ids, shape (T,), int64.
        learnt: Whether the token is to be predicted, shape (T,), bool; the first token never is.
        teacher: What the base says at the learnt tokens, where the network is held to it; of all rows of a batch, or
            of none.
    """

    where: str
    ids: Tensor
    learnt: Tensor
    teacher: Teacher | None = None


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
    """What a task whose examples are `TokenRow`s has in common; the task brings the tokenizer and the layout."""

    tokenizer: PreTrainedTokenizerBase
    layout: Layout

    def suited(self, module: nn.Module) -> Self:
        """The task laid out as the network reads best."""
        known = self.layout.packed
        return replace(self, layout=lean.revised(self.layout, module) if known else lean.layout(module))  # type: ignore[type-var]

    def size(self, example: TokenRow) -> int:
        """Tokens of the row."""
        return len(example.ids)

    def cut(self, examples: Sequence[TokenRow], most_tokens: int) -> cutting.Cuts:
        """Packs where the network reads packs, with rows that begin alike together; else rows of like length."""
        sizes = [len(row.ids) for row in examples]
        if not self.layout.packed:
            return cutting.by_length(sizes, most_tokens)
        if not self.layout.shares:
            return cutting.best_fit(sizes, most_tokens)
        return cutting.by_beginning([row.ids.tolist() for row in examples], _shareable(examples), most_tokens)

    def read(self, examples: Sequence[TokenRow]) -> int:
        """Tokens that the network reads for one batch of these rows."""
        if not self.layout.packed:
            return len(examples) * max(len(row.ids) for row in examples)
        return lay(examples, self.layout)[1].pack.tokens

    def collate(self, examples: Sequence[TokenRow]) -> Batch:
        """Rows end to end, or padded on the right."""
        return collate(examples, int(self.tokenizer.pad_token_id or 0), self.layout)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Nats of each row's learnt tokens."""
        return loss(model, batch, self.layout)

    def show(self, example: TokenRow) -> Shown:
        """The row as text, with what is learnt marked."""
        return show(example, self.tokenizer)


def collate(rows: Sequence[TokenRow], pad_id: int, layout: Layout = PADDED) -> Batch:
    """Rows in one batch: what the network is given, which places predict (counted over all of it), and what.

    Padding is never learnt, by position and not by its id (which may be the end token's). It stands to the right,
    where a causal model cannot look, so it needs no attention mask, and attention without a mask runs on the fast path.
    """
    if layout.packed:
        ids, packed = lay(rows, layout)
        given = lean.inputs(ids, packed, layout)
        begins: Sequence[int] = packed.begins
    else:
        given = {"input_ids": pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad_id)}
        begins = range(0, given["input_ids"].numel(), given["input_ids"].shape[1])
    learnt = [row.learnt.nonzero()[:, 0] for row in rows]
    count_B = torch.tensor([len(places) for places in learnt])
    return {
        **given,
        "place": torch.cat([begin + places - 1 for begin, places in zip(begins, learnt, strict=True)]),
        "target": torch.cat([row.ids[places] for row, places in zip(rows, learnt, strict=True)]),
        "row": torch.arange(len(rows)).repeat_interleave(count_B),
        "count": count_B,
        **_taught([row.teacher for row in rows if row.teacher is not None]),
    }


def _taught(teachers: Sequence[Teacher]) -> Batch:
    """What the base says at the learnt tokens of a batch, where it was asked."""
    if not teachers:
        return {}
    tokens, shares, weights = zip(*teachers, strict=True)
    return {"taught": torch.cat(tokens), "taught_share": torch.cat(shares), "taught_weight": torch.tensor(weights[0])}


def lay(rows: Sequence[TokenRow], layout: Layout) -> tuple[list[list[int]], lean.Packed]:
    """The rows' ids, and how they stand in a pack."""
    ids = [row.ids.tolist() for row in rows]
    return ids, lean.lay(ids, _shareable(rows) if layout.shares else None)


def _shareable(rows: Sequence[TokenRow]) -> list[int]:
    """How many tokens a row may share: what predicts its first learnt token must be its own."""
    first = [int(row.learnt.int().argmax()) if bool(row.learnt.any()) else len(row.ids) for row in rows]
    return [max(0, place - 1) for place in first]


def predict(model: nn.Module, batch: Batch) -> Predicted:
    """Score the learnt tokens: position t predicts token t + 1. The head is computed only where something is learnt."""
    given, place_N = _given(batch), batch["place"]
    head = lean.output_layer(wrapped_base(model))
    hook: Any = None
    if head is not None:
        hook = head.register_forward_pre_hook(lambda _, g: (g[0].flatten(0, 1)[place_N][None], *g[1:]))
    try:
        logits = model(**given, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    # A network that computes its scores in another way has scored every place.
    logits_NV = logits[0] if logits.shape[:2] == (1, len(place_N)) else logits.flatten(0, 1)[place_N]
    return Predicted(logits_NV, batch["target"], batch["row"])


def loss(model: nn.Module, batch: Batch, layout: Layout = PADDED) -> Loss:
    """Sum of token cross-entropies for each row, in nats; where there is a teacher, its weighted divergence as well."""
    return _by_row(token_nats(model, batch, layout), batch["row"], rows=len(batch["count"]))


def token_nats(model: nn.Module, batch: Batch, layout: Layout = PADDED) -> Tensor:
    """The same for each learnt token by itself, shape (N,)."""
    teacher = _teacher(batch)
    if layout.finish is None:
        logits_NV = predict(model, batch).logits_NV.float()
        nats_N = F.cross_entropy(logits_NV, batch["target"], reduction="none")
        return nats_N if teacher is None else nats_N + teacher.weight * lean.divergence(logits_NV, teacher)
    states_NH, head = _before_head(model, batch)
    return lean.cross_entropy(states_NH, head.weight, head.bias, batch["target"], layout.finish, teacher)


def _teacher(batch: Batch) -> Teacher | None:
    return Teacher(batch["taught"], batch["taught_share"], batch["taught_weight"]) if "taught" in batch else None


def likeliest(model: nn.Module, batch: Batch, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at each learnt place and their probabilities, as a `Teacher` has them."""
    if layout.finish is None:
        return lean.top_shares(predict(model, batch).logits_NV.float(), count)
    states_NH, head = _before_head(model, batch)
    return lean.likeliest(states_NH, head.weight, head.bias, count, layout.finish)


def _before_head(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """What the output layer is given where something is learnt, shape (N, H), and that layer."""
    states, _ = lean.hidden_states(model, _given(batch))
    return states[batch["place"]], lean.output_layer(wrapped_base(model))


def _by_row(nats_N: Tensor, row_N: Tensor, *, rows: int) -> Loss:
    total_B = nats_N.new_zeros(rows).index_add(0, row_N, nats_N)
    return Loss(total_B, torch.bincount(row_N, minlength=rows).to(nats_N.dtype))


def _given(batch: Batch) -> Mapping[str, Tensor]:
    return {name: batch[name] for name in ARGUMENTS if name in batch}


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
