"""The story: recipe -> plan -> data -> model -> adapt -> train -> evaluate -> report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import adapt, evaluation, models, report, tasks, training
from metier.core import InterruptedRunError, commits, files, log
from metier.core.evidence import Cost, Evidence, Setting
from metier.core.files import cache_root, size_bytes, write_json
from metier.core.meter import Meter
from metier.core.version import __version__
from metier.recipe import LoRAMethod, Recipe, dump
from metier.run import environment, guards, strength
from metier.run.folder import RunFolder, enter, points, settings, write_facts
from metier.run.foresee import fast, foresee, learning, settle
from metier.run.guards import Learnt
from metier.run.job import Job, choose_device, learning_rate, make_ready, say
from metier.run.lock import claim
from metier.run.preparation import prepare
from metier.run.strength import Dial

if TYPE_CHECKING:
    import torch
    from torch import nn

    from metier.adapt import Adapted
    from metier.core.evidence import Baseline, Strength
    from metier.evaluation import Measured
    from metier.models import Model
    from metier.planning import MethodPlan, Plan


@dataclass(frozen=True)
class Setup:
    """What the middle of the story works with."""

    job: Job
    folder: RunFolder
    model: Model
    precision: training.Precision
    learning_rate: float
    reason: str
    plan: Plan

    @property
    def planned(self) -> MethodPlan | None:
        """The plan of the recipe's method."""
        return self.plan.method(self.job.recipe.method.kind)


def run(recipe: Recipe, *, given: str | None = None, command: str = "metier train job.yaml") -> RunFolder:
    """Fine-tune, measure before and after, write the report; goes on where an earlier call was interrupted.

    Args:
        recipe: The job.
        given: The recipe's text as the user wrote it, kept beside the resolved one.
        command: What to type to get the same, for the report.

    Raises:
        MetierError: See the error tree; nothing expensive has begun when the recipe or the rows are at fault.
    """
    folder = RunFolder(Path(recipe.export.folder))
    meter = Meter()
    with meter.phase("read"):
        job = prepare(recipe)
    with claim(folder.lock) as left, _told_how_to_go_on(folder):
        job = settle(job, folder)
        enter(folder, job.recipe, given)
        if files.clean(folder.path) or left:
            log.note("an earlier process was ended while it wrote here; what it left unfinished is removed")
        if folder.is_finished():
            _drop_checkpoints(folder)
            log.note(f"this run is finished: {folder.path / 'report.html'}")
            return folder
        say(job)
        plan = foresee(job)
        with meter.phase("load"):
            setup = _set_up(job, folder, plan)
        _tell_from(setup, meter, command)
    return folder


def _tell_from(setup: Setup, meter: Meter, command: str) -> None:
    """The story from the loaded model on."""
    job, origin = setup.job, _origin(setup)
    training.checkpoint.check_origin(setup.folder.checkpoints, origin)
    with meter.phase("measure before"):
        before = measure_base(job, setup.model)
    with meter.phase("train"):
        fit = _fit(setup)
        adapted = _adapt(setup, fit.said)
        # What is dropped in training is known only now.
        task = job.task.suited(adapted.module)
        dial = _dial(setup, adapted, task, before)
        learnt = _learnt(setup, adapted, task)
        outcome = _train(setup, adapted, task, learnt, origin, keep_start=bool(fit.said))
        strengths = _keep_floor(setup, dial, outcome, fitted=bool(fit.said))
    with meter.phase("measure after"):
        after = job.measure(setup.model, adapted.module, base=before)
    with meter.phase("save"):
        _save(setup, adapted, fit.tensors)
    evidence = _evidence(setup, adapted, outcome, before, after, meter, command, fit.alone, strengths, learnt)
    _report(setup, evidence)
    _finish(setup, adapted, strengths)


@contextmanager
def _told_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Whoever stops a run outside of its training is told what is saved."""
    try:
        yield
    except KeyboardInterrupt as error:
        saved = next(iter(points(folder, verified=False)), None)
        what = f"saved is step {saved.step} of {saved.total}" if saved else "no step is saved yet"
        hint = "the same command goes on from there" if saved else "the same command begins anew"
        raise InterruptedRunError(f"stopped at once; {what}", where=str(folder.path), hint=hint) from error


def _origin(setup: Setup) -> training.Origin:
    """What the run is made of: what must be the same when it goes on, and what may change its bits."""
    job, splits, lineage = setup.job, setup.job.splits, setup.model.lineage
    rows = ", ".join(f"{len(getattr(splits, name)):,} {name}" for name in ("train", "validation", "test"))
    bound = {
        **settings(job.recipe),
        "the base": f"{lineage.source} (weights {lineage.fingerprint[:12]})",
        "the rows": f"{rows} rows (content {splits.fingerprint[:12]})",
        **{name: _digest(value)[:12] for name, value in job.identity(setup.model).items()},
    }
    return training.Origin(bound, {"metier": __version__, **environment.conditions()})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def measure_base(job: Job, model: Model) -> Measured:
    """The base's figures; taken from the cache where the same base was measured on the same rows by the same code."""
    weight = next(model.module.parameters())
    key = {
        "base": model.lineage.fingerprint,
        "rows": job.splits.fingerprint,
        "data": job.recipe.data.model_dump(mode="json"),
        "task": job.recipe.task.model_dump(mode="json"),
        "evaluate": job.recipe.evaluate.model_dump(mode="json"),
        "seed": job.recipe.train.seed if model.new else None,
        "source": environment.source_digest(),
        "arithmetic": f"{weight.dtype} on {weight.device.type}, attention {job.recipe.model.attention}",
        **job.identity(model),
    }
    kept = cache_root() / "measured" / _digest(key)[:32]
    found = evaluation.Measured.load(kept)
    if found is not None:
        log.note("the base was measured before; its figures are taken from the cache", cache=str(kept))
        return found
    log.note(f"measuring the base on {len(job.test)} test rows")
    measured = job.measure(model, model.module, base=None)
    measured.save(kept)
    return measured


def _set_up(job: Job, folder: RunFolder, plan: Plan) -> Setup:
    recipe = job.recipe
    device = choose_device(recipe)
    if recipe.train.compile:
        training.check_compiler(device)
    precision = training.choose(recipe.train, device)
    if precision.name == "bf16":
        log.note(training.PURE_BF16_NOTE)
    model = job.load()
    precision.place(model.module)
    job = replace(job, task=job.task.suited(model.module))
    rate, reason = learning_rate(job)
    return Setup(job, folder, model, precision, rate, reason, plan)


@dataclass(frozen=True)
class Fit:
    """What was fitted in closed form before tuning.

    Attributes:
        said: What was done, as sentences; empty where nothing was.
        tensors: What it changed.
        alone: What it reaches by itself.
    """

    said: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    alone: tuple[Baseline, ...]


def _fit(setup: Setup) -> Fit:
    module = setup.model.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()} if setup.job.fits else {}
    began = time.perf_counter()
    said = setup.job.calibrate(setup.model)
    if not said:
        return Fit((), {}, ())
    alone = setup.job.fitted_alone(module, time.perf_counter() - began)
    return Fit(said, models.changed(before, module), alone)


def _adapt(setup: Setup, fitted: Sequence[str]) -> Adapted:
    made = make_ready(setup.job, setup.model, setup.precision)
    share = made.moved / made.total
    log.note(
        f"{made.method}: {made.moved:,} of {made.total:,} parameters move ({share:.2%})",
        moved=made.moved,
        total=made.total,
    )
    for pattern, tensors, count in made.patterns()[:12]:
        log.note(f"  {pattern}  x{tensors}  {count:,}")
    for text in (*fitted, *made.notes):
        log.note(text)
    return replace(made, notes=(*fitted, *made.notes))


def _learnt(setup: Setup, adapted: Adapted, task: tasks.Task[Any]) -> Learnt:
    """What is learnt under the recipe's guards; the base is asked what they must know of it."""
    if setup.job.recipe.guards.on:
        log.note(f"guards against forgetting: {', '.join(setup.job.recipe.guards.on)}")
    found = guards.learnt(replace(setup.job, task=task), adapted.module)
    for text in found.notes:
        log.note(text)
    return found


def _train(
    setup: Setup,
    adapted: Adapted,
    task: tasks.Task[Any],
    learnt: Learnt,
    origin: training.Origin,
    *,
    keep_start: bool,
) -> training.Outcome:
    job, export = setup.job, setup.job.recipe.export
    log.note(f"learning rate {setup.learning_rate:g}: {setup.reason}")
    for text in tasks.reading(task, job.train, job.recipe.train):
        log.note(text)
    checkpointing = setup.planned is not None and setup.planned.checkpointing
    with (
        fast(job.recipe.train, adapted.module, checkpointing=checkpointing),
        _checkpointing(setup, adapted.module, wanted=checkpointing),
        learning(job, setup.plan, setup.folder.metrics),
    ):
        outcome = training.run(
            adapted.module,
            task,
            learnt.train,
            job.recipe.train,
            learning_rate=setup.learning_rate,
            adapters=isinstance(job.recipe.method, LoRAMethod),
            precision=setup.precision,
            validate=partial(tasks.mean_loss, task, adapted.module, job.validation),
            places=training.Places(
                metrics=setup.folder.metrics,
                checkpoints=setup.folder.checkpoints,
                keep=export.checkpoints,
                minutes=export.checkpoint_minutes,
            ),
            origin=origin,
            keep_start=keep_start,
            pull=guards.pull(job, setup.model, adapted.module),
        )
    log.note(
        f"validation loss {outcome.first_loss:.4f} -> {outcome.best_loss:.4f} at step {outcome.best_step} of "
        f"{outcome.steps}{' (stopped early)' if outcome.stopped_early else ''}"
    )
    return outcome


def _dial(setup: Setup, adapted: Adapted, task: tasks.Task[Any], before: Measured) -> Dial | None:
    """What keeps the start of the network, where a floor is set."""
    job, module = setup.job, adapted.module
    if job.recipe.train.retain is None:
        return None
    dial = Dial(
        module=module,
        new=setup.model.new,
        start=setup.folder.checkpoints / "start.safetensors",
        end=setup.folder.checkpoints / "end.safetensors",
        validate=partial(tasks.mean_loss, task, module, job.validation),
        kept=job.keeping(setup.model, module, before),
    )
    dial.begin()
    return dial


def _keep_floor(setup: Setup, dial: Dial | None, outcome: training.Outcome, *, fitted: bool) -> tuple[Strength, ...]:
    """Use so much of the update as the floor allows."""
    floor = setup.job.recipe.train.retain
    if dial is None or floor is None:
        return ()
    dial.stop()
    path = dial.hold(outcome.first_loss, floor, fitted=fitted)
    log.note(strength.said(path, floor))
    return path


@contextmanager
def _checkpointing(setup: Setup, module: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Compute activations again in the backward pass where recipe or memory ask for it, and say so."""
    with training.recomputing(module, wanted=wanted) as does:
        if does:
            log.note(f"activations are computed again in the backward pass{_peaks(setup.planned)}")
        elif wanted:
            log.note("this network cannot compute its activations again: all are kept")
        yield


def _peaks(planned: MethodPlan | None) -> str:
    if planned is None or planned.kept_bytes is None or planned.checkpointed_bytes is None:
        return ""
    return f": about {planned.checkpointed_bytes / 1e9:.1f} GB instead of {planned.kept_bytes / 1e9:.1f} GB"


def _save(setup: Setup, adapted: Adapted, fitted: Mapping[str, torch.Tensor]) -> None:
    """Write the result beside its place, and put it there once it is whole and durable."""
    with files.staged_folder(setup.folder.path) as staged:
        _save_into(RunFolder(staged), setup, adapted, fitted)


def _save_into(folder: RunFolder, setup: Setup, adapted: Adapted, fitted: Mapping[str, torch.Tensor]) -> None:
    if isinstance(setup.job.recipe.method, LoRAMethod):
        if fitted:
            models.write_tensors(fitted, folder.fitted)
        adapt.save_adapter(adapted.module, folder.adapter)
        if setup.model.tokenizer is not None:
            models.save_tokenizer(setup.model, folder.path)
        if setup.job.recipe.export.merge:
            _save_whole(setup, adapt.merged(adapted.module), folder.path / "merged")
    else:
        _save_whole(setup, setup.job.whole(adapted.module), folder.path)


def _save_whole(setup: Setup, module: nn.Module, folder: Path) -> None:
    recipe = setup.job.recipe
    models.save(setup.model.with_module(module), folder, recipe.model)
    if recipe.export.original and isinstance(module, models.ScTranslator):
        models.export_original(module, folder / "original.pt")


def _evidence(
    setup: Setup,
    adapted: Adapted,
    outcome: training.Outcome,
    before: Measured,
    after: Measured,
    meter: Meter,
    command: str,
    alone: Sequence[Baseline],
    strengths: tuple[Strength, ...],
    learnt: Learnt,
) -> Evidence:
    job, recipe = setup.job, setup.job.recipe
    confidence = recipe.evaluate.confidence
    measures = evaluation.compare(before, after, confidence)
    primary = job.primary(after)
    cost = Cost(
        phases=tuple(meter.phases),
        tokens_per_second=outcome.tokens_per_second,
        steps=outcome.steps,
        best_step=outcome.best_step,
        parameters_moved=adapted.moved,
        parameters_total=adapted.total,
        bytes_on_disk=_result_bytes(setup.folder),
    )
    return Evidence(
        metier=__version__,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        setting=_setting(setup, adapted),
        verdict=report.verdict(
            measures,
            (*before.baselines, *alone),
            cost,
            primary,
            confidence=confidence,
            voice=report.Voice(recipe.export.language),
        ),
        primary=primary,
        measures=measures,
        baselines=(*before.baselines, *alone),
        cost=cost,
        answers=job.answers(before, after, primary),
        breakdowns=job.breakdowns(after),
        scatters=job.scatters(after),
        floor=recipe.train.retain,
        strengths=strengths,
        masked=learnt.masked,
        notes=(
            *job.notes,
            *adapted.notes,
            *learnt.notes,
            *before.notes,
            *after.notes,
            *_doubts(outcome),
            *_floor(recipe, strengths),
        ),
    )


def _setting(setup: Setup, adapted: Adapted) -> Setting:
    job, recipe = setup.job, setup.job.recipe
    return Setting(
        model=recipe.model.base,
        model_fingerprint=setup.model.lineage.fingerprint,
        task=recipe.task.kind,
        method=adapted.method,
        learning_rate=setup.learning_rate,
        learning_rate_reason=setup.reason,
        data_format=job.splits.format,
        rows_train=len(job.splits.train),
        rows_validation=len(job.splits.validation),
        rows_test=len(job.splits.test),
        rows_measured=len(job.test),
        data_fingerprint=job.splits.fingerprint,
        seed=recipe.train.seed,
        confidence=recipe.evaluate.confidence,
    )


def _doubts(outcome: training.Outcome) -> list[str]:
    doubts = []
    if outcome.best_step == 0:
        doubts.append(
            "no step of tuning was better on validation than what had been fitted in closed form: that is kept"
        )
    elif outcome.best_loss >= outcome.first_loss:
        doubts.append("the validation loss never fell below the base's: tuning taught nothing that validation shows")
    if outcome.steps < 100:
        doubts.append(
            f"only {outcome.steps} optimizer steps were taken; with fewer than 100, results move with the seed"
        )
    return doubts


def _floor(recipe: Recipe, strengths: Sequence[Strength]) -> list[str]:
    floor = recipe.train.retain
    return [] if floor is None else [strength.said(strengths, floor)]


def _result_bytes(folder: RunFolder) -> int:
    if folder.adapter.exists():
        return size_bytes(folder.adapter) + (folder.fitted.stat().st_size if folder.fitted.exists() else 0)
    return sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))


def _report(setup: Setup, evidence: Evidence) -> None:
    recipe = setup.job.recipe
    surroundings = environment.describe()
    write_json(setup.folder.path / "env.json", surroundings)
    path = report.write(
        setup.folder.path,
        evidence,
        curves=training.read_metrics(setup.folder.metrics),
        environment=surroundings,
        recipe_yaml=dump(recipe),
        language=recipe.export.language,
        license=recipe.export.license,
    )
    log.note(f"report: {path}")


def _finish(setup: Setup, adapted: Adapted, strengths: Sequence[Strength]) -> None:
    lineage = setup.model.lineage
    facts: Mapping[str, Any] = {
        "metier": __version__,
        "base": lineage.source,
        "base_fingerprint": lineage.fingerprint,
        "head": setup.job.head,
        "labels": list(setup.job.labels),
        "method": setup.job.recipe.method.kind,
        "parameters_moved": adapted.moved,
        **({"strength": strength.chosen(strengths).share} if strengths else {}),
        **setup.job.facts(),
    }
    write_facts(setup.folder, facts)
    _drop_checkpoints(setup.folder)


def _drop_checkpoints(folder: RunFolder) -> None:
    """The result is whole and saved: checkpoints have served."""
    if folder.checkpoints.exists():
        commits.drop(folder.checkpoints)
