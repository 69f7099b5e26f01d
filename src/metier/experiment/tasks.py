"""Several tasks on one base: one adapter each, adapters made into one, joint training, training in sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from metier import adapt, models, report, training
from metier.core import DivergedError, Fault, RecipeError, log
from metier.core.comparison import Interference, Way
from metier.core.evidence import Value
from metier.core.files import write_json, write_text
from metier.core.lazily import Made
from metier.core.rng import derive, seed_everything
from metier.evaluation import METRICS
from metier.evaluation.suite import estimate
from metier.experiment import checks
from metier.experiment.base import LoadedBase
from metier.experiment.folder import ExperimentFolder
from metier.experiment.trials import RESULT, WEIGHTS, tidy, train
from metier.recipe import LoRAMethod, Recipe, dump, load
from metier.run import prepare, say
from metier.run.folder import differences, enter
from metier.run.foresee import settle
from metier.run.job import Job, learning_rate
from metier.run.lock import claim
from metier.run.text import TextJob

if TYPE_CHECKING:
    from torch import nn

    from metier.adapt import Blend

BLENDS: tuple[Blend, ...] = ("linear", "ties", "dare")
TITLES = {
    "switched": "One adapter each, switched",
    "linear": "Mean of the adapters",
    "ties": "TIES merge",
    "dare": "DARE merge",
    "joint": "Joint training",
    "sequence": "Training in sequence",
}


class Scores(Value):
    """What one state of the network scored, kept so that nothing is measured twice."""

    values: tuple[float, ...]
    """Primary measure of each task."""


def compare_tasks(
    recipes: Sequence[Recipe], names: Sequence[str], *, given: str | None = None, command: str
) -> ExperimentFolder:
    """Train one adapter for each task on one base, and measure every way to hold them all on every task.

    Args:
        recipes: The jobs; they share a base, and what tunes it is LoRA.
        names: What the tasks are called.
        given: The first recipe's text as the user wrote it.
        command: What to type to get the same.

    Raises:
        MetierError: See the error tree; nothing is trained where the tasks do not share a base.
    """
    jobs = _checked(recipes, names)
    path = Path(recipes[0].export.folder)
    folder = ExperimentFolder(path.with_name(f"{path.name}-tasks"))
    with claim(folder.lock):
        train = settle(jobs[0], folder).recipe.train
        # One number of tokens that are read at once for all tasks, the one that the first began with.
        jobs = tuple(replace(job, recipe=job.recipe.with_train(micro_batch_tokens=train.token_budget)) for job in jobs)
        enter(folder, jobs[0].recipe, given)
        for number, job in enumerate(jobs[1:], 1):
            _enter_also(folder.path / "trials" / f"task-{number}.yaml", job.recipe)
        for job in jobs:
            say(job)
        found = _Several(jobs, names, folder).found()
        write_json(folder.path / "interference.json", {**found.model_dump(), "command": command})
        for line in report.interference_verdict(found, recipes[0].export.language):
            log.note(line)
    return folder


def _checked(recipes: Sequence[Recipe], names: Sequence[str]) -> tuple[TextJob, ...]:
    """The jobs, once it is sure that they can share a base.

    Raises:
        RecipeError: With every job that does not fit the first.
    """
    faults = [
        Fault(
            name,
            f"it starts from {recipe.model.base}, {names[0]} from {recipes[0].model.base}",
            "name one base in both",
        )
        for name, recipe in zip(names, recipes, strict=True)
        if recipe.model != recipes[0].model
    ]
    if len(set(names)) < len(names):
        faults.append(Fault("metier compare", "one task is named twice", "name each recipe once"))
    if faults:
        raise RecipeError.of(faults)
    jobs = []
    for name, recipe in zip(names, recipes, strict=True):
        method = recipe.method if isinstance(recipe.method, LoRAMethod) else LoRAMethod()
        job = prepare(recipe.model_copy(update={"method": method}))
        if not isinstance(job, TextJob) or job.head != "causal":
            raise RecipeError(
                "several tasks are compared on causal language models, whose output all tasks share",
                where=name,
                hint="for classes take such a model with task.way=words",
            )
        checks.check(job)
        # What is kept of general ability is the business of each comparison alone.
        jobs.append(replace(job, pack=()))
    if len({job.recipe.method for job in jobs}) > 1:
        raise RecipeError(
            "adapters of different settings cannot be made into one",
            where="method",
            hint="set the same in every recipe",
        )
    return tuple(jobs)


def _enter_also(path: Path, recipe: Recipe) -> None:
    """Keep a further task's recipe, or make sure that it is the one that was kept.

    Raises:
        RecipeError: If it is another one; the message shows what differs.
    """
    if not path.exists():
        write_text(path, dump(recipe))
        return
    changed = differences(load(path), recipe)
    if changed:
        what = f"the folder holds tasks of another recipe: {'; '.join(changed[:6])}"
        raise RecipeError(what, where=str(path), hint="choose another export.folder in the first recipe")


class Joined(Made[Any]):
    """The examples of several tasks, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        """Take the parts in order."""
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def make(self, place: int) -> Any:
        """The example at a place."""
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)


class _Several:
    """Tasks on one base, and where what was made of them lies."""

    def __init__(self, jobs: Sequence[TextJob], names: Sequence[str], folder: ExperimentFolder) -> None:
        """Take the jobs; the base is loaded when it is first needed."""
        self.jobs, self.names, self.folder = tuple(jobs), tuple(names), folder
        self._loaded: LoadedBase | None = None

    def base(self) -> LoadedBase:
        """The base."""
        if self._loaded is None:
            self._loaded = LoadedBase(self.jobs[0], self.folder.path, whole=False)
        return self._loaded

    def found(self) -> Interference:
        """Every way, measured on every task."""
        primary = [job.declared() for job in self.jobs]
        base = self._scores("base", lambda: self.base().model.module)
        alone = [self._learn(f"task-{place}", job) for place, job in enumerate(self.jobs)]
        ways = [
            self._switched(alone),
            *(self._blended(alone, how) for how in BLENDS),
            self._joint(),
            self._sequence(alone[0]),
        ]
        kinds = [None if name == "loss" else METRICS[name] for name in primary]
        return Interference(
            tasks=self.names,
            measure=tuple(primary),
            units=tuple("nats" if kind is None else kind.unit for kind in kinds),
            higher_is_better=tuple(kind is not None for kind in kinds),
            base=base.values,
            ways=tuple(ways),
        )

    def _learn(self, name: str, job: Job, *, start: Path | None = None) -> Path:
        """An adapter, trained on a job, from another one's weights where one is given; found where it was made."""
        place = self.folder.path / "trials" / name
        if (place / RESULT).exists():
            return place
        rate = learning_rate(job)[0]
        log.note(f"{name}: learning rate {rate:g}")
        base = self.base()
        job = replace(job, recipe=job.recipe.with_train(learning_rate=rate))
        with base.ready(job) as ready:
            if start is not None:
                training.checkpoint.load_weights(ready.adapted.module, start / "adapter" / WEIGHTS)
            ended = train(place, ready, base, job.plan(flops_per_second=None), keeps=False)
            if ended.diverged:
                raise DivergedError(
                    f"{name} diverged", where="train.learning_rate", hint="set a lower one in the recipe"
                )
            adapt.save_adapter(ready.adapted.module, place / "adapter")
            models.write_tensors(adapt.moving_weights(ready.adapted.module), place / "adapter" / WEIGHTS)
        write_json(place / RESULT, ended.model_dump())
        tidy(place)
        return place

    def _scores(self, name: str, network: Callable[[], nn.Module]) -> Scores:
        """The primary measure of every task, measured once for each state."""
        place = self.folder.path / "trials" / "scores" / f"{name}.json"
        try:
            return Scores.model_validate_json(place.read_text("utf-8"))
        except (OSError, ValidationError):
            module = network()
        values = []
        for job in self.jobs:
            suited = replace(job, task=job.task.suited(module))
            # A state of its own: distances from the base are no matter here.
            measured = replace(suited, recipe=_without_baselines(job.recipe)).measure(
                self.base().model, module, base=None
            )
            primary = job.declared()
            values.append(estimate(primary, measured.rows[primary], job.recipe.evaluate.confidence).value)
        found = Scores(values=tuple(values))
        write_json(place, found.model_dump())
        log.note(f"{name}: {', '.join(f'{task} {value:.4f}' for task, value in zip(self.names, values, strict=True))}")
        return found

    def _with_adapters(self, places: Sequence[Path], use: Callable[[nn.Module], Any]) -> Any:
        """What comes of the base with these adapters on it; afterwards it is the base again."""
        folders = {f"task_{i}": place / "adapter" for i, place in enumerate(places)}
        wrapped: Any = adapt.load_adapters(self.base().model.module, folders)
        try:
            self.base().precision.place(wrapped)
            return use(wrapped)
        finally:
            wrapped.unload()

    def _switched(self, places: Sequence[Path]) -> Way:
        """Each adapter on every task, and how long it takes to put another one to use."""

        def use(module: nn.Module) -> tuple[list[Scores], float]:
            rows = []
            for i in range(len(places)):
                adapt.switch(module, f"task_{i}")
                rows.append(self._scores(f"switched-{i}", lambda: module))
            began = time.perf_counter()
            for i in range(len(places)):
                adapt.switch(module, f"task_{i}")
            return rows, (time.perf_counter() - began) / len(places)

        rows, seconds = self._with_adapters(places, use)
        return self._way("switched", [row.values for row in rows], seconds_to_switch=seconds)

    def _blended(self, places: Sequence[Path], how: Blend) -> Way:
        """All adapters made into one."""

        def use(module: nn.Module) -> Scores:
            def blended() -> nn.Module:
                seed_everything(derive(self.jobs[0].recipe.train.seed, "blend", how))
                adapt.blend(module, [f"task_{i}" for i in range(len(places))], how)
                return module

            return self._scores(how, blended)

        return self._way(how, [self._with_adapters(places, use).values])

    def _joint(self) -> Way:
        """One adapter on the rows of all tasks together."""
        job = replace(
            self.jobs[0],
            train=Joined([job.train for job in self.jobs]),
            validation=Joined([job.validation for job in self.jobs]),
        )
        return self._way("joint", [self._alone(self._learn("joint", job), "joint").values])

    def _sequence(self, first: Path) -> Way:
        """One adapter on one task after the other."""
        rows, place = [], first
        for number, job in enumerate(self.jobs):
            if number:
                place = self._learn(f"sequence-{number}", job, start=place)
            rows.append(self._alone(place, f"sequence-{number}").values)
        forgotten = tuple(rows[i][i] - rows[-1][i] for i in range(len(rows)))
        return self._way("sequence", rows, forgotten=forgotten)

    def _alone(self, place: Path, name: str) -> Scores:
        """One adapter on every task."""
        found: Scores = self._with_adapters([place], lambda module: self._scores(name, lambda: module))
        return found

    def _way(
        self,
        name: str,
        scores: Sequence[tuple[float, ...]],
        *,
        forgotten: tuple[float, ...] | None = None,
        seconds_to_switch: float | None = None,
    ) -> Way:
        return Way(
            name=name,
            title=TITLES[name],
            scores=tuple(scores),
            forgotten=forgotten or (0.0,) * len(self.jobs),
            seconds_to_switch=seconds_to_switch,
        )


def _without_baselines(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"baselines": False})})
