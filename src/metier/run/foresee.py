"""`metier plan`: what a checked job would take, by formula, and by a few real steps when asked."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from metier import adapt, planning, training
from metier.core import heap, log
from metier.core.meter import Meter, peak_memory_bytes
from metier.recipe import LoRAMethod
from metier.run.job import choose_device, learning_rate, make_ready

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from metier.planning import Plan
    from metier.planning.probing import Sample
    from metier.recipe import TrainSection
    from metier.run.folder import RunFolder
    from metier.run.job import Job


def plan_job(job: Job, *, probe: bool, flops_per_second: float | None = None) -> Plan:
    """The plan of a job.

    Args:
        job: Checked, its rows encoded.
        probe: Load the model and take a few steps with the recipe's method, whose figures are then measured.
        flops_per_second: Speed of the machine, for plans that are set beside each other; None measures it.

    Raises:
        MetierError: If the model cannot be loaded for the probe, or the method does not fit it.
    """
    recipe = job.recipe
    device = choose_device(recipe)
    plan = job.plan(flops_per_second=flops_per_second or planning.measure_flops_per_second(str(device)))
    setting = _setting(job, device)
    if not probe:
        return planning.informed(plan, setting)
    log.note(f"probing {recipe.method.kind} with a few real steps")
    small, large = min(plan.micro_batch_tokens // 2, 512), plan.micro_batch_tokens
    large = max(large, small + 1)
    method = plan.method(recipe.method.kind)
    # Where a step is cut, the gradients of one part are there while the next is read.
    parts = 2 if plan.tokens / plan.steps > 1.5 * large else 1
    bench = _Bench(job, device, parts=parts, checkpointing=method is not None and method.checkpointing)
    # Without compiling first, so that what it would give can be told.
    plain = bench.seconds((small, large)) if recipe.train.compile else []
    with bench.engine(recipe.train):
        measured = planning.probe(bench.step, small=small, large=large)
    if method is not None and planning.recall(setting, plan, method) is None:
        planning.remember(
            setting,
            plan,
            method,
            tokens=plan.tokens,
            peak_bytes=measured.peak_bytes(plan.micro_batch_tokens),
            seconds=measured.seconds(plan.tokens, steps=plan.steps),
        )
    plan = planning.confirm(planning.informed(plan, setting), recipe.method.kind, measured)
    if not plain:
        return plan
    return plan.model_copy(update={"notes": (*plan.notes, _said_of_compiling(plain[-1], bench.taken[-3:], large))})


def _said_of_compiling(plain: float, taken: Sequence[float], tokens: int) -> str:
    """What compiling took and what it gives, as measured: the first of two equal steps compiles."""
    cost, gain = max(0.0, taken[0] - taken[1]), plain - taken[-1]
    said = (
        f"compiling took {cost:.0f} s, and a step of {tokens:,} tokens takes {taken[-1]:.2f} s instead of {plain:.2f} s"
    )
    return (
        f"{said}: worth it from {cost / gain:,.0f} such steps on" if gain > 0 else f"{said}: leave train.compile false"
    )


@contextmanager
def fast(section: TrainSection, module: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Make a network's steps fast while the `with` runs: compiled blocks where asked for, else our own modules."""
    if section.compile and checkpointing:
        log.warn("train.compile: torch's compiler passes over blocks that are computed again, so nothing is compiled")
    if not section.compile or checkpointing:
        with adapt.lean(module):
            yield
        return
    with training.compiled(module) as count:
        if count:
            log.note(f"{count} blocks are compiled when they are first used; the first steps take longer")
        else:
            log.warn("train.compile: this network has no list of equal blocks, so nothing is compiled")
        yield


def settle(job: Job, folder: RunFolder) -> Job:
    """The job with its token budget as a number: the one that this run began with, else the one that the plan chooses.

    A run that goes on must cut its steps as before, whatever memory is free by now.
    """
    if job.recipe.train.micro_batch_tokens != "auto":
        return job
    if folder.resolved.exists():
        tokens = folder.recipe().train.token_budget
    else:
        budget = job.plan(flops_per_second=None).budget
        tokens = budget.tokens
        log.note(f"at most {tokens:,} tokens are read at once: {budget.reason}")
    return replace(job, recipe=job.recipe.with_train(micro_batch_tokens=tokens))


def foresee(job: Job) -> Plan:
    """What the run will take; tells the user before the work starts when memory will not do."""
    plan = planning.informed(job.plan(flops_per_second=None), _setting(job, choose_device(job.recipe)))
    method = plan.method(job.recipe.method.kind)
    if method is not None and method.fits is False and plan.machine.memory_bytes is not None:
        log.warn(
            f"this run may need {method.peak_bytes / 1e9:.1f} GB; {plan.machine.memory_bytes / 1e9:.1f} GB are free: "
            "lower train.micro_batch_tokens, or see `metier plan`"
        )
    return plan


@contextmanager
def learning(job: Job, plan: Plan, metrics: Path) -> Iterator[None]:
    """Remember for later plans what the steps that are taken inside the block took, however it ends.

    Args:
        job: What trains.
        plan: What was foreseen.
        metrics: The run's log of steps.
    """
    try:
        yield
    finally:
        steps = [line for line in training.read_metrics(metrics) if line["kind"] == "step"]
        # The first step also starts threads and takes memory from the system.
        steady, method = steps[1:], plan.method(job.recipe.method.kind)
        if steady and method is not None:
            peak = peak_memory_bytes()
            planning.remember(
                _setting(job, choose_device(job.recipe)),
                plan,
                method,
                tokens=sum(line["tokens"] for line in steady),
                # A GPU's figure is what tensors took, without what device and allocator take beside them.
                peak_bytes=peak + (method.memory.overhead if plan.machine.device == "cuda" else 0),
                seconds=sum(line["seconds"] for line in steady),
            )


def _setting(job: Job, device: torch.device) -> planning.Setting:
    recipe = job.recipe
    options = {
        "task": recipe.task.kind,
        "optimizer": recipe.train.optimizer.model_dump(mode="json"),
        "compile": recipe.train.compile,
        "attention": recipe.model.attention,
        **({"guards": list(recipe.guards.on)} if recipe.guards.on else {}),
        "dropout": recipe.method.dropout if isinstance(recipe.method, LoRAMethod) else 0,
    }
    return planning.Setting(job.network, str(device), options)


class _Bench:
    """The job's network, and real steps on it."""

    def __init__(self, job: Job, device: torch.device, *, parts: int, checkpointing: bool) -> None:
        """Load the network; steps will have so many equal parts."""
        recipe = job.recipe
        if recipe.train.compile:
            training.check_compiler(device)
        self.taken: list[float] = []
        self._section, self._parts, self._checkpointing = recipe.train, parts, checkpointing
        self._precision = training.choose(recipe.train, device)
        model = job.load()
        self._precision.place(model.module)
        self._module = make_ready(job, model, self._precision).module
        self._optimizer = training.build_optimizer(
            recipe.train.optimizer,
            self._module,
            learning_rate=learning_rate(job)[0],
            adapters=isinstance(recipe.method, LoRAMethod),
        )
        self._task = job.task.suited(self._module)
        self._train, self._sizes = job.train, job.sizes()
        self._longest_first = sorted(range(len(self._sizes)), key=lambda i: self._sizes[i], reverse=True)

    @contextmanager
    def engine(self, section: TrainSection) -> Iterator[None]:
        """The network as the run would train it."""
        recomputing = training.recomputing(self._module, wanted=self._checkpointing)
        with fast(section, self._module, checkpointing=self._checkpointing), recomputing, heap.kept():
            yield

    def seconds(self, sizes: Sequence[int]) -> list[float]:
        """Time of a step of each size without compiling."""
        with self.engine(self._section.model_copy(update={"compile": False})):
            return [self.step(tokens).seconds for tokens in sizes]

    def step(self, tokens: int) -> Sample:
        """Take one real step of about so many tokens."""
        task = self._task
        most = max(1, tokens // self._sizes[self._longest_first[0]])
        rows = [self._train[i] for i in self._longest_first[:most]]
        batch = task.collate(rows)
        meter = Meter()
        self._module.train()
        began = time.perf_counter()
        with meter.phase("probe"):
            training.train_step(
                self._module,
                task,
                [batch] * self._parts,
                self._optimizer,
                precision=self._precision,
                max_grad_norm=self._section.max_grad_norm,
                during_backward=self._section.optimizer.during_backward,
            )
        self.taken.append(time.perf_counter() - began)
        peak = meter.phases[0].peak_memory_bytes
        read = task.read(rows)
        return planning.Sample(tokens=read, peak_bytes=peak, seconds=self.taken[-1], parts=self._parts)
