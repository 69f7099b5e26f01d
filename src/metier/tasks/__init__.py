"""What is learnt: a task says what one example is, what the loss is, and what "better" means.

The training loop, the evaluator and the report know tasks only through the protocol, so a chat model and a
classifier share every other line of the system.

Adding a task: write `tasks/<name>.py` with a class of this shape, give it a section in `recipe/task.py`, and add its
row to `build` below, or to `run/preparation.py` where its answers are numbers. The contract tests then hold it to the
promises of the protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from metier.core import RecipeError
from metier.recipe import ChatTask, ClassifyTask, CompleteTask
from metier.tasks.asking import Surprise, surprise, taught
from metier.tasks.chat import Chat
from metier.tasks.classify import ClassifyByHead, ClassifyByWords
from metier.tasks.complete import Complete, middle_ids
from metier.tasks.joining import Joined, joined, why_apart
from metier.tasks.own import build as build_own
from metier.tasks.protocol import Answering, Shown, Task, TextTask
from metier.tasks.reading import reading
from metier.tasks.rehearsal import rehearse
from metier.tasks.scoring import mean_loss, score, to_device
from metier.tasks.seq2seq import SequenceToSequence
from metier.tasks.store import rows_behind, sizes
from metier.tasks.values import ValueTask, predict, targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from metier.models.model import Head
    from metier.recipe import TextTaskSection

__all__ = [
    "Answering",
    "Joined",
    "Shown",
    "Surprise",
    "Task",
    "TextTask",
    "ValueTask",
    "build",
    "build_own",
    "head_for",
    "joined",
    "mean_loss",
    "predict",
    "reading",
    "rehearse",
    "rows_behind",
    "score",
    "sizes",
    "surprise",
    "targets",
    "taught",
    "to_device",
    "why_apart",
]


def head_for(section: TextTaskSection, native: Head) -> Head:
    """The head that the task needs on a network whose own head is `native`.

    Raises:
        RecipeError: If the network cannot do the task.
    """
    if isinstance(section, ClassifyTask):
        wants_head = section.way == "head" or (section.way == "auto" and native != "causal")
        if section.way == "words" and native != "causal":
            raise RecipeError(
                "label words need a causal language model", where="task.way", hint="set task.way=head for this model"
            )
        return "classifier" if wants_head else "causal"
    if native == "classifier":
        raise RecipeError(
            "the model is an encoder, which cannot write text",
            where="task",
            hint="use task=classify, or a causal model",
        )
    if isinstance(section, CompleteTask) and native != "causal":
        raise RecipeError(
            "continuing text needs a causal language model",
            where="task",
            hint="use task=chat for prompt and reply rows",
        )
    return native


def build(
    section: TextTaskSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head,
    labels: Sequence[str],
    context: int,
    seed: int,
) -> TextTask[Any]:
    """The task on text that the recipe names, for this kind of model.

    Args:
        section: The recipe's task.
        tokenizer: The model's.
        head: What the network puts out.
        labels: Classes of the training rows, used where the recipe names none.
        context: Longest input that the network allows, in tokens.
        seed: For the chances that the task takes.

    Raises:
        RecipeError: If task and model do not fit.
    """
    match section:
        case ChatTask() if head == "seq2seq":
            most = min(section.max_tokens or 1024, context)
            return SequenceToSequence(tokenizer, section.system, most, section.too_long)
        case ChatTask():
            most = _most(section.max_tokens, 4096, context)
            return Chat(
                _with_template(tokenizer, section.template), section.system, section.supervise, most, section.too_long
            )
        case CompleteTask():
            middle = middle_ids(tokenizer, section.middle_tokens) if section.middle_share else None
            most = _most(section.max_tokens, 1024, context)
            return Complete(tokenizer, most, section.too_long, section.middle_share, middle, seed)
        case ClassifyTask() if head == "classifier":
            return ClassifyByHead(tokenizer, section.labels or tuple(labels), _most(section.max_tokens, 512, context))
        case ClassifyTask():
            if "{text}" not in section.template:
                raise RecipeError(
                    "the template has no {text}", where="task.template", hint="for example '{text}\\nLabel:'"
                )
            most = _most(section.max_tokens, 512, context)
            return ClassifyByWords(tokenizer, section.labels or tuple(labels), section.template, most)
        case _:
            assert_never(section)


def _most(asked: int | None, default: int, context: int) -> int:
    if asked is not None and asked > context:
        raise RecipeError(
            f"{asked} tokens are more than the model's context of {context}",
            where="task.max_tokens",
            hint=f"choose at most {context}",
        )
    return asked or min(default, context)


def _with_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> PreTrainedTokenizerBase:
    if file is not None:
        tokenizer.chat_template = _template(file)
    if not tokenizer.chat_template:
        raise RecipeError(
            "the model brings no chat template",
            where="task",
            hint="give one with task.template=FILE, or use task=complete with prompt/completion rows",
        )
    return tokenizer


def _template(file: str) -> str:
    """The text of a chat template.

    Raises:
        RecipeError: If there is none, or it is not UTF-8.
    """
    where, path = f"task.template: {file}", Path(file)
    if not path.is_file():
        raise RecipeError("no such file", where=where, hint="name a Jinja file")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=where, hint="save it as UTF-8") from None
