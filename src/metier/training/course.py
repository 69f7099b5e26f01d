"""A whole training run: the loop, and what happens between its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError, InterruptedRunError, StepRecord, heap
from metier.core.log import note
from metier.core.log import progress as bar
from metier.core.meter import peak_memory_bytes
from metier.core.rng import derive, seed_everything
from metier.tasks import mean_loss
from metier.training import batches
from metier.training.checkpoint import Origin, Progress
from metier.training.loop import fit
from metier.training.metrics import MetricsLog, read_metrics
from metier.training.optim import build_optimizer, build_schedule
from metier.training.saver import Saver
from metier.training.signals import Signals, Struck, signals
from metier.training.suspects import Suspects
from metier.training.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.recipe import TrainSection
    from metier.tasks import Task
    from metier.training.precision import Precision
    from metier.training.pull import Pull


@dataclass(frozen=True, slots=True)
class Places:
    """Where the course writes.

    Attributes:
        metrics: The run's log, one JSON object a line.
        checkpoints: Folder for checkpoints and the best weights.
        keep: Newest checkpoints to keep.
        minutes: Training time between two checkpoints.
    """

    metrics: Path
    checkpoints: Path
    keep: int
    minutes: float

    @property
    def suspects(self) -> Path:
        """Folder for the rows of steps that went wrong."""
        return self.metrics.with_name("suspects")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a course ended.

    Attributes:
        steps: Steps taken.
        best_step: Step whose weights the module now has.
        best_loss: Its validation loss.
        first_loss: Validation loss before the first step.
        tokens_per_second: Trained tokens per second of training steps.
        stopped_early: Whether patience ran out.
    """

    steps: int
    best_step: int
    best_loss: float
    first_loss: float
    tokens_per_second: float
    stopped_early: bool


def run(
    module: nn.Module,
    task: Task[Any],
    examples: Sequence[Any],
    section: TrainSection,
    *,
    learning_rate: float,
    adapters: bool,
    precision: Precision,
    validate: Callable[[], float],
    places: Places,
    origin: Origin | None = None,
    keep_start: bool = False,
    pull: Pull | None = None,
) -> Outcome:
    """Train, validate, keep the best, save; begins where an earlier call was interrupted.

    Args:
        module: The network; what requires a gradient moves. It leaves with the best weights found.
        task: What is learnt.
        examples: Encoded training rows.
        section: The recipe's settings.
        learning_rate: Peak rate, resolved.
        adapters: Whether only adapters move.
        precision: Number format and device; the module is there already.
        validate: Takes the validation loss of the module as it is.
        places: Where to write.
        origin: What the run is made of; to go on, a checkpoint must be of the same.
        keep_start: Whether the weights as they come count as found: where they were fitted to the rows already, the
            best step may be none.
        pull: Draws weights back to where they began.

    Raises:
        DivergedError: If loss, gradient or weights stop being numbers, or the loss rises because the weights are
            ruined; the last checkpoint and the best weights stay, and the rows of the step are kept.
        InterruptedRunError: After SIGINT or SIGTERM, once everything is saved.
        RecipeError: If the folder holds a checkpoint of another origin.
        StorageError: If the disk is full.
    """
    with signals() as heard, heap.kept():
        course = Course(
            module,
            section,
            rows=len(examples),
            learning_rate=learning_rate,
            adapters=adapters,
            validate=validate,
            places=places,
            origin=origin,
            heard=heard,
        )
        if pull is not None:
            pull.on(course.optimizer)
        suspects = Suspects(
            module, task, examples, places.suspects, places.checkpoints, learning_rate=learning_rate, total=course.total
        )
        with suspects.explained(), course.closing():
            course.begin(keep_start=keep_start)
            watch = course.watch(partial(mean_loss, task, module))
            taken = fit(
                module,
                task,
                examples,
                course.steps(),
                course.optimizer,
                course.schedule,
                precision=precision,
                section=course.cut(),
                watch=watch,
                begin=suspects.begin,
            )
            with bar("training", course.total, course.taken) as show:
                for record in taken:
                    if watch.spiked:
                        suspects.note(record)
                    course.after_step(record)
                    show(record.step, course.line(record))
                    if heard():
                        raise course.interrupted()
                    if course.has_stalled:
                        break
                    course.save_if_due()
            return course.end()


class Course:
    """One run: what moves its weights, and where it stands.

    Attributes:
        optimizer: Over what moves.
        schedule: How the rate moves.
        total: Steps of the whole course.
    """

    def __init__(
        self,
        module: nn.Module,
        section: TrainSection,
        *,
        rows: int,
        learning_rate: float,
        adapters: bool,
        validate: Callable[[], float],
        places: Places,
        origin: Origin | None = None,
        heard: Signals | None = None,
    ) -> None:
        """Throw the dice anew and stand before the first step; the arguments are those of `run`, and its signals."""
        self._section, self._rows, self._validate = section, rows, validate
        self._heard = heard or Signals()
        self.total = section.total_steps(rows)
        self._every = max(1, round(self.total / section.evaluations))
        seed_everything(derive(section.seed, "train"))
        self.optimizer = build_optimizer(
            section.optimizer,
            module,
            learning_rate=learning_rate,
            adapters=adapters,
            seed=derive(section.seed, "rounding"),
        )
        self.schedule = build_schedule(
            section.schedule,
            self.optimizer,
            total_steps=self.total,
            steps_per_epoch=section.steps_per_epoch(rows),
        )
        self._saver = Saver(
            module,
            self.optimizer,
            self.schedule,
            origin or Origin(),
            folder=places.checkpoints,
            metrics=places.metrics,
            keep=places.keep,
            minutes=places.minutes,
        )
        self._state = Progress(total=self.total)
        self._validation = math.nan
        self._metrics, self._log = places.metrics, MetricsLog(places.metrics)

    @property
    def taken(self) -> int:
        """Steps taken."""
        return self._state.step

    @property
    def has_stalled(self) -> bool:
        """Whether patience has run out."""
        patience = self._section.patience
        return patience is not None and self._state.stale >= patience

    def steps(self) -> Iterator[batches.Step]:
        """The steps that are still to be taken."""
        is_over = self._state.finished or self.has_stalled
        return batches.steps(
            self._rows, self._section, first=self.taken + 1, last=self.taken if is_over else self.total
        )

    def cut(self) -> TrainSection:
        """The recipe's settings, with what was learnt of memory."""
        most = self._state.most_tokens
        return self._section.model_copy(update={"micro_batch_tokens": most}) if most else self._section

    @contextmanager
    def closing(self) -> Iterator[None]:
        """See a save that is in flight through, whatever ends the block; but not where it is to end at once."""
        try:
            yield
            self._saver.close()
        except Exception:
            self._saver.close()
            raise
        except BaseException:
            self._saver.stop()
            raise

    def watch(self, score: Callable[[Sequence[Any]], float]) -> Watch:
        """What looks at each loss before its step is taken, knowing those of earlier steps.

        Args:
            score: Takes the mean loss of some examples with the weights as they are.
        """
        before = [float(line["loss"]) for line in read_metrics(self._metrics) if line["kind"] == "step"]
        return Watch(self._state.first_loss, score, before=before)

    def begin(self, *, keep_start: bool = False) -> None:
        """Restore the newest checkpoint, or take the first validation loss; an evaluation that it owes is made up."""
        found = self._saver.restore()
        if found is None:
            self._log.cut(None)
            self._start(keep_start=keep_start)
            return
        note(f"resumed after step {found.step} of {self.total}", step=found.step)
        self._log.cut(found.step)
        self._state = found
        if self._is_due() and found.evaluated < found.step:
            self._evaluate()

    def _start(self, *, keep_start: bool) -> None:
        loss = self._validation = self._loss()
        self._log.validation(0, 0.0, loss, best=keep_start)
        self._state = replace(self._state, evaluated=0, first_loss=loss)
        if keep_start:
            self._saver.save_best(0)
            self._state = replace(self._state, best_loss=loss)

    def after_step(self, record: StepRecord) -> None:
        """Log the step; validate when it is time, and keep the weights when they are the best so far.

        Raises:
            InterruptedRunError: If a signal comes before or while it is validated; the step is saved.
        """
        self._log.step(record)
        self._state = replace(
            self._state,
            step=record.step,
            seconds=self._state.seconds + record.seconds,
            tokens=self._state.tokens + record.tokens,
            most_tokens=record.most_tokens,
        )
        if self._is_due():
            self._evaluate()

    def _is_due(self) -> bool:
        return self._state.step % self._every == 0 or self._state.step == self.total

    def _evaluate(self) -> None:
        loss = self._validation = self._loss()
        state = replace(self._state, evaluated=self._state.step)
        better = loss < state.best_loss
        epoch = state.step / self._section.steps_per_epoch(self._rows)
        self._log.validation(state.step, epoch, loss, best=better)
        if better:
            self._saver.save_best(state.step)
            self._state = replace(state, best_step=state.step, best_loss=loss, stale=0)
        else:
            self._state = replace(state, stale=state.stale + 1)

    def _loss(self) -> float:
        try:
            with self._heard.breakable():
                return self._validate()
        except Struck:
            raise self.interrupted() from None

    def line(self, record: StepRecord) -> str:
        """The figures beside the progress bar."""
        return (
            f"loss {record.loss:.3f}  validation {self._validation:.3f}  "
            f"{record.tokens / record.seconds:,.0f} tokens/s  {peak_memory_bytes() / 1e9:.1f} GB"
        )

    def save_if_due(self) -> None:
        """Begin to commit a checkpoint when the last one is old enough.

        Raises:
            StorageError: If the one before failed.
        """
        if self._state.step < self.total:
            self._saver.save_if_due(self._state)

    def interrupted(self) -> InterruptedRunError:
        """Save, and say so."""
        if not self._state.step:
            hint = "the same command begins anew"
            return InterruptedRunError("stopped before the first step", where="training", hint=hint)
        self._saver.save(self._state)
        return InterruptedRunError(
            f"stopped after step {self._state.step} of {self.total}; everything up to here is saved",
            where=str(self._saver.folder),
            hint="the same command goes on from here",
        )

    def end(self) -> Outcome:
        """Put the best weights back and sum up.

        Raises:
            DivergedError: If there are none.
        """
        state = self._state
        if not math.isfinite(state.best_loss):
            raise DivergedError(
                "no validation loss was a number", where="validation", hint="lower train.learning_rate to a third"
            )
        if not state.finished:
            self._saver.save_end(replace(state, finished=True))
        if state.finished or state.best_step != state.step:
            self._saver.load_best(state.best_step)
        return Outcome(
            steps=state.step,
            best_step=state.best_step,
            best_loss=state.best_loss,
            first_loss=state.first_loss,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            stopped_early=state.step < self.total,
        )
