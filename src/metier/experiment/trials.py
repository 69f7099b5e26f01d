"""One training as a unit on disk: made once, found again by whoever goes on.

`trials/<arm>/<stage>-<rate>-<seed>/result.json` is written last, whole or not at all. While a unit is being made its
checkpoints lie beside it, and once it is trained its weights, so that no step is taken twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from metier import adapt, evaluation, models, training
from metier.core import DivergedError, MetierError, files, log
from metier.core.evidence import Strength, Value
from metier.core.files import write_json
from metier.core.meter import Meter
from metier.experiment.folder import RESULT
from metier.recipe import LoRAMethod, Recipe, Step
from metier.run.foresee import fast, learning
from metier.run.guards import Learnt, learnt, pull
from metier.run.strength import Dial
from metier.tasks import mean_loss

if TYPE_CHECKING:
    from metier.evaluation import Measured
    from metier.experiment.arms import Arm
    from metier.experiment.base import LoadedBase, Ready
    from metier.planning import Plan
    from metier.run.job import Job

PATH = (0.3, 0.5, 0.7, 0.85, 1.0)
"""Shares of the update that are tried after a whole training where no floor is set: to be seen, not to be used. All of
it comes last and is left in the network."""
Stage = Literal["coarse", "fine", "edge", "whole", "final", "curve", "check"]
TRAINED, DROPPED, WEIGHTS, START, MEASURED, SPENT = (
    "trained.json",
    "dropped.json",
    "weights.safetensors",
    "start.safetensors",
    "measured",
    "spent.json",
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One training that is to be made.

    Attributes:
        arm: Which way to tune.
        stage: Why: a trial of the search, a whole training that was not taken, one that was, one on a part of the
            rows, or a trial there.
        rate: Peak learning rate of a whole training; see `raised`.
        seed: Seed of new parameters, order and dropout.
        share: Share of the training rows.
        length: Share of the steps, with the whole schedule.
        rows: Test rows that are measured, where a budget left some out; None for all.
    """

    arm: Arm
    stage: Stage
    rate: float
    seed: int
    share: float = 1.0
    length: float = 1.0
    rows: int | None = None

    @property
    def folder(self) -> Path:
        """Where it lies, below `trials`."""
        part = "" if self.share == 1 else f"-{self.share:g}"
        part += "" if self.rows is None else f"-{self.rows}rows"
        return Path(self.arm.folder) / f"{self.stage}-{self.rate:g}-{self.seed}{part}"

    @property
    def is_measured(self) -> bool:
        """Whether the test rows are measured."""
        return self.stage in {"final", "curve"}


def raised(rate: float, length: float) -> float:
    """The peak learning rate of a training with a share of the steps: fewer bear a higher one, by the share's root.

    Source: the best rate of a linear decay over T steps falls as 1/sqrt(T), Defazio et al. 2023, arXiv:2310.07831.
    Measured (docs/evidence/ways.md): judged at one and the same rate, a third of the steps chose up to three times what
    whole trainings were best with.
    """
    return rate / math.sqrt(length)


class Ended(Value):
    """How a unit ended."""

    loss: float | None
    """Lowest validation loss; None where there was no number."""
    first_loss: float | None
    """Validation loss before the first step."""
    diverged: bool
    """Whether loss or gradient stopped being numbers."""
    steps: int
    """Steps taken."""
    best_step: int
    """Step whose weights were kept."""
    training_seconds: float
    """Wall time of the steps, validation not included."""
    seconds_to_best: float
    """The same until the best step."""
    seconds: float
    """Wall time of training in all, validation included."""
    cpu_seconds: float
    """CPU time of the same."""
    measuring_seconds: float
    """Wall time of measuring the test rows."""
    peak_memory_bytes: int
    """Highest memory while training."""
    tokens_per_second: float
    """Trained tokens a second."""
    parameters_moved: int
    """Numbers that training changes."""
    method: str
    """One line that says what moves."""
    bytes_on_disk: int
    """Size of the file that holds what moved."""
    seconds_to_load: float
    """Wall time to put that file onto a base in memory."""

    strengths: tuple[Strength, ...] = ()
    """Shares of the update that were tried on validation rows."""
    trying_seconds: float = 0.0
    """Wall time of trying them."""
    notes: tuple[str, ...] = ()
    """What a reader should know of the rows that its arm learns from."""

    def loss_under(self, floor: float | None) -> float:
        """Lowest validation loss that keeps the floor; infinity where there was no number.

        Where no share of the update that was tried keeps it, none of it does: the loss before the first step.
        """
        if self.loss is None:
            return math.inf
        chosen = next((one for one in self.strengths if one.chosen), None)
        if floor is None or chosen is None or self.first_loss is None:
            return self.loss
        return self.first_loss - (max(0.0, chosen.gain) if chosen.kept >= floor else 0.0)

    def is_above_base(self, floor: float | None) -> bool:
        """Whether there was no number under the floor, or none below the validation loss before the first step."""
        return self.loss is None or (self.first_loss is not None and self.loss_under(floor) >= self.first_loss)


class Trials:
    """Makes units, or finds them made."""

    def __init__(
        self,
        folder: Path,
        job: Job,
        plans: Mapping[str, Plan],
        base: Callable[[], LoadedBase],
        before: Callable[[], Measured],
    ) -> None:
        """Take the folder, the job, each arm's plan, and what gives the base and its figures once needed."""
        self._folder, self._plans, self._base, self._before = folder / "trials", plans, base, before
        self._parts: dict[float, Job] = {1.0: job}
        self._jobs: dict[tuple[str, float], Job] = {}
        self._learnt: dict[tuple[str, float], Learnt] = {}

    def give_part(self, share: float, job: Job) -> None:
        """Say what the job is on a share of the training rows."""
        self._parts[share] = job

    def find(self, unit: Unit) -> Ended | None:
        """How a unit ended that was made before; None where it was not."""
        return read(self._folder / unit.folder / RESULT)

    def measured(self, unit: Unit) -> Measured | None:
        """What a unit that did not diverge scored on the test rows."""
        return evaluation.Measured.load(self._folder / unit.folder / MEASURED)

    def make(self, unit: Unit) -> Ended:
        """Train, and measure where the unit is to be measured; a unit that was begun goes on.

        Raises:
            InterruptedRunError: After a signal; the same call goes on.
        """
        found = self.find(unit)
        if found is not None:
            return found
        place, base = self._folder / unit.folder, self._base()
        with base.ready(self._job(unit)) as ready:
            ended = self._trained(unit, ready, tries=True)
            if unit.is_measured and not ended.diverged:
                ended = self._measure(place, ready, base, ended)
        write_json(place / RESULT, ended.model_dump())
        tidy(place)
        return ended

    def train(self, unit: Unit) -> Ended:
        """Train a unit that is to be measured, without measuring it: `make` goes on from there, `drop` lets it go.

        Raises:
            InterruptedRunError: After a signal; the same call goes on.
        """
        place, job = self._folder / unit.folder, self._job(unit)
        tries = job.recipe.train.retain is not None
        # What a floor allows is told by what is tried after training.
        for name in (RESULT, DROPPED) if tries else (RESULT, DROPPED, TRAINED):
            found = read(place / name)
            if found is not None:
                return found
        with self._base().ready(job) as ready:
            return self._trained(unit, ready, tries=tries)

    def drop(self, unit: Unit, ended: Ended) -> None:
        """Keep how a training ended, and nothing to go on from."""
        place = self._folder / unit.folder
        if self.find(unit) is None:
            write_json(place / DROPPED, ended.model_dump())
            tidy(place)

    def _trained(self, unit: Unit, ready: Ready, *, tries: bool) -> Ended:
        """Train a unit, or find it trained; `tries` shares of its update where that is wanted of such a unit."""
        place, base, job = self._folder / unit.folder, self._base(), ready.job
        learnt = self._asked(unit, ready)
        dial = self._dial(place, ready, base, unit) if tries else None
        ended = read(place / TRAINED)
        if ended is not None:
            training.checkpoint.load_weights(ready.adapted.module, place / WEIGHTS)
        else:
            keeps = unit.is_measured or dial is not None
            ended = train(place, ready, base, learnt, self._plans[unit.arm.name], keeps=keeps)
        if dial is not None and ended.first_loss is not None:
            ended = _tried(dial, ended, ended.first_loss, job.recipe.train.retain, fitted=bool(ready.fitted))
        said = (*job.notes[len(self._parts[unit.share].notes) :], *learnt.notes)
        return ended.model_copy(update={"notes": said})

    def _job(self, unit: Unit) -> Job:
        """The job of a unit: its arm's rows, and the recipe that makes it."""
        key = unit.arm.name, unit.share
        if key not in self._jobs:
            self._jobs[key] = unit.arm.job(self._parts[unit.share])
        job = self._jobs[key]
        recipe = made_of(job.recipe, len(job.train), rate=unit.rate, seed=unit.seed, length=unit.length)
        return replace(job, recipe=recipe)

    def _asked(self, unit: Unit, ready: Ready) -> Learnt:
        """What is learnt under the arm's guards; the base is asked once for each arm and part of the rows."""
        key = unit.arm.name, unit.share
        if key not in self._learnt:
            self._learnt[key] = learnt(ready.job, ready.adapted.module)
        return self._learnt[key]

    def _dial(self, place: Path, ready: Ready, base: LoadedBase, unit: Unit) -> Dial | None:
        """What tries shares of the update: after every training under a floor, else after whole ones where wanted."""
        job, module = ready.job, ready.adapted.module
        is_wanted = job.recipe.train.retain is not None or (unit.stage == "final" and job.recipe.compare.strengths)
        if not (is_wanted and job.keeps):
            return None
        # What was fitted before is no part of the update.
        at_base = not (isinstance(job.recipe.method, LoRAMethod) or ready.fitted)
        dial = Dial(
            module=module,
            new=base.model.new,
            start=base.file if at_base and base.file is not None else place / START,
            end=place / WEIGHTS,
            validate=partial(mean_loss, job.task, module, job.validation),
            kept=job.keeping(base.model, module, self._before()),
        )
        if not at_base:
            dial.begin()
        return dial

    def _measure(self, place: Path, ready: Ready, base: LoadedBase, ended: Ended) -> Ended:
        before = self._before()
        began = time.perf_counter()
        measured = ready.job.measure(base.model, ready.adapted.module, base=before)
        measured.save(place / MEASURED)
        return ended.model_copy(update={"measuring_seconds": time.perf_counter() - began})


def _tried(dial: Dial, ended: Ended, base_loss: float, floor: float | None, *, fitted: bool) -> Ended:
    """The unit with what shares of its update gain and keep; the network is left with what the floor allows.

    Where something was fitted before, none of the update is a share of its own: the base is not where it began.
    """
    began = time.perf_counter()
    if floor is None:
        path = dial.path(base_loss, (0.0, *PATH) if fitted else PATH)
    else:
        path = dial.hold(base_loss, floor, fitted=fitted)
    return ended.model_copy(update={"strengths": path, "trying_seconds": time.perf_counter() - began})


def made_of(recipe: Recipe, rows: int, *, rate: float, seed: int, length: float) -> Recipe:
    """A recipe on so many rows made that of one training: fewer steps keep the whole schedule, rescaled.

    Args:
        recipe: What a whole training is made by.
        rows: Its training rows.
        rate: Peak learning rate of a whole training; see `raised`.
        seed: Seed of new parameters, order and dropout.
        length: Share of the steps.
    """
    steps = max(1, round(recipe.train.total_steps(rows) * length))
    evaluations = max(1, math.ceil(recipe.train.evaluations * length))
    made = recipe.with_train(learning_rate=raised(rate, length), seed=seed, max_steps=steps, evaluations=evaluations)
    schedule = made.train.schedule
    if isinstance(schedule, Step) and length < 1:
        # Fewer cuts fit, so each is deeper: the rate ends where that of the whole training does.
        schedule = schedule.model_copy(update={"gamma": schedule.gamma ** (1 / length)})
        made = made.with_train(schedule=schedule)
    return made


def told(ended: Ended) -> str:
    """How a training ended, for its log."""
    if ended.loss is None:
        return "diverged"
    first = "no number" if ended.first_loss is None else f"{ended.first_loss:.4f}"
    return f"validation loss {first} -> {ended.loss:.4f} at step {ended.best_step} of {ended.steps}"


def read(path: Path) -> Ended | None:
    """How a unit ended, as it was written there; None where nothing whole is."""
    try:
        return Ended.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError):
        return None


def train(place: Path, ready: Ready, base: LoadedBase, learnt: Learnt, plan: Plan, *, keeps: bool) -> Ended:
    """Train what was made ready on what is learnt, going on from what lies there; `keeps` leaves the weights beside it.

    Raises:
        InterruptedRunError: After a signal; the same call goes on.
    """
    meter, earlier = Meter(), _spent(place)
    try:
        with meter.phase("train"):
            outcome = _run(place, ready, base, learnt, plan)
    except DivergedError as error:
        log.note(f"diverged: {error}")
        outcome = None
    except (MetierError, KeyboardInterrupt):
        _remember(place, meter, earlier)
        raise
    size, seconds_to_load = _store(place, ready) if keeps and outcome is not None else (0, 0.0)
    phase, lines = meter.phases[0], training.read_metrics(place / "metrics.jsonl")
    taken = [line for line in lines if line["kind"] == "step"]
    best = outcome.best_step if outcome else 0
    ended = Ended(
        loss=outcome.best_loss if outcome else None,
        first_loss=_number(outcome.first_loss) if outcome else None,
        diverged=outcome is None,
        steps=outcome.steps if outcome else len(taken),
        best_step=best,
        training_seconds=sum(line["seconds"] for line in taken),
        seconds_to_best=sum(line["seconds"] for line in taken if line["step"] <= best),
        seconds=earlier[0] + phase.wall_seconds,
        cpu_seconds=earlier[1] + phase.cpu_seconds,
        measuring_seconds=0.0,
        peak_memory_bytes=phase.peak_memory_bytes,
        tokens_per_second=outcome.tokens_per_second if outcome else 0.0,
        parameters_moved=ready.adapted.moved,
        method=ready.adapted.method,
        bytes_on_disk=size,
        seconds_to_load=seconds_to_load,
    )
    if keeps and outcome is not None:
        write_json(place / TRAINED, ended.model_dump())
    return ended


def _run(place: Path, ready: Ready, base: LoadedBase, learnt: Learnt, plan: Plan) -> training.Outcome:
    job, module = ready.job, ready.adapted.module
    recipe = job.recipe
    planned = plan.method(recipe.method.kind)
    checkpointing = planned is not None and planned.checkpointing
    with (
        fast(recipe.train, module, checkpointing=checkpointing),
        training.recomputing(module, wanted=checkpointing),
        learning(job, plan, place / "metrics.jsonl"),
    ):
        return training.run(
            module,
            job.task,
            learnt.train,
            recipe.train,
            learning_rate=float(recipe.train.learning_rate),
            adapters=isinstance(recipe.method, LoRAMethod),
            precision=base.precision,
            validate=partial(mean_loss, job.task, module, job.validation),
            places=training.Places(
                metrics=place / "metrics.jsonl",
                checkpoints=place / "checkpoints",
                keep=1,
                minutes=recipe.export.checkpoint_minutes,
            ),
            keep_start=bool(ready.fitted),
            pull=pull(job, base.model, module),
        )


def _store(place: Path, ready: Ready) -> tuple[int, float]:
    """Write what moved; its size, and how long it takes to put it back onto the network."""
    module, path = ready.adapted.module, place / WEIGHTS
    models.write_tensors(adapt.moving_weights(module), path)
    began = time.perf_counter()
    training.checkpoint.load_weights(module, path)
    return path.stat().st_size, time.perf_counter() - began


def _spent(place: Path) -> tuple[float, float]:
    """Wall and CPU seconds of earlier calls that were interrupted."""
    import json

    try:
        found = json.loads((place / SPENT).read_text("utf-8"))
        return float(found["seconds"]), float(found["cpu_seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0, 0.0


def _remember(place: Path, meter: Meter, earlier: tuple[float, float]) -> None:
    phase = meter.phases[0]
    found = {"seconds": earlier[0] + phase.wall_seconds, "cpu_seconds": earlier[1] + phase.cpu_seconds}
    write_json(place / SPENT, found)


def tidy(place: Path) -> None:
    """Remove what a unit went on from, once it is whole."""
    for name in ("checkpoints", WEIGHTS, START, TRAINED, SPENT):
        files.discard(place / name)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
