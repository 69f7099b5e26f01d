"""Prompt in, reply out, for encoder-decoder models such as T5: every reply token is learnt.

Shapes: B rows, T prompt tokens, R reply tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from metier.adapt import wrapped_base
from metier.core import Batch, DataError, Fault, Loss
from metier.data.records import Completion, Conversation
from metier.tasks import generation, store
from metier.tasks.cutting import Unpacked
from metier.tasks.protocol import Shown
from metier.tasks.refusal import TOO_LONG, Refusals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.tasks.protocol import Answering

IGNORE = -100


@dataclass(frozen=True, slots=True)
class PairRow:
    """A tokenized prompt (T,) and its reply with the end token (R,), int64."""

    where: str
    ids: Tensor
    reply: Tensor


@dataclass(frozen=True)
class SequenceToSequence(Unpacked):
    """Cross-entropy of the decoder on replies.

    Attributes:
        tokenizer: The model's.
        system: Text put before every prompt, as T5's task prefixes are.
        max_tokens: Longest prompt, and longest reply.
        too_long: What to do with longer ones.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str | None
    max_tokens: int
    too_long: Literal["refuse", "drop"]
    kind: str = "chat"
    unit: str = "token"
    metrics: tuple[str, ...] = ("exact_match", "valid_json", "valid_schema", "tests_passed", "edit_similarity")
    retains: Literal["language", "encoder", "none"] = "none"

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[PairRow]:  # noqa: ARG002
        """Tokenize both sides.

        Raises:
            DataError: For rows whose prompt or reply is too long.
        """
        refusals = Refusals()
        rows = store.keep(self._rows(records, refusals), vocabulary=len(self.tokenizer))
        refusals.refuse(len(records))
        return rows

    def _rows(self, records: Sequence[Record], refusals: Refusals) -> Iterator[PairRow]:
        for record in records:
            reply: list[int] = self.tokenizer(text_target=self.reference(record))["input_ids"]
            row = PairRow(record.where, self._prompt(record), torch.tensor(reply))
            longest = max(len(row.ids), len(row.reply))
            if longest <= self.max_tokens:
                yield row
            elif self.too_long == "refuse":
                what = f"{longest} tokens, but task.max_tokens is {self.max_tokens}"
                fault = Fault(row.where, what, "raise task.max_tokens or set task.too_long=drop")
                refusals.add(TOO_LONG, fault, tokens=longest)

    def size(self, example: PairRow) -> int:
        """Tokens of both sides."""
        return len(example.ids) + len(example.reply)

    def collate(self, examples: Sequence[PairRow]) -> Batch:
        """Pad both sides on the right."""
        ids = [example.ids for example in examples]
        return {
            "ids": pad_sequence(ids, batch_first=True, padding_value=int(self.tokenizer.pad_token_id or 0)),
            "mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
            "reply": pad_sequence([e.reply for e in examples], batch_first=True, padding_value=IGNORE),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Nats of each row's reply tokens; the decoder reads the reply shifted right by its start token."""
        reply_BR = batch["reply"]
        start = int(wrapped_base(model).config.decoder_start_token_id)  # type: ignore[union-attr, arg-type]
        first_B1 = reply_BR.new_full((len(reply_BR), 1), start)
        given_BR = torch.cat([first_B1, reply_BR[:, :-1].clamp(min=0)], dim=1)
        logits_BRV = model(
            input_ids=batch["ids"], attention_mask=batch["mask"], decoder_input_ids=given_BR, use_cache=False
        ).logits
        nats_BR = F.cross_entropy(logits_BRV.float().transpose(1, 2), reply_BR, ignore_index=IGNORE, reduction="none")
        return Loss(nats_BR.sum(dim=1), (reply_BR != IGNORE).sum(dim=1).to(nats_BR.dtype))

    def show(self, example: PairRow) -> Shown:
        """The prompt, and the reply as what is learnt."""
        prompt, reply = (str(self.tokenizer.decode(ids)) for ids in (example.ids, example.reply))
        return Shown(example.where, ((f"{prompt} -> ", False), (reply, True)))

    def question(self, record: Record) -> str:
        """The prompt."""
        match record:
            case Completion():
                return record.prompt
            case Conversation():
                return "\n".join(turn.content for turn in record.messages[:-1])
            case _:
                raise DataError("no prompt", where=record.where, hint="use prompt/completion rows")

    def reference(self, record: Record) -> str:
        """The reply."""
        match record:
            case Completion():
                return record.completion
            case Conversation():
                return record.messages[-1].content
            case _:
                raise DataError("no reply", where=record.where, hint="use prompt/completion rows")

    def with_answer(self, record: Record, answer: str) -> Record:
        """The row with another reply."""
        return replace(Completion(record.where, self.question(record), answer), extras=record.extras)

    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """Greedy replies."""
        prompts = [self._prompt(record) for record in records]
        stops = generation.stop_ids(model, self.tokenizer)
        tokens = generation.greedy(model, self.tokenizer, prompts, how, stops=stops)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in tokens]

    def _prompt(self, record: Record) -> Tensor:
        text = self.question(record) if self.system is None else f"{self.system}{self.question(record)}"
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return torch.tensor(ids)
