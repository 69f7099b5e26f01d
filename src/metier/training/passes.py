"""Training steps of several arms whose forward and backward passes are one."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError, StepRecord, heap
from metier.core.log import progress as bar
from metier.tasks import joined, to_device
from metier.tasks.cutting import best_fit
from metier.training.course import Course, Outcome
from metier.training.loop import checked, less, move
from metier.training.signals import signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from metier.adapt import Lanes
    from metier.core import InterruptedRunError, Loss
    from metier.recipe import TrainSection
    from metier.tasks import Task
    from metier.training.batches import Step
    from metier.training.precision import Precision


class Runner:
    """An arm on its way through the passes."""

    def __init__(
        self,
        number: int,
        course: Course,
        task: Task[Any],
        examples: Sequence[Any],
        section: TrainSection,
        *,
        score: Callable[[Sequence[Any]], float],
    ) -> None:
        """Go back to where an earlier call was interrupted, or take the first validation loss.

        Args:
            number: By which its adapter is found.
            course: Before its first step.
            task: Suited to the arm's network.
            examples: Encoded training rows.
            section: The recipe's settings.
            score: Takes the mean loss of some examples with the weights as they are.
        """
        self.number, self.course, self.task = number, course, task
        self._examples, self._section = examples, section
        course.begin()
        self.error: DivergedError | None = None
        self._steps = course.steps()
        self._watch = course.watch(score)

    def turn(self) -> _Turn | None:
        """The next step; None where the arm has ended."""
        step = None if self.error or self.course.has_stalled else next(self._steps, None)
        return None if step is None else _Turn(self, step, [self._examples[i] for i in step.rows])

    def after(self, found: StepRecord | DivergedError) -> None:
        """Log, validate, keep the best weights, and save when it is time."""
        if isinstance(found, DivergedError):
            self.error = found
            return
        try:
            self.course.after_step(found)
            self.course.save_if_due()
        except DivergedError as error:
            self.error = error

    def interrupted(self) -> InterruptedRunError | None:
        """Save, and say so; nothing of an arm that has diverged."""
        try:
            return None if self.error else self.course.interrupted()
        except DivergedError as error:
            self.error = error
            return None

    def end(self) -> Outcome | DivergedError:
        """Put the best weights back and sum up; or say why there are none."""
        try:
            return self.error or self.course.end()
        except DivergedError as error:
            return error

    def moved(
        self, turn: _Turn, sums: _Sums, seconds: float, loss: float, norm: float, most_tokens: int
    ) -> StepRecord | DivergedError:
        """Take the step whose gradients are there, unless the loss says that the weights are being ruined."""
        course, step = self.course, turn.step
        try:
            self._watch.check(loss, rows=turn.rows)
        except DivergedError as error:
            return error
        rate = float(course.optimizer.param_groups[0]["lr"])
        move(course.optimizer, sums.weight, norm, self._section.max_grad_norm)
        course.schedule.step()
        return StepRecord(
            step=step.number,
            epoch=step.epoch,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            weight=sums.weight,
            tokens=turn.tokens,
            seconds=seconds,
            most_tokens=most_tokens,
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    """One arm's next step and its rows."""

    runner: Runner
    step: Step
    rows: Sequence[Any]

    @property
    def tokens(self) -> int:
        """What the rows cost."""
        return sum(map(self.runner.task.size, self.rows))


@dataclass(slots=True)
class _Sums:
    """One arm's loss over its step so far, as a sum, and what was scored."""

    total: float = 0.0
    weight: float = 0.0


def train(passes: Passes, runners: Sequence[Runner]) -> None:
    """Take every step of every arm; an arm that has ended leaves the others more room."""
    courses = [runner.course for runner in runners]
    most, least = max(course.total for course in courses), min(course.taken for course in courses)
    with signals() as interrupted, heap.kept(), bar("training", most, least) as show:
        while turns := [turn for runner in runners if (turn := runner.turn()) is not None]:
            for turn, found in zip(turns, passes.step(turns), strict=True):
                turn.runner.after(found)
                if isinstance(found, StepRecord):
                    show(found.step, f"{len(turns)} arms  {turn.runner.course.line(found)}")
            if interrupted():
                errors = [error for runner in runners if (error := runner.interrupted()) is not None]
                if errors:
                    raise errors[0]


class Passes:
    """Forward and backward passes that serve several arms."""

    def __init__(self, network: nn.Module, lanes: Lanes, precision: Precision, budget: int) -> None:
        """Name the network in which all adapters are at work, and the most tokens of a pass."""
        self._network, self._lanes, self._precision, self._budget = network, lanes, precision, budget

    def step(self, turns: Sequence[_Turn]) -> list[StepRecord | DivergedError]:
        """Take one step of each arm; nothing has moved of one that diverged.

        Raises:
            RecipeError: If not even one example at a time fits in memory.
        """
        began = time.perf_counter()
        self._network.train()
        sums = self._gradients(turns)
        try:
            found = [checked(turn.runner.course.optimizer, s.total, s.weight, turn.runner.task)
                     for turn, s in zip(turns, sums, strict=True)]  # fmt: skip
        except DivergedError as error:
            if len(turns) == 1:
                return [error]
            # What is no number may reach its neighbours in a pass: each arm by itself shows whose it is.
            return [result for turn in turns for result in self.step([turn])]
        seconds = (time.perf_counter() - began) / sum(turn.tokens for turn in turns)
        return [
            turn.runner.moved(turn, s, seconds * turn.tokens, loss, norm, self._budget)
            for turn, s, (loss, norm) in zip(turns, sums, found, strict=True)
        ]

    def _gradients(self, turns: Sequence[_Turn]) -> list[_Sums]:
        """Leave each arm's gradients, as sums, where its optimizer looks."""
        while True:
            parts = [
                (place, [turn.rows[i] for i in cut])
                for place, turn in enumerate(turns)
                for cut in turn.runner.task.cut(turn.rows, self._budget)
            ]
            read = [turns[place].runner.task.read(rows) for place, rows in parts]
            groups = best_fit(read, self._budget)
            try:
                return self._summed(turns, [[parts[i] for i in sorted(group)] for group in groups])
            except (MemoryError, RuntimeError) as error:
                rows = sum(len(turn.rows) for turn in turns)
                self._budget = less(error, [sum(read[i] for i in group) for group in groups], rows)

    def _summed(self, turns: Sequence[_Turn], groups: Sequence[Sequence[tuple[int, Sequence[Any]]]]) -> list[_Sums]:
        for turn in turns:
            turn.runner.course.optimizer.zero_grad(set_to_none=True)
        sums = [_Sums() for _ in turns]
        for group in groups:
            parts = [(turns[place].runner.number, turns[place].runner.task, rows) for place, rows in group]
            with self.read(parts) as (loss, counts):
                loss.total_B.sum().backward()  # type: ignore[no-untyped-call]
            each = (found.detach().split(list(counts)) for found in (loss.total_B, loss.weight_B))
            for (place, _), total, weight in zip(group, *each, strict=True):
                sums[place].total += float(total.sum())
                sums[place].weight += float(weight.sum())
        return sums

    @contextmanager
    def read(self, parts: Sequence[tuple[int, Task[Any], Sequence[Any]]]) -> Iterator[tuple[Loss, tuple[int, ...]]]:
        """Score rows of several arms in one pass; the pass back belongs inside of the block.

        Args:
            parts: An adapter's number, its task, and the rows that meet it.

        Yields:
            The loss of all rows in that order, and how many of them each part has.
        """
        whole = joined([task.collate(rows) for _, task, rows in parts])
        with self._lanes.laid([number for number, _, _ in parts], whole.tokens, whole.rows):
            with self._precision.arithmetic():
                loss = parts[0][1].loss(self._network, to_device(whole.batch, self._precision.device))
            yield loss, whole.rows
