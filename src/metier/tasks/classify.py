"""Sorting texts into classes: with a classification head, or with label words of a causal language model.

Shapes: B rows, T tokens of the longest one, K classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from metier.core import Batch, DataError, Fault, Loss
from metier.data.records import Labelled
from metier.models import lean
from metier.models.lean import PADDED, Layout
from metier.tasks import causal, cutting, generation, store
from metier.tasks.causal import TokenRow, TokenTask
from metier.tasks.protocol import Shown
from metier.tasks.refusal import Refusals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.tasks.protocol import Answering


TOKENIZED_AT_ONCE = 1024
"""Texts that the tokenizer is given together."""


@dataclass(frozen=True, slots=True)
class ClassRow:
    """A tokenized text and the index of its class.

    Attributes:
        where: File and line of the row.
        ids: Token ids, shape (T,), int64.
        label: Index into the task's labels.
    """

    where: str
    ids: Tensor
    label: int


class _Sorting:
    """What both ways share: the text is the question, its class the answer."""

    def question(self, record: Record) -> str:
        """The text."""
        return _labelled(record).text

    def reference(self, record: Record) -> str:
        """The class."""
        return _labelled(record).label

    def with_answer(self, record: Record, answer: str) -> Record:
        """The row with another class."""
        return replace(_labelled(record), label=answer)


@dataclass(frozen=True)
class ClassifyByHead(_Sorting):
    """Cross-entropy of a classification head.

    Attributes:
        tokenizer: The model's.
        labels: The classes, in the order of the head's outputs.
        max_tokens: Longer texts are cut at the end.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_tokens: int
    kind: str = "classify"
    unit: str = "row"
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    retains: Literal["language", "encoder", "none"] = "encoder"
    layout: Layout = PADDED

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[ClassRow]:  # noqa: ARG002
        """Tokenize with the special tokens that the encoder was trained with.

        Raises:
            DataError: For labels that the task does not have.
        """
        _check_labels(records, self.labels)
        return store.keep(self._rows(records), vocabulary=len(self.tokenizer))

    def _rows(self, records: Sequence[Record]) -> Iterator[ClassRow]:
        index = {label: i for i, label in enumerate(self.labels)}
        for start in range(0, len(records), TOKENIZED_AT_ONCE):
            rows = [_labelled(record) for record in records[start : start + TOKENIZED_AT_ONCE]]
            coded = _input_ids(self.tokenizer, [row.text for row in rows], self.max_tokens)
            for row, ids in zip(rows, coded, strict=True):
                yield ClassRow(row.where, torch.tensor(ids), index[row.label])

    def size(self, example: ClassRow) -> int:
        """Tokens of the text."""
        return len(example.ids)

    def suited(self, module: nn.Module) -> Self:
        """The task laid out as the network reads best."""
        return replace(self, layout=lean.layout(module))

    def cut(self, examples: Sequence[ClassRow], most_tokens: int) -> cutting.Cuts:
        """Packs where the network reads packs, else rows of like length."""
        cut = cutting.best_fit if self.layout.packed else cutting.by_length
        return cut([len(example.ids) for example in examples], most_tokens)

    def read(self, examples: Sequence[ClassRow]) -> int:
        """Tokens that the network reads for one batch of these rows."""
        sizes = [len(example.ids) for example in examples]
        return sum(sizes) if self.layout.packed else len(sizes) * max(sizes)

    def collate(self, examples: Sequence[ClassRow]) -> Batch:
        """Rows end to end; or padded on the right, with a mask, for an encoder looks both ways."""
        label_B = torch.tensor([example.label for example in examples])
        if self.layout.packed:
            ids = [example.ids.tolist() for example in examples]
            packed = lean.lay(ids)
            return {**lean.inputs(ids, packed, self.layout), "start": torch.tensor(packed.begins), "label": label_B}
        rows = [example.ids for example in examples]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=int(self.tokenizer.pad_token_id or 0)),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_value=0),
            "label": label_B,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Nats of each row's class."""
        nats_B = F.cross_entropy(_scores(model, batch).float(), batch["label"], reduction="none")
        return Loss(nats_B, torch.ones_like(nats_B))

    def show(self, example: ClassRow) -> Shown:
        """The text, and the class as what is learnt."""
        text = str(self.tokenizer.decode(example.ids))
        return Shown(example.where, ((f"{text} -> ", False), (self.labels[example.label], True)))

    @torch.inference_mode()
    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """The class with the highest score."""
        device = next(model.parameters()).device
        coded = _input_ids(self.tokenizer, [self.question(record) for record in records], self.max_tokens)
        rows = [ClassRow("", torch.tensor(ids), 0) for ids in coded]
        answers = [""] * len(rows)
        for group in self.cut(rows, how.batch_tokens):
            batch = {name: value.to(device) for name, value in self.collate([rows[i] for i in group]).items()}
            for index, best in zip(group, _scores(model, batch).argmax(dim=1).tolist(), strict=True):
                answers[index] = self.labels[best]
        return answers


@dataclass(frozen=True)
class ClassifyByWords(_Sorting, TokenTask):
    """A causal model writes the label's name; the most likely label is its answer.

    Attributes:
        tokenizer: The model's.
        labels: The classes.
        template: How a text is put, with {text}.
        max_tokens: Longer texts are cut at the end, the template and the label never.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    template: str
    max_tokens: int
    kind: str = "classify"
    unit: str = "token"
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    retains: Literal["language", "encoder", "none"] = "language"
    layout: Layout = PADDED

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[TokenRow]:  # noqa: ARG002
        """Put the text into the template; the label and the end token are learnt.

        Raises:
            DataError: For labels that the task does not have.
        """
        _check_labels(records, self.labels)
        return store.keep(map(self._row, map(_labelled, records)), vocabulary=len(self.tokenizer))

    def _row(self, row: Labelled) -> TokenRow:
        prompt_T, label_T = self.prompt(row), self.candidate(row.label)
        ids = [*prompt_T.tolist(), *label_T.tolist()]
        return causal.token_row(row.where, ids, learnt_from=len(prompt_T))

    def prompt(self, record: Labelled) -> Tensor:
        """Token ids of the filled template; the text is cut where the whole would be too long."""
        begin = causal.begin_ids(self.tokenizer)
        room = self.max_tokens - len(begin) - max(len(self.candidate(label)) for label in self.labels)
        ids = self._ids(self.template.replace("{text}", record.text))
        if len(ids) > room:
            text = self._ids(record.text)
            kept = self.tokenizer.decode(text[: max(len(text) - (len(ids) - room), 1)])
            ids = self._ids(self.template.replace("{text}", str(kept)))
        return torch.tensor([*begin, *ids])

    def candidate(self, label: str) -> Tensor:
        """Token ids of a label as it is written after the prompt, with the end token."""
        return torch.tensor([*self._ids(f" {label}"), *causal.end_ids(self.tokenizer)])

    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """The label with the highest likelihood."""
        prompts = [self.prompt(_labelled(record)) for record in records]
        candidates = [self.candidate(label) for label in self.labels]
        scores_BK = generation.rank(model, prompts, candidates, batch_tokens=how.batch_tokens)
        return [self.labels[best] for best in scores_BK.argmax(dim=1).tolist()]

    def _ids(self, text: str) -> list[int]:
        return causal.token_ids(self.tokenizer, text)


def _scores(model: nn.Module, batch: Batch) -> Tensor:
    given = {name: batch[name] for name in causal.ARGUMENTS if name in batch}
    reads = lean.at_first_tokens(model, batch["start"]) if "start" in batch else nullcontext()
    with reads:
        scores_BK: Tensor = model(**given).logits
    return scores_BK


def _input_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def _labelled(record: Record) -> Labelled:
    if isinstance(record, Labelled):
        return record
    raise DataError("no label", where=record.where, hint="the classify task reads rows of text and label")


def _check_labels(records: Sequence[Record], labels: Sequence[str]) -> None:
    known = set(labels)
    refusals = Refusals()
    hint = f"the {len(labels)} classes are {', '.join(labels[:10])}{' ...' if len(labels) > 10 else ''}"
    for row in map(_labelled, records):
        if row.label not in known:
            fault = Fault(row.where, f"label {row.label!r} is not among the classes", hint)
            refusals.add("have a label that is not among the classes", fault)
    refusals.refuse(len(records))
