"""The Python API: the words of the command line, as functions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core.comparison import Comparison, Interference
from metier.core.evidence import Evidence
from metier.recipe import Recipe, files, parse
from metier.recipe import load as load_recipe

if TYPE_CHECKING:
    from metier.experiment import Outline
    from metier.planning import Plan
    from metier.run import Job, Specialist

JobLike = str | Path | Mapping[str, Any] | Recipe
"""A recipe file, a mapping with the same keys, or a Recipe."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        path: The run folder.
    """

    path: Path

    @property
    def evidence(self) -> Evidence:
        """Every measured number."""
        return Evidence.model_validate_json((self.path / "evidence.json").read_text("utf-8"))

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    def load(self) -> Specialist:
        """The tuned model, ready to use."""
        from metier import run

        return run.load(self.path)


@dataclass(frozen=True, slots=True)
class Compared:
    """A finished experiment.

    Attributes:
        path: Its folder.
    """

    path: Path

    @property
    def comparison(self) -> Comparison:
        """Everything it found."""
        return Comparison.model_validate_json((self.path / "comparison.json").read_text("utf-8"))

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "comparison.html"


def resolve(job: JobLike, *overrides: str) -> Recipe:
    """The recipe that is meant, checked.

    Raises:
        RecipeError: With every fault, each with its place.
    """
    if isinstance(job, Recipe):
        return parse(job.model_dump(mode="json"), overrides) if overrides else job
    return parse(job, overrides) if isinstance(job, Mapping) else load_recipe(job, overrides)


def train(job: JobLike, *overrides: str) -> Run:
    """Fine-tune, measure before and after, write the report; the same call resumes an interrupted run.

    Args:
        job: A recipe file, a mapping, or a Recipe.
        *overrides: Dotted, such as "train.learning_rate=2e-4".

    Raises:
        MetierError: See the error tree.
    """
    recipe = resolve(job, *overrides)
    from metier import run

    given = files.text_of(job) if isinstance(job, str | Path) else None
    name = str(job) if isinstance(job, str | Path) else "job.yaml"
    command = " ".join(["metier train", name, *overrides])
    return Run(run.run(recipe, given=given, command=command).path)


def check(job: JobLike, *overrides: str) -> Job:
    """Read and check the recipe, the model's configuration and every row; load no weights.

    Raises:
        MetierError: With every fault found.
    """
    recipe = resolve(job, *overrides)
    from metier import run

    return run.prepare(recipe)


def plan(job: JobLike, *overrides: str, probe: bool = False) -> Plan:
    """Parameters, memory and time for each method.

    Args:
        job: A recipe file, a mapping, or a Recipe.
        *overrides: Dotted.
        probe: Load the model and take a few steps to confirm memory and time.

    Raises:
        MetierError: See the error tree.
    """
    recipe = resolve(job, *overrides)
    from metier import run

    return run.plan_job(run.prepare(recipe), probe=probe)


def compare(
    job: JobLike,
    *overrides: str,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    data_curve: Sequence[float] | None = None,
) -> Compared:
    """Set several ways to tune beside each other: a learning rate searched for each, the same rows, order and seeds.

    The same call goes on where an earlier one was interrupted.

    Args:
        job: A recipe file, a mapping, or a Recipe.
        *overrides: Dotted.
        methods: Such as ["lora", "full", "lora:rank=8"]; None takes the recipe's `compare.methods`.
        seeds: Whole trainings of each; None takes the recipe's.
        budget: Time that all of it may take, such as "20min"; None takes the recipe's.
        data_curve: Shares of the training rows in percent; None takes the recipe's.

    Raises:
        MetierError: See the error tree; nothing is trained where recipe, rows or budget are at fault.
    """
    more = _compare_overrides(methods=methods, seeds=seeds, budget=budget, data_curve=data_curve)
    recipe = resolve(job, *overrides, *more)
    from metier import experiment

    given = files.text_of(job) if isinstance(job, str | Path) else None
    name = str(job) if isinstance(job, str | Path) else "job.yaml"
    command = " ".join(["metier compare", name, *(shlex.quote(word) for word in (*overrides, *more))])
    return Compared(experiment.compare(recipe, given=given, command=command).path)


@dataclass(frozen=True, slots=True)
class Several:
    """Several tasks on one base, measured.

    Attributes:
        path: The folder of it.
    """

    path: Path

    @property
    def interference(self) -> Interference:
        """Every way to hold the tasks, on every task."""
        return Interference.model_validate_json((self.path / "interference.json").read_text("utf-8"))

    @property
    def report(self) -> Path:
        """The page of it."""
        return self.path / "interference.html"


def compare_tasks(jobs: Sequence[str | Path], *overrides: str, seeds: int | None = None) -> Several:
    """Train one LoRA adapter for each task on one base, and measure every way to hold them all on every task.

    The ways: adapters switched without loading the base again, made into one (mean, TIES, DARE), joint training, and
    training in sequence. The same call goes on where an earlier one was interrupted.

    Args:
        jobs: Recipe files that share a base; tasks are called as the files are.
        *overrides: Dotted, for every recipe.
        seeds: Trainings of each adapter; None takes the first recipe's `compare.seeds`.

    Raises:
        MetierError: See the error tree; nothing is trained where the tasks do not share a base.
    """
    more = _compare_overrides(seeds=seeds)
    recipes = [resolve(job, *overrides, *more) for job in jobs]
    from metier import experiment

    names = [Path(job).stem for job in jobs]
    words = [*(str(job) for job in jobs), *(shlex.quote(word) for word in (*overrides, *more))]
    command = " ".join(["metier compare", *words])
    return Several(experiment.compare_tasks(recipes, names, given=files.text_of(jobs[0]), command=command).path)


def plan_comparison(
    job: JobLike,
    *overrides: str,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    data_curve: Sequence[float] | None = None,
) -> Outline:
    """What `compare` would do and take: trainings, time and memory of each method; the arguments are the same.

    Raises:
        MetierError: As `compare` before it trains anything.
    """
    more = _compare_overrides(methods=methods, seeds=seeds, budget=budget, data_curve=data_curve)
    recipe = resolve(job, *overrides, *more)
    from metier import experiment

    return experiment.plan(recipe)


def _compare_overrides(**given: Any) -> list[str]:
    """What was given, as overrides of the recipe's section."""
    return [f"compare.{key}={json.dumps(_plain(value))}" for key, value in given.items() if value is not None]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int) else list(value)


def load(folder: str | Path) -> Specialist:
    """A finished run as an object with `.chat()`, `.predict()` and `.evaluate()`.

    Raises:
        RecipeError: If the folder is no finished run.
        ModelError: If the base is not the one it was tuned on.
    """
    from metier import run

    return run.load(folder)


def init(model: str, data: str, folder: str = "runs/job") -> str:
    """A commented recipe for a model and a file of rows, whose run goes to `folder`.

    Raises:
        MetierError: If one of them cannot be read.
    """
    from metier import run

    return run.draft(model, data, folder)
