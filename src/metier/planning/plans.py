"""The plan of a run: for each method what moves, what it needs and how long it takes; and which one to take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from metier.core import RecipeError, heap
from metier.core.evidence import Value
from metier.planning import memory as bytes_of
from metier.planning.advice import Case, Kind, advise
from metier.planning.budget import Budget, Reading, Steps, chosen, least_kept
from metier.planning.machine import Machine, this_machine
from metier.planning.memory import Memory, Moving, Numbers, Work
from metier.recipe import Adam, FreezeMethod, LoRAMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.models.model import Head
    from metier.models.shape import LinearShape, Shape
    from metier.recipe import Recipe, TrainSection
    from metier.recipe.train import PrecisionName

USABLE = 0.92
"""Share of the free memory that a run may plan to use. Judgement."""
UTILISATION = 0.4
"""Share of a matrix product's speed that a training step reaches. Measured with SmolLM2-135M on one CPU thread: 0.28 to
0.35 by common trainers, 0.49 to 0.55 by a lean loop."""
QLORA_SLOWDOWN = 1.5
"""QLoRA's time over LoRA's: 1.2 to 2, the middle. Source: LitGPT's config_hub/finetune/README.md."""


class MethodPlan(Value):
    """What one method would take."""

    kind: Kind
    """Which method."""
    title: str
    """One line for people, such as "LoRA, rank 16, every linear layer but the head"."""
    parameters_moved: int
    """Numbers that training changes."""
    share_moved: float
    """The same as a share of all numbers, new ones included."""
    peak_bytes: int
    """Highest memory in use."""
    memory: Memory
    """What the peak consists of, by formula."""
    fits: bool | None
    """Whether the peak stays within the usable memory; None where the machine does not say."""
    flops: float
    """Floating-point operations of the whole training, evaluation not included."""
    seconds: float | None
    """Training time, evaluation not included; None without a figure for the machine's speed."""
    bytes_on_disk: int
    """What must be stored to use the result, without the base for an adapter."""
    budget: Budget
    """Most tokens of a micro-batch: as the recipe says, or chosen for this method."""
    micro_batch_tokens: int
    """Tokens of the largest micro-batch under that budget, padding included; a longer row stands alone."""
    checkpointing: bool = False
    """Whether the run would compute activations again in the backward pass, see `train.activation_checkpointing`."""
    kept_bytes: int | None = None
    """Peak with all activations kept, by formula; None where no formula knows the network."""
    checkpointed_bytes: int | None = None
    """Peak with activations computed again, by formula; None where no formula knows the network."""
    basis: Literal["formula", "probe", "measured"] = "formula"
    """Whether peak and time are estimates by formula, were measured by a probe now, or by an earlier run or probe."""
    measured_on: str | None = None
    """The day of the earlier run or probe, as YYYY-MM-DD."""


class Plan(Value):
    """What a run would take, by method, before anything is loaded."""

    machine: Machine
    """Where it would run."""
    precision: Literal["fp32", "mixed", "bf16"]
    """Number format of the methods but QLoRA."""
    rows: int
    """Training rows."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens read in the whole training, without padding."""
    micro_batch_tokens: int
    """Tokens of the largest micro-batch with the recipe's method, padding included."""
    budget: Budget
    """The token budget of the recipe's method, and why."""
    methods: tuple[MethodPlan, ...]
    """full, lora, freeze, qlora, where they exist for this model."""
    recommended: Kind | None
    """The method to take; None where none fits."""
    recommendation: str
    """Why, in two or three sentences."""
    notes: tuple[str, ...]
    """What the figures do not know."""

    def method(self, kind: Kind) -> MethodPlan | None:
        """The plan of one method; None where it does not exist for this model."""
        return next((method for method in self.methods if method.kind == kind), None)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A method made ready to be counted."""

    kind: Kind
    title: str
    moving: Moving
    numbers: Numbers
    trains_head: bool


@dataclass(frozen=True, slots=True)
class _Scene:
    """What is the same for every method."""

    shape: Shape
    machine: Machine
    work: Work
    tokens: int
    achieved: float | None
    section: TrainSection
    steps: Steps
    longest: int
    mean_step: float

    def work_on(self, tokens: int, *, checkpointing: bool) -> Work:
        """A pass over so many tokens."""
        accumulates = self.mean_step > tokens
        return replace(self.work, tokens=tokens, checkpointing=checkpointing, accumulates=accumulates)


def plan(
    shape: Shape,
    recipe: Recipe,
    *,
    row_tokens: Sequence[int],
    head: Head,
    supervised_share: float = 1.0,
    reading: Steps | None = None,
    machine: Machine | None = None,
    flops_per_second: float | None = None,
) -> Plan:
    """Count what the recipe would take with each method.

    Args:
        shape: Sizes of the model.
        recipe: The job; its LoRA and freeze settings are used where it has them, the defaults elsewhere.
        row_tokens: Tokens of each training row; at least one row.
        head: What the network puts out.
        supervised_share: Share of the tokens that are learnt; the head is computed for these alone.
        reading: The steps, where the caller has cut their batches; else a budget is taken to be filled, by rows alone.
        machine: Where it would run; None looks at this one.
        flops_per_second: Speed of a matrix product, see `measure_flops_per_second`; None leaves out the times.

    Raises:
        RecipeError: If a LoRA target of the recipe names no layer of the model.
    """
    machine = machine or this_machine(recipe.model.device)
    precision = recipe.train.precision_on(bf16_gpu=machine.bf16_gpu)
    steps = recipe.train.total_steps(len(row_tokens))
    tokens = round(sum(row_tokens) * steps / recipe.train.steps_per_epoch(len(row_tokens)))
    work = Work(
        tokens=0,
        logit_bytes=bytes_of.LOGIT_BYTES_FP32 if precision == "fp32" else bytes_of.LOGIT_BYTES_EAGER,
        supervised_share=supervised_share if head != "classifier" else 1 / max(row_tokens),
        early=recipe.train.optimizer.during_backward,
        dropout_tokens=_attended(row_tokens, packs=shape.packs) if machine.device == "cpu" else 0,
        lean=head == "causal",
    )
    scene = _Scene(
        shape=shape,
        machine=machine,
        work=work,
        tokens=tokens,
        achieved=flops_per_second * UTILISATION if flops_per_second else None,
        section=recipe.train,
        steps=reading or filled_steps(row_tokens, recipe.train),
        longest=max(row_tokens),
        mean_step=recipe.train.batch_size * sum(row_tokens) / len(row_tokens),
    )
    methods = tuple(_count(scene, candidate) for candidate in _candidates(shape, recipe, head, precision))
    case = Case(
        rows=len(row_tokens),
        learnt_tokens=round(sum(row_tokens) * supervised_share),
        raw_text=recipe.task.kind == "complete" and supervised_share > 0.99,
        head=head,
        fits={method.kind: method.fits for method in methods},
        full_is_easy=_share_of(methods[0].peak_bytes, machine) <= 0.8,
    )
    recommended, why = advise(shape, case)
    own = next((method for method in methods if method.kind == recipe.method.kind), methods[0])
    return Plan(
        machine=machine,
        precision=precision,
        rows=len(row_tokens),
        steps=steps,
        tokens=tokens,
        micro_batch_tokens=own.micro_batch_tokens,
        budget=own.budget,
        methods=methods,
        recommended=recommended,
        recommendation=why,
        notes=_notes(steps, flops_per_second, methods, own, recipe.train),
    )


def filled_steps(row_tokens: Sequence[int], section: TrainSection) -> Steps:
    """The steps of rows that nobody has cut: every budget is filled, and nothing is padded or shared."""
    longest = max(row_tokens)
    whole = min(section.batch_size, len(row_tokens)) * longest
    return Steps(whole, lambda budget: Reading(max(longest, min(budget, whole)), 1.0))


def _attended(row_tokens: Sequence[int], *, packs: bool) -> int:
    """How many tokens a token meets: in a pack those of its own row, else as many as the longest row has."""
    if not packs:
        return max(row_tokens)
    return round(sum(tokens * tokens for tokens in row_tokens) / sum(row_tokens))


def fits_in(peak_bytes: int, machine: Machine) -> bool | None:
    """Whether the peak stays within the usable share of the free memory; None where that is unknown."""
    return None if machine.memory_bytes is None else peak_bytes <= USABLE * machine.memory_bytes


def training_flops(
    shape: Shape, moving: Moving, *, head_share: float, trains_head: bool, checkpointing: bool = False
) -> float:
    """Floating-point operations of training, for each token.

    A forward pass takes 2 for each weight of a matrix, the gradient of its input 2 more, that of the weight 2 more: 6
    where a block moves, 4 where an adapter does (plus 6 for each of the adapter's numbers), 2 below the lowest block
    that moves. With checkpointing, the forward pass of every block that the backward pass needs counts twice. The head
    counts for `head_share` of the tokens. Attention itself is left out; it is small while rows are shorter than the
    model is wide.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    linear, scores = bytes_of.matrix_parameters(shape), shape.hidden * shape.vocabulary
    differentiated = linear * moving.blocks / shape.layers
    per_weight = (2.0 if moving.adapted else 4.0) + (2.0 if checkpointing else 0.0)
    trunk = 2.0 * linear + per_weight * differentiated + 6.0 * moving.new
    return trunk + (6.0 if trains_head else 4.0) * scores * head_share


def adapted_layers(shape: Shape, method: LoRAMethod) -> tuple[LinearShape, ...]:
    """Layers that get an adapter.

    Raises:
        RecipeError: If no layer has a name that ends in one of the targets.
    """
    if method.targets == "auto":
        return shape.linears
    ends = tuple(f".{target}" for target in method.targets)
    found = tuple(layer for layer in shape.linears if f".{layer.name}".endswith(ends))
    if not found:
        known = ", ".join(sorted({layer.name.rpartition(".")[2] for layer in shape.linears}))
        raise RecipeError(
            f"{', '.join(method.targets)} match no linear layer", where="method.targets", hint=f"Layers here: {known}"
        )
    return found


def adapter_parameters(layers: Sequence[LinearShape], method: LoRAMethod) -> int:
    """Numbers in the adapters: rank x (inputs + outputs) for each layer; DoRA adds one for each output."""
    size = sum(method.rank * (layer.inputs + layer.outputs) for layer in layers)
    return size + (sum(layer.outputs for layer in layers) if method.variant == "dora" else 0)


def _candidates(shape: Shape, recipe: Recipe, head: Head, precision: PrecisionName) -> list[_Candidate]:
    base = _with_optimizer(bytes_of.NUMBERS[precision], recipe)
    lora = recipe.method if isinstance(recipe.method, LoRAMethod) else LoRAMethod()
    freeze = recipe.method if isinstance(recipe.method, FreezeMethod) else FreezeMethod()
    blocks = min(freeze.blocks, shape.layers)
    layers = adapted_layers(shape, lora)
    new_head = shape.hidden * shape.vocabulary if head == "classifier" else 0
    new = adapter_parameters(layers, lora)
    adapters = Moving(new + new_head, shape.layers, new, layers)
    said = "every linear layer but the head" if lora.targets == "auto" else ", ".join(lora.targets)
    word = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[lora.variant]
    is_new = head == "classifier"
    # Where weights are pulled back, the values that they began with are held as well; adapters have none.
    pulled = base if recipe.guards.l2_sp is None else replace(base, optimizer=base.optimizer + base.other)
    found = [
        _Candidate("full", "full fine-tuning", Moving(shape.parameters, shape.layers), pulled, trains_head=True),
        _Candidate("lora", f"{word}, rank {lora.rank}, {said}", adapters, base, trains_head=is_new),
    ]
    top = _top_parameters(shape, blocks, head)
    if top:
        frozen = Moving(top, blocks)
        untied = is_new or not _is_tied(shape)
        title = f"last {blocks} of {shape.layers} blocks{' and the head' if untied else ''}"
        found.append(_Candidate("freeze", title, frozen, pulled, trains_head=untied))
    if head != "classifier":
        nf4 = _with_optimizer(bytes_of.NF4, recipe)
        found.append(_Candidate("qlora", f"QLoRA (nf4), rank {lora.rank}, {said}", adapters, nf4, trains_head=False))
    return found


def _with_optimizer(numbers: Numbers, recipe: Recipe) -> Numbers:
    optimizer = recipe.train.optimizer
    if optimizer.states == "int8":
        return replace(numbers, optimizer=bytes_of.EIGHT_BIT_STATES)
    # AMSGrad keeps the largest second moment as a third state.
    amsgrad = isinstance(optimizer, Adam) and optimizer.amsgrad
    return replace(numbers, optimizer=numbers.optimizer * 1.5) if amsgrad else numbers


def _top_parameters(shape: Shape, blocks: int, head: Head) -> int:
    tied = head != "classifier" and _is_tied(shape)
    scores = 0 if tied else shape.hidden * shape.vocabulary
    inside = max(0, shape.parameters - shape.embedding_parameters - scores)
    return scores + inside * blocks // shape.layers


def _is_tied(shape: Shape) -> bool:
    """Whether the head is the input embedding: then there is no room for it beside the blocks."""
    beside = shape.parameters - shape.embedding_parameters - bytes_of.matrix_parameters(shape)
    return beside < shape.hidden * shape.vocabulary


def _count(scene: _Scene, candidate: _Candidate) -> MethodPlan:
    shape, moving = scene.shape, candidate.moving
    budget = _budget(scene, candidate)
    read = scene.steps.read(budget.tokens)
    kept, again = (_memory(scene, candidate, read.largest, checkpointing=again) for again in (False, True))
    checkpointing = _checkpoints(kept, scene)
    memory = again if checkpointing else kept
    flops = (
        scene.tokens
        * read.share
        * training_flops(
            shape,
            moving,
            head_share=scene.work.supervised_share,
            trains_head=candidate.trains_head,
            checkpointing=checkpointing,
        )
    )
    seconds = None if scene.achieved is None else flops / scene.achieved
    if seconds is not None and candidate.kind == "qlora":
        seconds *= QLORA_SLOWDOWN
    stored = moving.parameters if moving.adapted else shape.parameters
    return MethodPlan(
        kind=candidate.kind,
        title=candidate.title,
        parameters_moved=moving.parameters,
        share_moved=moving.parameters / (shape.parameters + moving.new),
        peak_bytes=memory.peak,
        memory=memory,
        fits=fits_in(memory.peak, scene.machine),
        flops=flops,
        seconds=seconds,
        bytes_on_disk=round(stored * candidate.numbers.new),
        budget=budget,
        micro_batch_tokens=read.largest,
        checkpointing=checkpointing,
        kept_bytes=kept.peak,
        checkpointed_bytes=again.peak,
    )


def _budget(scene: _Scene, candidate: _Candidate) -> Budget:
    """The recipe's budget, else the fastest that fits; activations are kept where a useful budget allows it."""
    section = scene.section
    if section.micro_batch_tokens != "auto":
        return Budget(tokens=section.micro_batch_tokens, reason="set in the recipe")

    def fits(tokens: int, *, checkpointing: bool) -> bool:
        memory = _memory(scene, candidate, max(tokens, scene.longest), checkpointing=checkpointing)
        return fits_in(memory.peak, scene.machine) is not False

    ways = {"auto": (False, True), "on": (True,), "off": (False,)}[section.activation_checkpointing]
    device = scene.machine.device
    least = least_kept(scene.steps, device=device)
    again = next((way for way in ways if fits(least, checkpointing=way)), ways[-1])
    return chosen(scene.steps, device=device, fits=lambda tokens: fits(tokens, checkpointing=again))


def _memory(scene: _Scene, candidate: _Candidate, tokens: int, *, checkpointing: bool) -> Memory:
    work = replace(scene.work_on(tokens, checkpointing=checkpointing), head_moves=candidate.trains_head)
    if candidate.kind == "qlora":
        work = replace(work, logit_bytes=bytes_of.LOGIT_BYTES_EAGER)
    memory = bytes_of.peak_memory(scene.shape, candidate.moving, candidate.numbers, work)
    return with_overhead(memory, scene.machine, cut=work.accumulates)


def _checkpoints(kept: Memory, scene: _Scene) -> bool:
    """Whether activations are computed again: as the recipe says, or where keeping them does not fit."""
    if scene.section.activation_checkpointing == "auto":
        return fits_in(kept.peak, scene.machine) is False
    return scene.section.activation_checkpointing == "on"


def with_overhead(memory: Memory, machine: Machine, *, cut: bool) -> Memory:
    """The memory with what the process, the device and the allocator take beside it.

    Args:
        memory: What tensors take.
        machine: Where.
        cut: Whether a step has several micro-batches.
    """
    if machine.device == "cuda":
        overhead = bytes_of.GPU_CONTEXT_BYTES + bytes_of.GPU_SLACK * memory.peak
    else:
        overhead = bytes_of.CPU_OVERHEAD_BYTES + _heap_slack(cut=cut) * (memory.activations + memory.logits)
    return memory.model_copy(update={"overhead": round(overhead)})


def _heap_slack(*, cut: bool) -> float:
    """What the heap of this process holds beyond what is in use, as a share of what comes and goes."""
    if heap.is_dense():
        return bytes_of.CPU_HEAP_SLACK_DENSE
    return bytes_of.CPU_HEAP_SLACK_CUT if cut else bytes_of.CPU_HEAP_SLACK


def _share_of(peak_bytes: int, machine: Machine) -> float:
    return peak_bytes / machine.memory_bytes if machine.memory_bytes else 0.0


COMPILING_SECONDS = 300
"""Shorter training gains nothing from torch's compiler, which takes some minutes itself. Judgement."""


def _notes(
    steps: int, flops_per_second: float | None, methods: Sequence[MethodPlan], own: MethodPlan, section: TrainSection
) -> tuple[str, ...]:
    notes = ["memory is an estimate by formula, within 10 % for half of 58 published runs; a probe measures it"]
    if flops_per_second is None:
        notes.append("no times: the speed of this machine was not measured")
    else:
        notes.append(
            f"times are estimates: {UTILISATION:.0%} of the speed of a plain matrix product; without evaluation"
        )
    notes.append(_said_of_checkpointing(methods, section))
    notes.append(_said_of_compiling(own, section))
    if steps < 100:
        notes.append(f"{steps} optimizer steps are few: below 100 there are too few updates, 200 or more are better")
    if any(method.kind == "qlora" for method in methods):
        notes.append("QLoRA is shown for comparison: it needs a CUDA device and bitsandbytes")
    return tuple(notes)


def _said_of_compiling(own: MethodPlan, section: TrainSection) -> str:
    """Whether torch's compiler would pay; only a probe knows what it gives."""
    measures = "`--probe` with train.compile=true measures what it takes and gives"
    if section.compile:
        return f"train.compile is on, for some minutes before the first step; {measures}"
    if own.seconds is not None and own.seconds < COMPILING_SECONDS:
        return f"train.compile would not pay: it takes some minutes, and {own.kind} trains for {own.seconds:,.0f} s"
    return f"train.compile is off: our own modules already join what it would join; {measures}"


def _said_of_checkpointing(methods: Sequence[MethodPlan], section: TrainSection) -> str:
    """What computing activations again would take, for which methods the figures do so, and why."""
    peaks = ", ".join(f"{m.kind} {m.checkpointed_bytes / 1e9:,.1f} GB" for m in methods if m.checkpointed_bytes)
    doing = ", ".join(m.kind for m in methods if m.checkpointing)
    why = "all that is kept would not fit" if doing else "it is not needed to fit"
    if section.activation_checkpointing != "auto":
        why = f"train.activation_checkpointing is {section.activation_checkpointing}"
    return (
        f"with activation checkpointing, which takes about a third more time: {peaks}; "
        f"the figures above {f'are so for {doing}' if doing else 'do without it'}: {why}"
    )
