"""A tuned model of text that chats, predicts and measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metier import evaluation, models
from metier.core import DataError
from metier.data.records import Completion, Conversation, Labelled, Message, Record
from metier.run.specialist import Specialist
from metier.tasks import Answering

if TYPE_CHECKING:
    from metier.core.evidence import Measure
    from metier.tasks import TextTask

Question = str | Mapping[str, Any] | Sequence[Mapping[str, str]]
"""A prompt or text; a row; or the turns of a conversation."""


@dataclass(frozen=True)
class TextSpecialist(Specialist):
    """A tuned model of text."""

    task: TextTask[Any]

    @property
    def replies(self) -> bool:
        """Whether it can be talked to."""
        return True

    def chat(self, question: str | Sequence[Mapping[str, str]], *, max_new_tokens: int | None = None) -> str:
        """The reply to a message, or to a conversation given as turns of role and content."""
        return self.predict([question], max_new_tokens=max_new_tokens)[0]

    def predict(self, questions: Sequence[Question], *, max_new_tokens: int | None = None) -> list[str]:
        """The answer to each question: a reply, a continuation, or a class.

        Raises:
            DataError: If a question has not the form that the task needs.
        """
        how = Answering(max_new_tokens=max_new_tokens or self.recipe.evaluate.max_new_tokens)
        records = [self._record(question, number) for number, question in enumerate(questions, 1)]
        return self.task.answer(self.module, records, how)

    def evaluate(self, file: str | None = None) -> tuple[Measure, ...]:
        """The domain figures on the run's test rows, or on the rows of another file in the same format."""
        test, recipe = self._rows(file), self.recipe
        settings = recipe.evaluate.model_copy(update={"baselines": False})
        measured = evaluation.measure(
            self.task, self.module, models.tokenizer_of(self.model), test, settings, (), base=None
        )
        return evaluation.compare(None, measured, recipe.evaluate.confidence)

    def _record(self, question: Question, number: int) -> Record:
        where = f"question {number}"
        if isinstance(question, str):
            return self._from_text(question, where)
        if isinstance(question, Mapping):
            return self._from_row(question, where)
        turns = tuple(Message(turn["role"], turn["content"]) for turn in question)  # type: ignore[arg-type]
        if not turns or turns[-1].role != "user":
            raise DataError("the last turn is not the user's", where=where, hint="end with a user turn")
        return Conversation(where, (*turns, Message("assistant", "-")))

    def _from_text(self, text: str, where: str) -> Record:
        if not text.strip():
            raise DataError("nothing is asked", where=where, hint="give a text")
        if self.task.kind == "classify":
            return Labelled(where, text, getattr(self.task, "labels", ("",))[0])
        return Completion(where, text, "-")

    def _from_row(self, row: Mapping[str, Any], where: str) -> Record:
        if isinstance(row.get("messages"), list):
            turns = [turn for turn in row["messages"] if isinstance(turn, Mapping)]
            asked = turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns
            return self._record(asked, int(where.rsplit(maxsplit=1)[-1]))
        columns = self.recipe.data.columns
        for word in ("prompt", "text", "question", "instruction", "query", "input"):
            name = columns.get(word, word)
            if isinstance(row.get(name), str):
                more = row.get(columns.get("input", "input")) if word == "instruction" else None
                return self._from_text(f"{row[name]}\n{more}" if more else row[name], where)
        raise DataError(
            f"no prompt among the columns {', '.join(map(str, row))}", where=where, hint="name it prompt or text"
        )
