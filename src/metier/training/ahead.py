"""The next step's batches, made while a device still works on this one's."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from metier.core import Batch
    from metier.tasks import Task
    from metier.training.batches import Step

MADE = 2
"""Batches of a step that are made ahead: whether the first is the last shows once the second is there."""


class Turn:
    """A step whose rows are cut to fit in memory.

    Attributes:
        step: Which rows meet in it.
        rows: The examples.
        most_tokens: What one batch may hold.
        cuts: The rows of each batch, counted from 0.
        batches: Each batch, once.
    """

    def __init__(self, step: Step, rows: Sequence[Any], task: Task[Any], most_tokens: int) -> None:
        """Cut the rows, and make the first batches."""
        self.step, self.rows, self.most_tokens = step, rows, most_tokens
        self.cuts = task.cut(rows, most_tokens)
        made = (task.collate([rows[i] for i in cut]) for cut in self.cuts)
        self.batches: Iterator[Batch] = chain(list(islice(made, MADE)), made)


class Ahead:
    """Steps in their order, of which one may be ready before it is taken."""

    def __init__(self, steps: Iterable[Step], examples: Sequence[Any], task: Task[Any]) -> None:
        """Nothing is ready yet."""
        self._steps, self._examples, self._task = iter(steps), examples, task
        self._ready: Turn | None = None

    def prepare(self, most_tokens: int) -> None:
        """Have the next step ready, if there is one."""
        if self._ready is None and (step := next(self._steps, None)) is not None:
            self._ready = Turn(step, [self._examples[i] for i in step.rows], self._task, most_tokens)

    def take(self, most_tokens: int) -> Turn | None:
        """The next step, cut anew if it was for other memory; None after the last."""
        self.prepare(most_tokens)
        turn, self._ready = self._ready, None
        if turn is not None and turn.most_tokens != most_tokens:
            turn = self.again(turn, most_tokens)
        return turn

    def again(self, turn: Turn, most_tokens: int) -> Turn:
        """The same step, for other memory."""
        return Turn(turn.step, turn.rows, self._task, most_tokens)
