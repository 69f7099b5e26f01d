"""The experiment told: plan, base, a learning rate for each arm, whole trainings, parts of the rows, findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from metier import report
from metier.core import log
from metier.core.comparison import Comparison
from metier.core.version import __version__
from metier.experiment import budget, checks, findings, outline, search
from metier.experiment.arms import Arm, arms_of
from metier.experiment.findings import Found, Scene
from metier.experiment.folder import ExperimentFolder, folder_of
from metier.experiment.outline import Outline
from metier.experiment.work import Work
from metier.recipe import FreezeMethod, FullMethod, Recipe, Tuning
from metier.run import environment, prepare, say
from metier.run.folder import enter
from metier.run.foresee import settle
from metier.run.job import Job
from metier.run.lock import claim


def plan(recipe: Recipe) -> Outline:
    """What the experiment would do and take; nothing is loaded or written.

    Raises:
        MetierError: If recipe or rows are at fault, or the budget fits not even one arm.
    """
    job, arms = _checked(recipe)
    foreseen = outline.foresee(job, arms)
    asked, allowed = outline.wanted(job, arms), recipe.compare.budget_seconds
    return outline.outline(foreseen, arms, asked, budget.fit(asked, foreseen.prices, allowed), allowed)


def compare(recipe: Recipe, *, given: str | None = None, command: str = "metier compare job.yaml") -> ExperimentFolder:
    """Set every arm beside the base and beside each other; goes on where an earlier call was interrupted.

    Args:
        recipe: The job; its section `compare` says what is set beside each other.
        given: The recipe's text as the user wrote it.
        command: What to type to get the same, for the report.

    Raises:
        MetierError: See the error tree; nothing is trained when recipe, rows or budget are at fault.
    """
    folder = folder_of(recipe)
    job, arms = _checked(recipe)
    with claim(folder.lock):
        job = settle(job, folder)
        recipe = recipe.model_copy(update={"train": job.recipe.train})
        job = replace(job, recipe=recipe)
        enter(folder, recipe, given)
        say(job)
        work = Work(job, arms, folder)
        outline.say(work.outline())
        try:
            found = work.found()
            comparison = _comparison(work, found, command)
            path = report.write_experiment(
                folder.path, comparison, recipe.export.language, environment=environment.describe()
            )
            log.note(f"report: {path}")
        finally:
            work.close()
    return folder


def _checked(recipe: Recipe) -> tuple[Job, tuple[Arm, ...]]:
    """The job, for the method that takes most, and its arms; all is checked that can be before a weight is loaded."""
    arms = arms_of(recipe)
    # A base that is read for full fine-tuning serves every method; for some networks it is smaller.
    whole = next((arm.method for arm in arms if isinstance(arm.method, FullMethod)), recipe.method)
    # Each arm has rows and guards of its own.
    job = prepare(recipe.tuned(Tuning(method=whole)))
    checks.check_arms(job, arms)
    checks.check(job)
    return job, arms


def _comparison(work: Work, found: Sequence[Found], command: str) -> Comparison:
    job, recipe = work.job, work.job.recipe
    before = work.before()
    clusters, said = findings.clusters_of(job)
    confidence = recipe.evaluate.confidence
    scene = Scene(job, before, work.primary, confidence, recipe.compare.delta, clusters)
    curve = work.curve(found, scene)
    pairs, doubts = findings.pairs(found, scene)
    guards, unjudged = findings.guards(found, scene)
    base = work.base_facts()
    return Comparison(
        metier=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        model=recipe.model.base,
        model_fingerprint=base["fingerprint"],
        data_fingerprint=job.splits.fingerprint,
        task=recipe.task.kind,
        rows_train=len(job.splits.train),
        rows_validation=len(job.splits.validation),
        rows_measured=len(job.test),
        steps=work.foreseen.steps,
        batch_size=recipe.train.batch_size,
        precision=base["precision"],
        seeds=tuple(seed.seed for seed in found[0].seeds),
        primary=scene.primary,
        delta=_delta(found, scene),
        confidence=confidence,
        floor=recipe.train.retain,
        verdict=(),
        base={name: scene.estimate(name, [rows]) for name, rows in before.rows.items()},
        baselines=before.baselines,
        arms=tuple(findings.arm(one, scene) for one in found),
        pairs=pairs,
        curve=curve,
        guards=guards,
        told=findings.told(found, scene),
        budget_seconds=work.allowed,
        seconds=work.spent,
        shrunk=budget.left_out(work.asked, work.size),
        notes=(*job.notes, *before.notes, *said, *work.notes, *doubts, *unjudged, *_doubts(work, found)),
        **findings.described(found, before),  # type: ignore[arg-type]
    )


def _delta(found: Sequence[Found], scene: Scene) -> float:
    rows = next((m.rows[scene.primary] for one in found for m in one.alive.values()), None)
    return scene.delta if rows is None else findings.delta_of(scene.primary, rows, scene)


def _doubts(work: Work, found: Sequence[Found]) -> list[str]:
    said = []
    if work.foreseen.steps < 100:
        said.append(
            f"a training has only {work.foreseen.steps} optimizer steps; with fewer than 100, results move with "
            "the seed"
        )
    for one in found:
        said += [f"{one.way.name}: {text}" for text in one.seeds[0].ended.notes]
        lost = [str(seed.seed) for seed in one.seeds if seed.measured is None]
        if lost:
            said.append(f"{one.way.name}: seeds {', '.join(lost)} diverged and are left out of the figures")
        chosen = [next((s for s in seed.ended.strengths if s.chosen), None) for seed in one.seeds]
        shares = ", ".join("-" if one is None else f"{one.share:.0%}" for one in chosen)
        if any(chosen):
            said.append(f"{one.way.name}: to keep the floor, these shares of the update are used, by seed: {shares}")
        if one.tried and search.is_at_edge(one.tried):
            said.append(f"{one.way.name}: the best learning rate lies at the end of what was tried")
    rate = work.job.recipe.train.learning_rate
    kinds = {type(one.way.method) for one in found} - {FreezeMethod}
    if not work.size.trials and rate != "auto" and len(kinds) > 1:
        said.append("the same learning rate was set for different methods: what differs may be the rate alone")
    return said
