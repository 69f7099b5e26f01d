"""Jobs on text: rows of files for a model that transformers loads; no weight is loaded while they are checked."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import adapt, data, evaluation, models, planning, tasks
from metier.core import DataError, RecipeError
from metier.core.files import sha256
from metier.data.records import Labelled, Splits
from metier.models.lean import Layout
from metier.recipe import ChatTask, ClassifyTask, FreezeMethod, LoRAMethod, Recipe
from metier.run import guards
from metier.run.job import Job, encode_splits, measured_rows
from metier.run.replay import mixed
from metier.training import batches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.core.evidence import Answer, Baseline
    from metier.data.records import Record
    from metier.evaluation import Item, Measured
    from metier.models import Model, Shape
    from metier.planning import Plan
    from metier.recipe import TextTaskSection
    from metier.tasks import TextTask


@dataclass(frozen=True)
class TextJob(Job):
    """A job on text.

    Attributes:
        shape: Sizes of the network.
        pack: Items of the retention pack.
    """

    task: TextTask[Any]
    shape: Shape
    pack: tuple[Item, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the network."""
        return self.shape.parameters

    @property
    def network(self) -> str:
        """Its sizes."""
        return repr(self.shape)

    def load(self) -> Model:
        """The pretrained model with the head that the task needs."""
        recipe = self.recipe
        return models.load(recipe.model, head=self.head, labels=self.labels or None, seed=recipe.train.seed)

    def redrawn(self, model: Model) -> Mapping[str, Tensor]:
        """A new head, as `load` draws it."""
        module = self.load().module
        return {name: module.get_parameter(name).detach() for name in model.new}

    def identity(self, model: Model) -> Mapping[str, Any]:
        """Pack, chat template, and the content of the files that the recipe names."""
        task, schema = self.recipe.task, self.recipe.evaluate.json_schema
        template = task.template if isinstance(task, ChatTask) else None
        return {
            "pack": [dict(item.keys) for item in self.pack],
            "chat_template": models.tokenizer_of(model).chat_template,
            "files": {path: sha256(Path(path)) for path in (schema, template) if path},
        }

    def measure(self, model: Model, module: nn.Module, *, base: Measured | None) -> Measured:
        """Domain and retention on the same rows and items."""
        return evaluation.measure(
            self.task,
            module,
            models.tokenizer_of(model),
            self.test,
            self.recipe.evaluate,
            self.pack,
            base=base,
            new_head=base is None and bool(model.new),
            train=self.splits.train,
        )

    def rehearsing(self) -> TextJob:
        """The job with the general rows that its recipe mixes among those that are learnt."""
        languages = {item.language for item in self.pack} or {"en", "zh"}
        train, notes = mixed(self.task, self.recipe, self.splits, self.train, languages)
        return replace(self, train=train, notes=(*self.notes, *notes))

    @property
    def keeps(self) -> bool:
        """Whether networks of this kind retain something, and there are texts to tell it by."""
        return self.task.retains != "none" and bool(self._choosing())

    def keeping(self, model: Model, module: nn.Module, before: Measured) -> Callable[[], float]:  # noqa: ARG002
        """By the loss on general texts, or by the likeness of embeddings; on texts that report nothing."""
        return evaluation.keeping(self.task, module, models.tokenizer_of(model), self._choosing())

    def _choosing(self) -> list[Item]:
        """Texts that report nothing, in the languages of the pack."""
        languages = {item.language for item in self.pack}
        return [item for item in evaluation.general_items("choosing", languages) if item.kind == "text"]

    def primary(self, after: Measured) -> str:
        """The first of the task's metrics that could be measured, else the loss."""
        return evaluation.primary_metric(self.task, after)

    def prompted(self, model: Model) -> tuple[Baseline, ...]:
        """The base, shown some training rows before it is asked."""
        found = evaluation.shown_examples(
            self.task,
            model.module,
            self.splits.train,
            self.test,
            self.recipe.evaluate,
            context=self.shape.context,
            seed=self.recipe.data.seed,
        )
        return () if found is None else (found,)

    def declared(self) -> str:
        """The first of the task's metrics that the references themselves can be judged by, else the loss."""
        section = self.recipe.evaluate
        if not (section.generate and any(self.task.question(record) for record in self.test)):
            return "loss"
        references = [self.task.reference(record) for record in self.test]
        judged = evaluation.judged(self.task, self.test, references, section)
        return next((name for name in self.task.metrics if name in judged), "loss")

    def answers(self, before: Measured, after: Measured, primary: str) -> tuple[Answer, ...]:
        """Every answered row with both answers."""
        return evaluation.side_by_side(self.task, self.test, before, after, primary)

    def plan(self, *, flops_per_second: float | None) -> Plan:
        """Parameters, memory and time of every method."""
        return planning.plan(
            self.shape,
            self.recipe,
            row_tokens=self.sizes(),
            head=self.head,
            supervised_share=_learnt_share(self.train),
            reading=_steps(self._as_read(), self.recipe, self.train),
            flops_per_second=flops_per_second,
        )

    def _as_read(self) -> TextTask[Any]:
        """The task with the layout that its network will most likely read; only trying it tells for sure."""
        method = self.recipe.method
        packs = self.shape.packs and hasattr(self.task, "layout")
        drops = isinstance(method, LoRAMethod) and method.dropout > 0
        shares = self.shape.shares and not drops and not isinstance(method, FreezeMethod)
        layout = Layout(packed=True, shares=shares)
        return replace(self.task, layout=layout) if packs else self.task  # type: ignore[type-var, return-value]


def prepare(recipe: Recipe, section: TextTaskSection) -> TextJob:
    """Read and check everything but the weights.

    Raises:
        MetierError: With every fault that was found, in the order recipe, model, rows.
    """
    evaluation.check_schema(recipe.evaluate)
    pack = evaluation.read_pack(recipe.evaluate.retention)
    shape = models.describe(recipe.model)
    head = tasks.head_for(section, models.describe_head(recipe.model))
    guards.check(recipe, head)
    adapt.check(models.skeleton(recipe.model, head=head), recipe.method)
    splits = data.read(recipe.data, accepts=data.formats_for(recipe.task.kind))
    labels = class_labels(recipe, splits)
    tokenizer = models.load_tokenizer(recipe.model)
    task = tasks.build(
        section,
        tokenizer,
        head=head,
        labels=labels,
        context=shape.context,
        seed=recipe.train.seed,
    )
    test = measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)
    unjudged = evaluation.unjudged(task, test, recipe.evaluate)
    train, validation = _encode(task, splits)
    notes = [*splits.notes, *_dropped(splits, train, recipe), *_unknown(train, tokenizer), *unjudged]
    if head == "seq2seq" and recipe.evaluate.retention != "off":
        notes.append("retention is not measured for encoder-decoder models")
    job = TextJob(
        recipe=recipe,
        shape=shape,
        head=head,
        labels=labels,
        task=task,
        splits=splits,
        train=train,
        validation=validation,
        test=test,
        pack=pack,
        notes=tuple(notes),
    )
    return job.rehearsing()


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


def _encode(task: TextTask[Any], splits: Splits) -> tuple[Sequence[Any], Sequence[Any]]:
    """Encode all splits; each must keep something to learn."""
    found = encode_splits(task, splits)
    for name, examples in found.items():
        if not examples:
            raise _nothing_left(task, name, getattr(splits, name))
    return found["train"], found["validation"]


def _nothing_left(task: Any, name: str, records: Sequence[Record]) -> DataError:
    """Why no row of a split is left, and how many tokens would keep one, and all."""
    whole = replace(task, max_tokens=sys.maxsize).encode(records, training=False)
    sizes = [task.size(example) for example in whole]
    return DataError(
        f"0 of {len(records):,} {name} rows keep a learnt token within {task.max_tokens} tokens; the shortest needs "
        f"{min(sizes):,}, the longest {max(sizes):,}",
        where="task.max_tokens",
        hint="raise it, or shorten the rows",
    )


def _dropped(splits: Splits, train: Sequence[Any], recipe: Recipe) -> list[str]:
    lost = len(splits.train) - tasks.rows_behind(train)
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


MOST_LOOKED_AT = 20_000
"""Rows from which the share of learnt tokens is told."""


def _learnt_share(train: Sequence[Any]) -> float:
    """Share of the tokens that are learnt; of very many rows every so-manyth is looked at."""
    learnt = total = 0
    for i in range(0, len(train), ceil(len(train) / MOST_LOOKED_AT)):
        flags = getattr(train[i], "learnt", None)
        if flags is None:
            return 1.0
        learnt, total = learnt + int(flags.sum()), total + len(flags)
    return learnt / total if learnt else 1.0


MOST_STEPS = 200
"""Steps whose batches are cut to see what a budget makes of them."""


def _steps(task: TextTask[Any], recipe: Recipe, train: Sequence[Any]) -> planning.Steps:
    """The first steps of the run, to be cut by any budget."""
    section, sizes = recipe.train, tasks.sizes(task, train)
    last = min(MOST_STEPS, section.steps_per_epoch(len(train)))
    looked_at = [[train[i] for i in step.rows] for step in batches.steps(len(train), section, last=last)]

    @cache
    def read(budget: int) -> planning.Reading:
        cuts = [task.read([rows[i] for i in cut]) for rows in looked_at for cut in task.cut(rows, budget)]
        plain = sum(task.size(row) for rows in looked_at for row in rows)
        # A longer row than any of these steps has would stand alone.
        return planning.Reading(max(*sizes, *cuts), sum(cuts) / plain)

    return planning.Steps(max(map(task.read, looked_at)), read)
