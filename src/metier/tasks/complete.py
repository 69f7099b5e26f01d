"""Continuing text: plain text, prefix to rest, and fill in the middle."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from metier.core import DataError, Fault, RecipeError
from metier.core.rng import derive
from metier.data.records import Completion, Document
from metier.models.lean import PADDED, Layout
from metier.tasks import causal, generation, store
from metier.tasks.causal import TokenRow, TokenTask
from metier.tasks.refusal import TOO_LONG, Refusals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.tasks.protocol import Answering

MIDDLE_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<PRE>", "<SUF>", "<MID>"),
)
"""Markers that published code models use for prefix, suffix and middle."""


@dataclass(frozen=True)
class Complete(TokenTask):
    """Next-token prediction on all of a text, or on what follows a prompt.

    Attributes:
        tokenizer: The model's.
        max_tokens: Longest window.
        too_long: What to do with longer prompt/completion rows.
        middle_share: Share of training rows turned into fill-in-the-middle.
        middle: Token ids of the prefix, suffix and middle markers, where used.
        seed: Chooses the rows and the cuts.
        between: What parts rows that stand before a prompt as examples; an answer to it ends there.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    too_long: Literal["refuse", "drop"]
    middle_share: float
    middle: tuple[int, int, int] | None
    seed: int
    between: str = "\n\n\n"
    kind: str = "complete"
    unit: str = "token"
    metrics: tuple[str, ...] = ("tests_passed", "edit_similarity", "exact_match")
    retains: Literal["language", "encoder", "none"] = "language"
    layout: Layout = PADDED

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[TokenRow]:
        """Tokenize; long plain text becomes several windows.

        Raises:
            DataError: For prompt/completion rows that are too long or have nothing to learn.
        """
        refusals = Refusals()
        rows = store.keep(self._rows(records, refusals, training=training), vocabulary=len(self.tokenizer))
        refusals.refuse(len(records))
        return rows

    def _rows(self, records: Sequence[Record], refusals: Refusals, *, training: bool) -> Iterator[TokenRow]:
        for record in records:
            if training and self.middle is not None and self._is_turned(record):
                yield from self._windows(self._fill_in(record))
            elif isinstance(record, Document):
                yield from self._windows(self._text(record))
            else:
                row = self._continuation(_completion(record))
                if len(row.ids) <= self.max_tokens:
                    yield row
                elif self.too_long == "refuse":
                    refusals.add(TOO_LONG, self._too_long(row), tokens=len(row.ids))

    def question(self, record: Record) -> str:
        """The prompt; plain text has none."""
        return record.prompt if isinstance(record, Completion) else ""

    def reference(self, record: Record) -> str:
        """What follows the prompt, or the text."""
        return record.completion if isinstance(record, Completion) else _document(record).text

    def with_answer(self, record: Record, answer: str) -> Record:
        """The row with another continuation."""
        return replace(record, completion=answer) if isinstance(record, Completion) else Document(record.where, answer)

    def with_examples(self, record: Record, examples: Sequence[Record]) -> Record:
        """The row with other rows, prompt and continuation, before its prompt."""
        own = _completion(record)
        shown = (f"{self.question(example)}{self.reference(example)}".rstrip() for example in examples)
        return replace(own, prompt=self.between.join((*shown, own.prompt)))

    def prompt(self, record: Record) -> Tensor:
        """Token ids up to where the continuation begins."""
        return torch.tensor(self._opening(self.question(record)))

    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """Greedy continuations of the prompts; plain text has nothing to answer and gives empty ones."""
        asked = [i for i, record in enumerate(records) if isinstance(record, Completion)]
        prompts = [self.prompt(records[i]) for i in asked]
        answers = [""] * len(records)
        stops = generation.stop_ids(model, self.tokenizer)
        tokens = generation.greedy(model, self.tokenizer, prompts, how, stops=stops)
        for index, found in zip(asked, tokens, strict=True):
            answers[index] = str(self.tokenizer.decode(found, skip_special_tokens=True))
        return answers

    def _ids(self, text: str) -> list[int]:
        return causal.token_ids(self.tokenizer, text)

    def _opening(self, text: str) -> list[int]:
        """A text at the beginning of a row."""
        return [*causal.begin_ids(self.tokenizer), *self._ids(text)]

    def _text(self, record: Document) -> TokenRow:
        ids = [*self._opening(record.text), *causal.end_ids(self.tokenizer)]
        return causal.token_row(record.where, ids, learnt_from=1)

    def _continuation(self, record: Completion) -> TokenRow:
        # Tokenized apart, because at inference the prompt is tokenized without its continuation.
        prompt = self._opening(record.prompt)
        return causal.token_row(
            record.where,
            [*prompt, *self._ids(record.completion), *causal.end_ids(self.tokenizer)],
            learnt_from=len(prompt),
        )

    def _windows(self, row: TokenRow) -> list[TokenRow]:
        windows = []
        for start in range(0, len(row.ids), self.max_tokens):
            ids_T, learnt_T = (
                row.ids[start : start + self.max_tokens],
                row.learnt[start : start + self.max_tokens].clone(),
            )
            learnt_T[:1] = False
            if bool(learnt_T.any()):
                windows.append(TokenRow(row.where, ids_T, learnt_T))
        return windows

    def _is_turned(self, record: Record) -> bool:
        return random.Random(derive(self.seed, "middle", record.where)).random() < self.middle_share  # noqa: S311

    def _fill_in(self, record: Record) -> TokenRow:
        """Prefix, suffix, middle, in this order; the middle is learnt. Source: Bavarian et al. 2022, "PSM"."""
        if self.middle is None:
            raise AssertionError
        text = record.text if isinstance(record, Document) else f"{self.question(record)}{self.reference(record)}"
        dice = random.Random(derive(self.seed, "cut", record.where))  # noqa: S311
        first, second = sorted(dice.randint(0, len(text)) for _ in range(2))
        before, suffix, middle = self.middle
        prompt = [
            *causal.begin_ids(self.tokenizer),
            before,
            *self._ids(text[:first]),
            suffix,
            *self._ids(text[second:]),
            middle,
        ]
        return causal.token_row(
            record.where,
            [*prompt, *self._ids(text[first:second]), *causal.end_ids(self.tokenizer)],
            learnt_from=len(prompt),
        )

    def _too_long(self, row: TokenRow) -> Fault:
        return Fault(
            row.where,
            f"{len(row.ids)} tokens, but task.max_tokens is {self.max_tokens}, so the completion would be cut",
            "raise task.max_tokens, shorten the row, or set task.too_long=drop",
        )


def middle_ids(tokenizer: PreTrainedTokenizerBase, named: tuple[str, str, str] | None) -> tuple[int, int, int]:
    """Token ids of the fill-in-the-middle markers.

    Raises:
        RecipeError: If the tokenizer does not know them as single tokens.
    """
    known = tokenizer.get_vocab()
    for markers in [named] if named else MIDDLE_TOKENS:
        if all(marker in known for marker in markers):
            first, second, third = (known[marker] for marker in markers)
            return first, second, third
    said = "these markers are not tokens" if named else "this tokenizer has no fill-in-the-middle tokens"
    raise RecipeError(
        f"{said} of the model",
        where="task.middle_tokens" if named else "task.middle_share",
        hint="name three tokens of its vocabulary with task.middle_tokens, or set task.middle_share=0",
    )


def _completion(record: Record) -> Completion:
    if isinstance(record, Completion):
        return record
    raise DataError("neither text nor prompt/completion", where=record.where, hint="use another task for these rows")


def _document(record: Record) -> Document:
    if isinstance(record, Document):
        return record
    raise DataError("neither text nor prompt/completion", where=record.where, hint="use another task for these rows")
