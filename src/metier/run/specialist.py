"""A finished run as an object that chats, predicts and measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import adapt, data, evaluation, models, tasks
from metier.core import DataError, ModelError, RecipeError
from metier.core.evidence import Measure
from metier.core.log import note
from metier.data.records import Completion, Conversation, Labelled, Message, Record
from metier.recipe import ModelSection, Recipe
from metier.run.folder import RunFolder
from metier.run.job import choose_device, measured_rows
from metier.tasks import Answering

if TYPE_CHECKING:
    from torch import nn

    from metier.models import Model
    from metier.tasks import Task

Question = str | Mapping[str, Any] | Sequence[Mapping[str, str]]
"""A prompt or text; a row; or the turns of a conversation."""


@dataclass(frozen=True)
class Specialist:
    """A tuned model, ready to use; `load` makes one from a run folder.

    Attributes:
        recipe: The recipe of the run.
        folder: Where it stands.
        model: Base network and tokenizer; for a fully tuned run, the tuned network.
        module: The tuned network; for LoRA, the base wrapped by the adapter.
        task: What it was taught.
    """

    recipe: Recipe
    folder: Path
    model: Model
    module: nn.Module
    task: Task[Any]

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
        recipe = self.recipe
        section = recipe.data.model_copy(update={"test": file, "overlap": "allow"}) if file else recipe.data
        splits = data.read(section, accepts=data.formats_for(recipe.task.kind))
        test = splits.test if file else measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)
        settings = recipe.evaluate.model_copy(update={"baselines": False})
        measured = evaluation.measure(self.task, self.module, self.model.tokenizer, test, settings, (), base=None)
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


def load(folder: str | Path, *, device: str = "auto") -> Specialist:
    """Load a finished run.

    Raises:
        RecipeError: If the folder is no finished run.
        ModelError: If the base is not the one that the adapter was trained on.
    """
    run = RunFolder(Path(folder))
    recipe, facts = run.recipe(), run.read_facts()
    labels = tuple(facts["labels"])
    section = recipe.model if run.adapter.exists() else ModelSection(base=str(run.path))
    model = models.load(section, head=facts["head"], labels=labels or None, seed=recipe.train.seed)
    module = model.module
    if run.adapter.exists():
        if model.lineage.fingerprint != facts["base_fingerprint"]:
            raise ModelError(
                f"{recipe.model.base} is not the base that this adapter was trained on: its weights differ",
                where=str(run.adapter),
                hint="get the same revision of the base, or tune again",
            )
        module = adapt.load_adapter(module, run.adapter)
    target = choose_device(recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})}))
    module = module.to(target).eval()
    shape = models.describe(section)
    task = tasks.build(
        recipe.task, model.tokenizer, head=facts["head"], labels=labels, context=shape.context, seed=recipe.train.seed
    )
    note(f"loaded {run.path}: {recipe.task.kind} on {recipe.model.base}")
    return Specialist(recipe, run.path, model, module, task)


def load_base(recipe: Recipe) -> Specialist:
    """The untuned base behind the same doors, for comparison side by side.

    Raises:
        RecipeError: If the task needs an output layer that only tuning makes.
    """
    shape = models.describe(recipe.model)
    head = tasks.head_for(recipe.task, models.describe_head(recipe.model))
    if head == "classifier":
        raise RecipeError("the base has no output layer for this task", where="model.base", hint="load the run itself")
    model = models.load(recipe.model, head=head, seed=recipe.train.seed)
    labels = getattr(recipe.task, "labels", None) or ()
    task = tasks.build(
        recipe.task, model.tokenizer, head=head, labels=labels, context=shape.context, seed=recipe.train.seed
    )
    return Specialist(recipe, Path(), model, model.module.to(choose_device(recipe)).eval(), task)
