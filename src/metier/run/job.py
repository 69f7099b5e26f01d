"""From a recipe to all that can be known before weights are loaded: the cheap half, where mistakes are caught."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import data, evaluation, models, planning, tasks
from metier.core import DataError, Fault, RecipeError, log
from metier.core.rng import derive
from metier.data.records import Labelled, Record, Splits
from metier.recipe import ClassifyTask, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from metier.evaluation import Item
    from metier.models import Head, Shape
    from metier.tasks import Shown, Task


@dataclass(frozen=True)
class Job:
    """A checked recipe and its encoded rows; no weight has been loaded.

    Attributes:
        recipe: As resolved.
        shape: Sizes of the network.
        head: The head that the task needs.
        labels: The classes, for classification.
        task: What is learnt.
        splits: The rows.
        train: Encoded training rows.
        validation: Encoded validation rows.
        test: The test rows that will be measured.
        pack: Items of the retention pack.
        notes: What the user should know.
    """

    recipe: Recipe
    shape: Shape
    head: Head
    labels: tuple[str, ...]
    task: Task[Any]
    splits: Splits
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Record, ...]
    pack: tuple[Item, ...]
    notes: tuple[str, ...]

    def shown(self, count: int = 3) -> list[Shown]:
        """Training examples as the model meets them."""
        return [self.task.show(example) for example in self.train[:count]]


def prepare(recipe: Recipe) -> Job:
    """Read and check everything but the weights.

    Raises:
        MetierError: With every fault that was found, in the order recipe, model, rows.
    """
    evaluation.check_schema(recipe.evaluate)
    pack = evaluation.read_pack(recipe.evaluate.retention)
    shape = models.describe(recipe.model)
    head = tasks.head_for(recipe.task, models.describe_head(recipe.model))
    splits = data.read(recipe.data, accepts=data.formats_for(recipe.task.kind))
    labels = class_labels(recipe, splits)
    tokenizer = models.load_tokenizer(recipe.model)
    task = tasks.build(
        recipe.task,
        tokenizer,
        head=head,
        labels=labels,
        context=shape.context,
        seed=recipe.train.seed,
    )
    train, validation = _encode(task, splits)
    notes = [*splits.notes, *_dropped(splits, train, recipe), *_unknown(train, tokenizer)]
    if head == "seq2seq" and recipe.evaluate.retention != "off":
        notes.append("retention is not measured for encoder-decoder models")
    return Job(
        recipe=recipe,
        shape=shape,
        head=head,
        labels=labels,
        task=task,
        splits=splits,
        train=tuple(train),
        validation=tuple(validation),
        test=measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed),
        pack=pack,
        notes=tuple(notes),
    )


def class_labels(recipe: Recipe, splits: Splits) -> tuple[str, ...]:
    """The classes in order: the recipe's, else the sorted ones of the training rows; numbers sort as numbers.

    Raises:
        RecipeError: If the rows have labels that the recipe does not name.
    """
    if not isinstance(recipe.task, ClassifyTask):
        return ()
    found = {row.label for row in splits.train if isinstance(row, Labelled)}
    if recipe.task.labels is None:
        return tuple(
            sorted(found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))
        )
    unknown = sorted(found - set(recipe.task.labels))
    if unknown:
        raise RecipeError(
            f"the training rows have labels that are not named: {', '.join(unknown[:10])}",
            where="task.labels",
            hint="add them, or leave task.labels out",
        )
    return recipe.task.labels


def measured_rows(test: Sequence[Record], most: int | None, seed: int) -> tuple[Record, ...]:
    """The test rows that are measured: all, or `most` drawn with the seed, in file order."""
    if most is None or len(test) <= most:
        return tuple(test)
    chosen = random.Random(derive(seed, "measured")).sample(range(len(test)), most)  # noqa: S311
    return tuple(test[i] for i in sorted(chosen))


def _encode(task: Task[Any], splits: Splits) -> tuple[list[Any], list[Any]]:
    """Encode all splits, so that a row that cannot be learnt or measured is found now, all faults together."""
    faults: list[Fault] = []
    found: dict[str, list[Any]] = {}
    for name, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        try:
            found[name] = task.encode(rows, training=name == "train")
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError.of(faults)
    for name, examples in found.items():
        if not examples:
            raise DataError(
                f"no {name} row keeps anything to learn within task.max_tokens",
                where="task.max_tokens",
                hint="raise it, or shorten the rows",
            )
    return found["train"], found["validation"]


def _dropped(splits: Splits, train: Sequence[Any], recipe: Recipe) -> list[str]:
    kept = len({example.where for example in train})
    lost = len(splits.train) - kept
    if lost <= 0 or recipe.task.kind == "classify":
        return []
    return [f"{lost} of {len(splits.train)} training rows are longer than task.max_tokens and were dropped"]


MOST_UNKNOWN = 0.1
"""Share of unknown tokens from which the user is told that model and language do not fit."""


def _unknown(train: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where the tokenizer does not know the characters of the rows: what it does not see it cannot learn."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    ids = [example.ids for example in train[:1000]]
    share = sum(int((row == unknown).sum()) for row in ids) / sum(len(row) for row in ids)
    if share < MOST_UNKNOWN:
        return []
    return [f"{share:.0%} of the tokens are unknown to this model: choose a base that was trained on this language"]


def choose_device(recipe: Recipe) -> torch.device:
    """The device that the recipe means; also sets the number of CPU threads."""
    import torch

    if recipe.model.threads is not None:
        torch.set_num_threads(recipe.model.threads)
    if recipe.model.device != "auto":
        return torch.device(recipe.model.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(job: Job) -> tuple[float, str]:
    """The peak rate and why."""
    recipe = job.recipe
    if recipe.train.learning_rate != "auto":
        return recipe.train.learning_rate, "set in the recipe"
    steps = recipe.train.total_steps(len(job.train))
    return planning.learning_rate(
        recipe.method, head=job.head, parameters=job.shape.parameters, steps=steps, task_kind=recipe.task.kind
    )


def say(job: Job) -> None:
    """Tell the user what was seen."""
    splits = job.splits
    log.note(
        f"{Path(job.recipe.data.train).name}: {splits.reason}; {len(splits.train)} training, "
        f"{len(splits.validation)} validation, {len(splits.test)} test rows",
        format=splits.format,
    )
    for text in job.notes:
        log.warn(text)
