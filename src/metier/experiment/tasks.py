"""Several tasks on one base: one adapter each, adapters made into one, joint training, training in sequence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from metier import adapt, evaluation, models, planning, report, training
from metier.core import DivergedError, RecipeError, log
from metier.core.comparison import Interference, Pair, Way
from metier.core.files import write_json, write_text
from metier.core.lazily import Made
from metier.core.rng import derive, seed_everything
from metier.core.version import __version__
from metier.evaluation import Measured
from metier.evaluation.suite import estimate
from metier.experiment import budget, checks, findings, search
from metier.experiment.base import LoadedBase
from metier.experiment.budget import CHECKED, SEARCH_SHARE
from metier.experiment.folder import RESULT, ExperimentFolder
from metier.experiment.search import Point, Tried
from metier.experiment.trials import WEIGHTS, Ended, made_of, read, tidy, told, train
from metier.recipe import Recipe, dump, load
from metier.run import environment, say
from metier.run.folder import differences, enter
from metier.run.foresee import plan_job, settle
from metier.run.guards import learnt
from metier.run.job import Job, choose_device, learning_rate
from metier.run.lock import claim
from metier.run.text import TextJob

if TYPE_CHECKING:
    from torch import nn

    from metier.adapt import Blend
    from metier.core.evidence import Estimate
    from metier.evaluation.measured import Rows

T = TypeVar("T")
BLENDS: tuple[Blend, ...] = ("linear", "ties", "dare")
TITLES = {
    "switched": "One adapter each, switched",
    "linear": "Mean of the adapters",
    "ties": "TIES merge",
    "dare": "DARE merge",
    "joint": "Joint training",
    "sequence": "Training in sequence",
}


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
    jobs = checks.tasks_of(recipes, names)
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
        _say_plan(jobs)
        found = _Several(jobs, names, folder).found(command)
        path = report.write_interference(
            folder.path, found, recipes[0].export.language, environment=environment.describe()
        )
        log.note(f"report: {path}")
    return folder


def _say_plan(jobs: Sequence[TextJob]) -> None:
    """Tell how many trainings will be made, and about how long they take."""
    section = jobs[0].recipe.compare
    speed = planning.measure_flops_per_second(str(choose_device(jobs[0].recipe)))
    each = []
    for job in jobs:
        method = plan_job(job, probe=False, flops_per_second=speed).method("lora")
        each.append(method.seconds if method is not None and method.seconds is not None else 0.0)
    # What is searched and trained over seeds as the methods of one task are: each task's adapter, and joint training.
    train = {**{f"task-{number}": seconds for number, seconds in enumerate(each)}, "joint": sum(each)}
    size = budget.Size(tuple(train), section.trials, section.seeds, shares=(), rows=0)
    in_sequence = section.seeds * (len(jobs) - 1)
    trainings = size.trainings + in_sequence
    seconds = budget.seconds_left(size, budget.Prices(train), budget.Done(base=True)) + section.seeds * sum(each[1:])
    span = report.Voice("en").seconds(seconds)
    log.note(
        f"{trainings} trainings in about {span}, measuring not counted: {len(jobs)} adapters and a joint one, "
        f"each with {section.trials} trials of the learning rate and {section.seeds} seeds, and training in sequence",
        trainings=trainings,
        seconds=seconds,
    )


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


State = tuple[Measured, ...]
"""One state of the network, measured on every task."""


class _Several:
    """Tasks on one base, and where what was made of them lies."""

    def __init__(self, jobs: Sequence[TextJob], names: Sequence[str], folder: ExperimentFolder) -> None:
        """Take the jobs; the base is loaded when it is first needed."""
        self.jobs, self.names, self.folder = tuple(jobs), tuple(names), folder
        self.primary = tuple(job.declared() for job in jobs)
        self._loaded: LoadedBase | None = None

    def base(self) -> LoadedBase:
        """The base."""
        if self._loaded is None:
            self._loaded = LoadedBase(self.jobs[0], self.folder.path, whole=False)
        return self._loaded

    def found(self, command: str) -> Interference:
        """Every way, measured on every task, over seeds."""
        recipe = self.jobs[0].recipe
        seeds = tuple(recipe.train.seed + number for number in range(recipe.compare.seeds))
        base = self.measured("base", lambda: self.base().model.module)
        named = enumerate(zip(self.names, self.jobs, strict=True))
        rates = tuple(self._rate(f"task-{number}", name, job) for number, (name, job) in named)
        joint = self._rate("joint", TITLES["joint"], self.joint())
        held = [_OneSeed(self, seed, rates, joint).ways() for seed in seeds]
        own = list(zip(*(ways["switched"][0] for ways in held), strict=True))
        grouped = [findings.clusters_of(job) for job in self.jobs]
        scene = _Scene(self, base, own, [ids for ids, _ in grouped])
        return Interference(
            metier=__version__,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            model=recipe.model.base,
            tasks=self.names,
            rows_train=tuple(len(job.splits.train) for job in self.jobs),
            rows_measured=tuple(len(job.test) for job in self.jobs),
            learning_rates=rates,
            joint_learning_rate=joint,
            seeds=seeds,
            confidence=recipe.evaluate.confidence,
            measure=self.primary,
            titles=tuple(scene.rows_of(base, task).title for task in range(len(self.jobs))),
            units=tuple(scene.rows_of(base, task).unit for task in range(len(self.jobs))),
            higher_is_better=tuple(scene.rows_of(base, task).higher_is_better for task in range(len(self.jobs))),
            base=scene.scores([base]),
            ways=tuple(scene.way(name, [ways[name] for ways in held]) for name in TITLES),
            notes=_notes(seeds, [f"joint training takes the learning rate {joint:g}"], *(said for _, said in grouped)),
        )

    def joint(self) -> Job:
        """The rows of all tasks together, learnt as the first recipe says."""
        return replace(
            self.jobs[0],
            train=Joined([job.train for job in self.jobs]),
            validation=Joined([job.validation for job in self.jobs]),
        )

    def _rate(self, folder: str, name: str, job: Job) -> float:
        """The learning rate of a job, searched on its validation rows as it is for the methods of one task."""
        given, _ = learning_rate(job)
        first = self.jobs[0].recipe
        trials, seed = first.compare.trials, first.train.seed
        if not trials:
            return given

        def made(rate: float, length: float) -> Job:
            recipe = made_of(job.recipe, len(job.train), rate=rate, seed=seed, length=length)
            return replace(job, recipe=recipe)

        def attempt(point: Point) -> Tried:
            place = f"search/{folder}/{point.stage}-{point.rate:g}"
            ended = self._trained(place, made(point.rate, SEARCH_SHARE))
            log.note(f"{name}: learning rate {point.rate:g} ({point.stage}): {told(ended)}")
            return Tried(point.rate, point.stage, ended.loss_under(None), ended.is_above_base(None))

        def whole(rate: float) -> float:
            whole_job = made(rate, 1.0)
            ended = self._trained(_place(folder, whole_job), whole_job, keeps=True)
            log.note(f"{name}: learning rate {rate:g} (whole training): {told(ended)}")
            return ended.loss_under(None)

        most = planning.highest_rate(job.recipe.method, head=job.head, parameters=job.parameters)
        tried = search.look(given, attempt, fine=trials > CHECKED, most=most)
        best = search.best_of(tried, where=name, hint="look at the rows with `metier check`").rate
        if trials > CHECKED:
            best = search.settled(tried, best, whole)
        log.note(f"{name}: learning rate {best:g} is chosen")
        return best

    def learn(self, name: str, job: Job, *, start: Path | None = None) -> Path:
        """An adapter, trained on a job, from another one's weights where one is given; found where it was made.

        Raises:
            DivergedError: If training ends without a number.
        """
        if self._trained(name, job, start=start, keeps=True).diverged:
            raise DivergedError(f"{name} diverged", where="train.learning_rate", hint="set a lower one in the recipe")
        return self.folder.path / "trials" / name

    def _trained(self, name: str, job: Job, *, start: Path | None = None, keeps: bool = False) -> Ended:
        """How a training ended, made or found; `keeps` leaves its adapter in its place."""
        place = self.folder.path / "trials" / name
        found = read(place / RESULT)
        if found is not None:
            return found
        base = self.base()
        with base.ready(job) as ready:
            if start is not None:
                training.checkpoint.load_weights(ready.adapted.module, start / "adapter" / WEIGHTS)
            rows = learnt(ready.job, ready.adapted.module)
            ended = train(place, ready, base, rows, job.plan(flops_per_second=None), keeps=False)
            if keeps and not ended.diverged:
                adapt.save_adapter(ready.adapted.module, place / "adapter")
                models.write_tensors(adapt.moving_weights(ready.adapted.module), place / "adapter" / WEIGHTS)
        write_json(place / RESULT, ended.model_dump())
        tidy(place)
        return ended

    def with_adapters(self, places: Sequence[Path], use: Callable[[nn.Module], T]) -> T:
        """What comes of the base with these adapters on it; afterwards it is the base again."""
        folders = {f"task_{i}": place / "adapter" for i, place in enumerate(places)}
        wrapped: Any = adapt.load_adapters(self.base().model.module, folders)
        try:
            self.base().precision.follow(wrapped)
            return use(wrapped)
        finally:
            wrapped.unload()

    def measured(self, name: str, network: Callable[[], nn.Module]) -> State:
        """Every task's figures, measured once for each state of the network."""
        places = [self.folder.path / "trials" / "measured" / name / str(number) for number in range(len(self.jobs))]
        kept = [Measured.load(place) for place in places]
        state = tuple(measured for measured in kept if measured is not None)
        if len(state) < len(kept):
            module = network()
            state = tuple(self._measure(job, module) for job in self.jobs)
            for measured, place in zip(state, places, strict=True):
                measured.save(place)
        log.note(f"{name}: {', '.join(self._told(task, measured) for task, measured in enumerate(state))}")
        return state

    def _measure(self, job: TextJob, module: nn.Module) -> Measured:
        suited = replace(job, task=job.task.suited(module), recipe=_without_baselines(job.recipe))
        # A state of its own: distances from the base are no matter here.
        return suited.measure(self.base().model, module, base=None)

    def _told(self, task: int, measured: Measured) -> str:
        name = self.primary[task]
        value = estimate(name, measured.rows[name], self.jobs[task].recipe.evaluate.confidence).value
        return f"{self.names[task]} {value:.4f}"


def _place(name: str, job: Job) -> str:
    """Where the whole training of a job lies, below the trials, by its seed and its rate."""
    train = job.recipe.train
    return f"seed-{train.seed}/{name}-{float(train.learning_rate):g}"


class _OneSeed:
    """Every way to hold the tasks, with one seed."""

    def __init__(self, several: _Several, seed: int, rates: Sequence[float], joint: float) -> None:
        """Take what is the same for every seed: the tasks, the rate of each, and that of joint training."""
        self._several, self._seed = several, seed
        # What was made with other rates is not this.
        made_with = "-".join(f"{rate:g}" for rate in (*rates, joint))
        self._folder = f"seed-{seed}/{sha256(made_with.encode()).hexdigest()[:8]}"
        self._jobs = tuple(
            replace(job, recipe=job.recipe.with_train(seed=seed, learning_rate=rate))
            for job, rate in zip(several.jobs, rates, strict=True)
        )
        whole = several.joint()
        self._together = replace(whole, recipe=whole.recipe.with_train(seed=seed, learning_rate=joint))

    def ways(self) -> dict[str, tuple[list[State], float | None]]:
        """The states of each way in order, and the seconds between two tasks in use where there are several."""
        alone = [self._several.learn(_place(f"task-{i}", job), job) for i, job in enumerate(self._jobs)]
        return {
            "switched": self._switched(alone),
            **{str(how): ([self._blended(alone, how)], None) for how in BLENDS},
            "joint": ([self._joint()], None),
            "sequence": (self._sequence(alone[0]), None),
        }

    def _measured(self, name: str, network: Callable[[], nn.Module]) -> State:
        return self._several.measured(f"{self._folder}/{name}", network)

    def _switched(self, places: Sequence[Path]) -> tuple[list[State], float]:
        """Each adapter on every task, and how long it takes to put another one to use."""

        def use(module: nn.Module) -> tuple[list[State], float]:
            states = []
            for i in range(len(places)):
                adapt.switch(module, f"task_{i}")
                states.append(self._measured(f"switched-{i}", lambda: module))
            began = time.perf_counter()
            for i in range(len(places)):
                adapt.switch(module, f"task_{i}")
            return states, (time.perf_counter() - began) / len(places)

        return self._several.with_adapters(places, use)

    def _blended(self, places: Sequence[Path], how: Blend) -> State:
        """All adapters made into one."""

        def use(module: nn.Module) -> State:
            def blended() -> nn.Module:
                seed_everything(derive(self._seed, "blend", how))
                adapt.blend(module, [f"task_{i}" for i in range(len(places))], how)
                return module

            return self._measured(how, blended)

        return self._several.with_adapters(places, use)

    def _joint(self) -> State:
        """One adapter on the rows of all tasks together."""
        return self._alone(self._several.learn(_place("joint", self._together), self._together), "joint")

    def _sequence(self, first: Path) -> list[State]:
        """One adapter on one task after the other."""
        states, place = [], first
        for number, job in enumerate(self._jobs):
            if number:
                place = self._several.learn(f"{self._folder}/sequence-{number}", job, start=place)
            states.append(self._alone(place, f"sequence-{number}"))
        return states

    def _alone(self, place: Path, name: str) -> State:
        """One adapter on every task."""
        return self._several.with_adapters([place], lambda module: self._measured(name, lambda: module))


@dataclass(frozen=True)
class _Scene:
    """What every way is judged by.

    Attributes:
        several: The tasks.
        base: The untuned model.
        own: For each task, its own adapter with every seed.
        clusters: For each task, which test rows were drawn together; None where each stands for itself.
    """

    several: _Several
    base: State
    own: Sequence[Sequence[State]]
    clusters: Sequence[tuple[str, ...] | None]

    def rows_of(self, state: State, task: int) -> Rows:
        """A state's rows of a task's primary measure."""
        return state[task].rows[self.several.primary[task]]

    def scores(self, states: Sequence[State]) -> tuple[Estimate, ...]:
        """One state, with every seed, on every task."""
        return tuple(self._score(task, states) for task in range(len(self.several.names)))

    def _score(self, task: int, states: Sequence[State]) -> Estimate:
        """The same on one task."""
        rows = [self.rows_of(state, task) for state in states]
        return evaluation.over_seeds(self.several.primary[task], rows, self._confidence(task), self.clusters[task])

    def way(self, name: str, seeds: Sequence[tuple[list[State], float | None]]) -> Way:
        """A way with every seed: what its states score, what it forgot, and whether one adapter each is better."""
        steps = list(zip(*(states for states, _ in seeds), strict=True))
        scores = [self.scores(states) for states in steps]
        times = [seconds for _, seconds in seeds if seconds is not None]
        apart = name == "switched"
        tasks = range(len(self.several.names))
        return Way(
            name=name,
            title=TITLES[name],
            scores=tuple(scores),
            forgotten=tuple(self._lost(task, scores) if name == "sequence" else 0.0 for task in tasks),
            beside_own=() if apart else tuple(self._beside_own(task, name, steps[-1]) for task in tasks),
            seconds_to_switch=fmean(times) if times else None,
        )

    def _lost(self, task: int, scores: Sequence[Sequence[Estimate]]) -> float:
        fell = scores[task][task].value - scores[-1][task].value
        return fell if self.rows_of(self.base, task).higher_is_better else -fell

    def _beside_own(self, task: int, name: str, states: Sequence[State]) -> Pair | None:
        primary, recipe = self.several.primary[task], self.several.jobs[task].recipe
        before = self.rows_of(self.base, task)
        value = self._score(task, [self.base]).value
        return evaluation.pair(
            primary,
            (self.several.names[task], [self.rows_of(state, task) for state in self.own[task]]),
            (name, [self.rows_of(state, task) for state in states]),
            primary=True,
            delta=evaluation.usual_delta(before, value, recipe.compare.delta),
            confidence=self._confidence(task),
            clusters=self.clusters[task],
        )

    def _confidence(self, task: int) -> float:
        return self.several.jobs[task].recipe.evaluate.confidence


def _notes(seeds: Sequence[int], *said: Sequence[str]) -> tuple[str, ...]:
    alone = "one seed: a difference between two ways may be chance of training" if len(seeds) == 1 else ""
    return tuple(dict.fromkeys(note for note in (alone, *(one for some in said for one in some)) if note))


def _without_baselines(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"baselines": False})})
