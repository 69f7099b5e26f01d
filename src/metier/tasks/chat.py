"""Instruction tuning: predict the reply, never the prompt, in the model's own chat template."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from metier import models
from metier.core import DataError, Fault, ModelError
from metier.data.records import Completion, Conversation, Message
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

Span = tuple[int, int]
TOKENIZED_AT_ONCE = 256
"""Texts that the tokenizer is given together: enough for its speed, few enough for its offsets to weigh nothing."""


@dataclass(frozen=True)
class Chat(TokenTask):
    """Next-token prediction on replies.

    Attributes:
        tokenizer: The model's, with a chat template.
        system: System prompt for conversations that have none.
        supervise: Every assistant turn or the last.
        max_tokens: Longest row.
        too_long: What to do with longer ones.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    supervise: Literal["replies", "last"]
    max_tokens: int
    too_long: Literal["refuse", "drop"]
    kind: str = "chat"
    unit: str = "token"
    metrics: tuple[str, ...] = ("exact_match", "valid_json", "valid_schema", "tests_passed")
    retains: Literal["language", "encoder", "none"] = "language"
    layout: Layout = PADDED

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[TokenRow]:  # noqa: ARG002
        """Render with the template, tokenize, mark replies and their end-of-turn tokens.

        Raises:
            DataError: For rows with nothing to learn, with an end of turn that is not learnt, or too long.
            ModelError: If the model has no chat template, or one that cannot mark replies.
        """
        refusals = Refusals()
        rows = store.keep(self._rows(records, refusals), vocabulary=len(self.tokenizer))
        refusals.refuse(len(records))
        return rows

    def _rows(self, records: Sequence[Record], refusals: Refusals) -> Iterator[TokenRow]:
        pieces = (piece for record in records for piece in self._render(_conversation(record)))
        while some := list(islice(pieces, TOKENIZED_AT_ONCE)):
            for row in self._tokenize(some):
                fault = self._fault(row)
                if fault is None:
                    yield row
                elif not (self.too_long == "drop" and len(row.ids) > self.max_tokens):
                    kind, said = fault
                    refusals.add(kind, said, tokens=len(row.ids) if kind == TOO_LONG else 0)

    def question(self, record: Record) -> str:
        """The turns before the last reply; the system prompt and the speaker's name only where they tell something."""
        turns = [turn for turn in _conversation(record).messages[:-1] if turn.role != "system"]
        return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)

    def reference(self, record: Record) -> str:
        """The last reply."""
        return _conversation(record).messages[-1].content

    def with_answer(self, record: Record, answer: str) -> Record:
        """The conversation with another last reply."""
        conversation = _conversation(record)
        return replace(conversation, messages=(*conversation.messages[:-1], Message("assistant", answer)))

    def with_examples(self, record: Record, examples: Sequence[Record]) -> Record:
        """The conversation after others that show how it is answered; its own system prompt stays first."""
        conversation = _conversation(record)
        system = [turn for turn in conversation.messages if turn.role == "system"]
        shown = [turn for example in examples for turn in _conversation(example).messages if turn.role != "system"]
        own = [turn for turn in conversation.messages if turn.role != "system"]
        return replace(conversation, messages=(*system, *shown, *own))

    def prompt(self, record: Record) -> Tensor:
        """Token ids up to the point where the last reply begins."""
        conversation = self._with_system(_conversation(record))
        text = self._template(conversation, conversation.messages[:-1], opening=True)
        return torch.tensor(causal.token_ids(self.tokenizer, text))

    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """Greedy replies."""
        return self._reply(model, records, how, allowed=None)

    def answer_among(
        self, model: nn.Module, records: Sequence[Record], how: Answering, answers: Sequence[str]
    ) -> list[str]:
        """Greedy replies when only the given answers are allowed."""
        end = self._end_of_turn(records[0])
        tokens = [[*causal.token_ids(self.tokenizer, answer), end] for answer in answers]
        return self._reply(model, records, how, allowed=generation.Trie.of(tokens))

    def reply(self, model: nn.Module, messages: Sequence[Message], how: Answering) -> str:
        """The reply to an open conversation, whose last turn is the user's."""
        open_turn = Conversation("chat", (*messages, Message("assistant", "-")))
        return self.answer(model, [open_turn], how)[0]

    def _reply(
        self, model: nn.Module, records: Sequence[Record], how: Answering, *, allowed: generation.Trie | None
    ) -> list[str]:
        if not records:
            return []
        stops = generation.stop_ids(model, self.tokenizer, self._end_of_turn(records[0]))
        prompts = [self.prompt(record) for record in records]
        tokens = generation.greedy(model, self.tokenizer, prompts, how, stops=stops, allowed=allowed)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in tokens]

    def _end_of_turn(self, record: Record) -> int:
        """The token that ends a reply in this template."""
        row = self._tokenize(self._render(_conversation(record))[-1:])[0]
        return int(row.ids[row.learnt][-1])

    def _fault(self, row: TokenRow) -> tuple[str, Fault] | None:
        """What is wrong with a row: of which kind, and in words."""
        if not bool(row.learnt.any()):
            hint = "give it an assistant turn with content; where no row is learnt, the template leaves replies out"
            return "hold nothing to learn", Fault(row.where, "nothing in this row is learnt", hint)
        if len(row.ids) > self.max_tokens:
            return TOO_LONG, Fault(
                row.where,
                f"{len(row.ids)} tokens, but task.max_tokens is {self.max_tokens}, so the answer would be cut",
                "raise task.max_tokens, shorten the row, or set task.too_long=drop",
            )
        if int(row.ids[row.learnt][-1]) not in self.tokenizer.all_special_ids:
            return "have no end of turn", Fault(
                row.where,
                "the template puts no end-of-turn token after the reply, so the model would never learn to stop",
                "give a template that ends a reply with the end token, by task.template",
            )
        return None

    def _with_system(self, conversation: Conversation) -> Conversation:
        if self.system is None or conversation.messages[0].role == "system":
            return conversation
        return replace(conversation, messages=(Message("system", self.system), *conversation.messages))

    def _template(self, conversation: Conversation, messages: Sequence[Message], *, opening: bool) -> str:
        turns: Any = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            return models.render_chat(self.tokenizer, turns, tools=_tools(conversation.tools), opening=opening)
        except DataError as error:
            raise DataError(error.faults[0].what, where=conversation.where, hint=error.faults[0].hint) from error

    def _render(self, record: Conversation) -> list[tuple[str, str, list[Span]]]:
        """(where, text, spans to learn): one text for the conversation, or one for each reply.

        A template may render earlier turns differently once others follow (dropping their reasoning, say). Then one
        text for each reply is the only rendering that matches what the model will see.
        """
        conversation = self._with_system(record)
        turns = conversation.messages
        replies = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if not replies:
            return [(record.where, self._template(conversation, turns, opening=False), [])]
        replies = replies[-1:] if self.supervise == "last" else replies
        texts = [self._template(conversation, turns[: i + 1], opening=False) for i in replies]
        spans = [
            (self._start(conversation, i, text), len(text.rstrip())) for i, text in zip(replies, texts, strict=True)
        ]
        if all(texts[-1].startswith(text) for text in texts):
            return [(record.where, texts[-1], spans)]
        return [(record.where, text, [span]) for text, span in zip(texts, spans, strict=True)]

    def _start(self, conversation: Conversation, reply: int, text: str) -> int:
        """Where the reply begins: right after what the model is given when it is asked to answer."""
        opening = self._template(conversation, conversation.messages[:reply], opening=True)
        common = os.path.commonprefix([opening, text])  # noqa: RUF071 - characters are meant
        rest = opening[len(common) :]
        # A generation prompt may open a reasoning block that the rendered reply closes or leaves out.
        if re.fullmatch(r"\s*(<think>)?\s*(</think>)?\s*", rest):
            return len(common)
        raise ModelError(
            "the chat template begins a reply otherwise than its generation prompt, so the two cannot be told apart",
            where=conversation.where,
            hint="give a consistent template by task.template",
        )

    def _tokenize(self, pieces: Sequence[tuple[str, str, list[Span]]]) -> list[TokenRow]:
        coded = self.tokenizer(
            [text for _, text, _ in pieces], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        rows = []
        for (where, _, spans), ids, offsets in zip(pieces, coded["input_ids"], coded["offset_mapping"], strict=True):
            begin_T = torch.tensor([begin for begin, _ in offsets])
            end_T = torch.tensor([end for _, end in offsets])
            learnt_T = torch.zeros(len(ids), dtype=torch.bool)
            for start, stop in spans:
                learnt_T |= (begin_T >= start) & (begin_T < stop) & (end_T > begin_T)
            learnt_T[:1] = False
            rows.append(TokenRow(where, torch.tensor(ids), learnt_T))
        return rows


def _conversation(record: Record) -> Conversation:
    match record:
        case Conversation():
            return record
        case Completion():
            turns = (Message("user", record.prompt), Message("assistant", record.completion))
            return Conversation(record.where, turns, extras=record.extras)
        case _:
            raise DataError(
                "not a conversation", where=record.where, hint="the chat task reads messages, alpaca or prompt rows"
            )


def _tools(text: str | None) -> Any:
    import json

    return json.loads(text) if text else None
