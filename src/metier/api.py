"""The Python API: the words of the command line, as functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core.evidence import Evidence
from metier.recipe import Recipe, files, parse
from metier.recipe import load as load_recipe

if TYPE_CHECKING:
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
