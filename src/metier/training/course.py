"""A whole training run: the loop, and what happens between its steps."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError, InterruptedRunError, StepRecord, StorageError, heap
from metier.core.files import storage_error
from metier.core.log import event, note
from metier.core.log import progress as bar
from metier.core.meter import peak_memory_bytes
from metier.core.rng import derive, seed_everything
from metier.tasks import score
from metier.training import batches, checkpoint
from metier.training.checkpoint import Progress
from metier.training.loop import fit
from metier.training.optim import build_optimizer, build_schedule
from metier.training.suspects import Suspects
from metier.training.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from metier.recipe import TrainSection
    from metier.tasks import Task
    from metier.training.precision import Precision


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
    keep_start: bool = False,
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
        keep_start: Whether the weights as they come count as found: where they were fitted to the rows already, the
            best step may be none.

    Raises:
        DivergedError: If loss or gradient stop being numbers, or the loss rises because the weights are ruined; the
            last checkpoint and the best weights stay, and the rows of the step are kept.
        InterruptedRunError: After SIGINT or SIGTERM, once everything is saved.
        StorageError: If the disk is full.
    """
    course = Course(
        module,
        section,
        rows=len(examples),
        learning_rate=learning_rate,
        adapters=adapters,
        validate=validate,
        places=places,
    )
    course.begin(keep_start=keep_start)
    watch = course.watch(lambda rows: _mean(module, task, rows))
    suspects = Suspects(
        module, task, examples, places.suspects, places.checkpoints, learning_rate=learning_rate, total=course.total
    )
    taken = fit(
        module,
        task,
        examples,
        suspects.following(course.steps()),
        course.optimizer,
        course.schedule,
        precision=precision,
        section=section,
        watch=watch,
    )
    with (
        signals() as interrupted,
        heap.kept(),
        suspects.explained(),
        bar("training", course.total, course.taken) as show,
    ):
        for record in taken:
            if watch.spiked:
                suspects.note(record)
            course.after_step(record)
            show(record.step, course.line(record))
            if interrupted():
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
    ) -> None:
        """Throw the dice anew and stand before the first step; the arguments are those of `run`."""
        self._module, self._section, self._rows = module, section, rows
        self._validate, self._places = validate, places
        self.total = section.total_steps(rows)
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
        self._best = places.checkpoints / "best.safetensors"
        self._saved_at = time.monotonic()
        self._state = Progress()
        self._validation = float("nan")
        self._log = MetricsLog(places.metrics)

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
        return batches.steps(self._rows, self._section, first=self.taken + 1, last=self.total)

    def watch(self, score: Callable[[Sequence[Any]], float]) -> Watch:
        """What looks at each loss before its step is taken, knowing those of earlier steps.

        Args:
            score: Takes the mean loss of some examples with the weights as they are.
        """
        before = [float(line["loss"]) for line in read_metrics(self._places.metrics) if line["kind"] == "step"]
        return Watch(self._log.first_validation(), score, before=before)

    def begin(self, *, keep_start: bool = False) -> None:
        """Restore the newest checkpoint, or take the first validation loss."""
        found = checkpoint.load_newest(self._places.checkpoints, self._module, self.optimizer, self.schedule)
        if found is None:
            _check_space(self._module, self._places)
            self._log.cut(None)
            self._validation = self._validate()
            self._log.validation(0, 0.0, self._validation, best=keep_start)
            if keep_start:
                checkpoint.save_weights(self._module, self._best)
                self._state = replace(self._state, best_loss=self._validation)
        else:
            note(f"resumed after step {found.step} of {self.total}", step=found.step)
            self._log.cut(found.step)
            self._state = found

    def after_step(self, record: StepRecord) -> None:
        """Log the step; validate when it is time, and keep the weights when they are the best so far."""
        self._log.step(record)
        state = replace(
            self._state,
            step=record.step,
            seconds=self._state.seconds + record.seconds,
            tokens=self._state.tokens + record.tokens,
        )
        every = max(1, round(self.total / self._section.evaluations))
        if record.step % every == 0 or record.step == self.total:
            loss = self._validation = self._validate()
            better = loss < state.best_loss
            self._log.validation(record.step, record.epoch, loss, best=better)
            if better:
                self._check_sound(record.step)
                checkpoint.save_weights(self._module, self._best)
                state = replace(state, best_step=record.step, best_loss=loss, stale=0)
            else:
                state = replace(state, stale=state.stale + 1)
        self._state = state

    def line(self, record: StepRecord) -> str:
        """The figures beside the progress bar."""
        return (
            f"loss {record.loss:.3f}  validation {self._validation:.3f}  "
            f"{record.tokens / record.seconds:,.0f} tokens/s  {peak_memory_bytes() / 1e9:.1f} GB"
        )

    def save(self) -> None:
        """Commit a checkpoint, of finite numbers only."""
        self._check_sound(self.taken)
        checkpoint.save(
            self._places.checkpoints,
            self._module,
            self.optimizer,
            self.schedule,
            self._state,
            keep=self._places.keep,
        )
        self._saved_at = time.monotonic()

    def _check_sound(self, step: int) -> None:
        """Refuse to save what is no number.

        Raises:
            DivergedError: If a weight or a moment of the optimizer is not finite.
        """
        if found := unsound(self._module, self.optimizer):
            raise DivergedError(
                f"{found} is not finite after step {step}",
                where="training, before saving; what was saved before is intact",
                hint="lower train.learning_rate to a third",
            )

    def save_if_due(self) -> None:
        """Commit a checkpoint when the last one is old enough."""
        if time.monotonic() - self._saved_at > self._places.minutes * 60:
            self.save()

    def interrupted(self) -> InterruptedRunError:
        """Save, and say so."""
        self.save()
        return InterruptedRunError(
            f"stopped after step {self._state.step} of {self.total}; everything up to here is saved",
            where=str(self._places.checkpoints),
            hint="the same command goes on from here",
        )

    def end(self) -> Outcome:
        """Put the best weights back and sum up."""
        state = self._state
        if not math.isfinite(state.best_loss):
            raise DivergedError(
                "no validation loss was a number", where="validation", hint="lower train.learning_rate to a third"
            )
        if state.best_step != state.step:
            checkpoint.load_weights(self._module, self._best)
        return Outcome(
            steps=state.step,
            best_step=state.best_step,
            best_loss=state.best_loss,
            first_loss=self._log.first_validation(),
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            stopped_early=state.step < self.total,
        )


class MetricsLog:
    """`metrics.jsonl`: the run's memory of every step."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is written yet."""
        self._path = path

    def cut(self, upto: int | None) -> None:
        """Keep the lines up to a step, for a resumed run takes the later ones again; None begins anew."""
        path = self._path
        kept = [line for line in read_metrics(path) if upto is not None and line["step"] <= upto]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        except OSError as error:
            raise storage_error(path, error) from error

    def step(self, record: StepRecord) -> None:
        """Note a step."""
        facts = asdict(record)
        facts |= {"tokens_per_second": record.tokens / record.seconds, "memory_bytes": peak_memory_bytes()}
        self._append({"kind": "step", **facts})

    def validation(self, step: int, epoch: float, loss: float, *, best: bool) -> None:
        """Note a validation loss."""
        # JSON knows no NaN; null says that there was no number.
        said = loss if math.isfinite(loss) else None
        self._append({"kind": "validation", "step": step, "epoch": epoch, "loss": said, "best": best})

    def first_validation(self) -> float:
        """The validation loss before the first step."""
        loss = next(line["loss"] for line in read_metrics(self._path) if line["kind"] == "validation")
        return float("nan") if loss is None else float(loss)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise storage_error(self._path, error) from error
        event(**line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM arrived; a second one ends the process at once."""
    seen: list[int] = []

    def remember(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        note("finishing this step, then saving; once more to stop at once")

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever embeds us owns the signals
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unsound(module: nn.Module, optimizer: Optimizer) -> str | None:
    """Name of a moving weight, or of a moment of the optimizer, that is not finite; None where all are."""
    for name, tensor in checkpoint.moving_weights(module).items():
        if not _finite(tensor):
            return name
    for state in optimizer.state.values():
        for name, value in state.items():
            if hasattr(value, "isfinite") and not _finite(value):
                return f"the optimizer's {name}"
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _mean(module: nn.Module, task: Task[Any], rows: Sequence[Any]) -> float:
    loss = score(task, module, rows)
    return float(loss.total_B.sum() / loss.weight_B.sum())


def _check_space(module: nn.Module, places: Places) -> None:
    needed = 2 * checkpoint.estimated_bytes(module)
    spare = checkpoint.spare_bytes(places.checkpoints, needed)
    if spare < 0:
        raise StorageError(
            f"two checkpoints need {needed / 1e9:.1f} GB, {-spare / 1e9:.1f} GB more than is free",
            where=str(places.checkpoints),
            hint="free some space or name another folder with export.folder=...",
        )
