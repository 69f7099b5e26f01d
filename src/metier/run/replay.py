"""General rows mixed among the rows that are learnt, so that what the model could do is practised on the way.

Source: Scialom et al. 2022, arXiv:2205.12393 (rehearsal of a small share of earlier data while tuning on new tasks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from metier import data, evaluation
from metier.core import DataError, RecipeError
from metier.core.lazily import Made
from metier.core.rng import derive
from metier.data.content import asked
from metier.data.similar import pairs_between
from metier.tasks import causal

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Splits
    from metier.evaluation import Item
    from metier.recipe import Recipe, ReplaySection
    from metier.tasks import Task


@dataclass(frozen=True)
class Mixed(Made[Any]):
    """The rows that are learnt, and after them the drawn general ones; steps take them in an order of their own.

    Attributes:
        rows: Encoded rows that are learnt.
        general: Encoded general rows.
        drawn: Places in `general`, one for each general row of a pass.
        requests: What `general` asks, where the base is still to answer it; the shipped answers then stand in for their
            length.
    """

    rows: Sequence[Any]
    general: Sequence[Any]
    drawn: NDArray[np.int64]
    requests: Sequence[Item] = ()

    def __len__(self) -> int:
        """Rows of a pass."""
        return len(self.rows) + len(self.drawn)

    def make(self, place: int) -> Any:
        """The row at a place."""
        own = len(self.rows)
        return self.rows[place] if place < own else self.general[int(self.drawn[place - own])]


def mixed(
    task: Task[Any], recipe: Recipe, splits: Splits, rows: Sequence[Any], languages: Collection[str]
) -> tuple[Sequence[Any], list[str]]:
    """The rows with the general ones that the recipe asks for, and what the user should know of them.

    Args:
        task: Encodes the general rows as well.
        recipe: Names them.
        splits: Whose test rows no general row may be like.
        rows: Encoded rows that are learnt.
        languages: Of the shipped items.

    Raises:
        RecipeError: If the shipped items do not fit the task.
        DataError: If none of a file's rows is left.
    """
    section = recipe.data.replay
    if section is None:
        return rows, []
    requests: Sequence[Item] = ()
    dropped = 0
    match section.rows:
        case "neutral":
            general = _shipped(task, languages)
        case "base":
            requests, general = _requests(task, languages)
        case _:
            general, dropped = _of_file(task, recipe, splits)
    drawn = draw(len(rows), len(general), section.share, recipe.data.seed)
    told = f"{len(drawn)} of the {len(rows) + len(drawn)} rows of a pass are general ones, drawn from {len(general)}"
    notes = [f"replay: {told} ({section.rows})"]
    if dropped:
        notes.append(f"replay: {dropped} general rows are like a test or validation row and were left out")
    return Mixed(rows, general, drawn, requests), notes


def answered(rows: Sequence[Any], base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Sequence[Any]:
    """The rows, once the base has answered the requests among them that are still open.

    Source: Chen et al. 2025, arXiv:2510.18874 (data of the model itself makes it forget less).
    """
    if not isinstance(rows, Mixed) or not rows.requests:
        return rows
    return replace(rows, general=evaluation.answered(rows.requests, base, tokenizer), requests=())


def draw(rows: int, general: int, share: float, seed: int) -> NDArray[np.int64]:
    """Places of the general rows of a pass, at least one: all of them in turn, in a new order each time."""
    count = max(1, round(rows * share / (1 - share)))
    chance = np.random.default_rng(derive(seed, "replay"))
    return np.concatenate([chance.permutation(general) for _ in range(-(-count // general))])[:count]


def _shipped(task: Task[Any], languages: Collection[str]) -> Sequence[Any]:
    if not isinstance(task, causal.TokenTask):
        raise RecipeError(
            "the shipped texts have no target that this task could learn",
            where="data.replay.rows: neutral",
            hint="name a file of general rows in the form of your own",
        )
    return evaluation.token_rows(evaluation.general_items("replay", languages), task.tokenizer)


def _requests(task: Task[Any], languages: Collection[str]) -> tuple[Sequence[Item], Sequence[Any]]:
    """Shipped requests that the base is to answer, and the shipped answers as rows."""
    if not isinstance(task, causal.TokenTask) or not task.tokenizer.chat_template:
        raise RecipeError(
            "only a causal model with a chat template answers requests",
            where="data.replay.rows: base",
            hint="take neutral, or name a file of general rows in the form of your own",
        )
    items = [item for item in evaluation.general_items("replay", languages) if item.kind == "reply"]
    return items, evaluation.token_rows(items, task.tokenizer)


def _of_file(task: Task[Any], recipe: Recipe, splits: Splits) -> tuple[Sequence[Any], int]:
    section: ReplaySection | None = recipe.data.replay
    if section is None:
        raise AssertionError("no rows are replayed")
    aside = recipe.data.model_copy(update={"test": section.rows, "overlap": "allow", "replay": None})
    records = data.read(aside, accepts=data.formats_for(recipe.task.kind)).test
    judged = [*map(asked, splits.test), *map(asked, splits.validation)]
    seen = {pair.right for pair in pairs_between(judged, map(asked, records))}
    left = [record for place, record in enumerate(records) if place not in seen]
    general = task.encode(left, training=True) if left else []
    if not general:
        raise DataError(
            "no row is left to replay: each is like a test or validation row, or keeps nothing to learn",
            where=section.rows,
            hint="name a file of other rows with data.replay.rows=FILE",
        )
    return general, len(seen)
