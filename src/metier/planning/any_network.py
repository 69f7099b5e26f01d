"""The plan for a network that is no transformer of text: what can be counted by looking at it, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metier.adapt import shape_of_linears
from metier.planning.machine import Machine, this_machine
from metier.planning.memory import CPU_OVERHEAD_BYTES, EIGHT_BIT_STATES, FP32, GPU_CONTEXT_BYTES, Memory
from metier.planning.plans import MethodPlan, Plan, adapter_parameters, fits_in, most_tokens
from metier.recipe import Adam, LoRAMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.models.shape import LinearShape
    from metier.planning.advice import Kind
    from metier.recipe import Recipe

FEW_ROWS = 1_000
"""Below so many rows an adapter is the safer first try. Judgement, until a comparison replaces it."""
NOTES = (
    "activations are not counted, for no formula knows this network: `--probe` measures memory and time of the "
    "recipe's method",
)


def plan_any(module: nn.Module, recipe: Recipe, *, sizes: Sequence[int], whole: Sequence[str]) -> Plan:
    """Count what each method moves, and the memory for weights, gradients and optimizer.

    Args:
        module: The network.
        recipe: The job.
        sizes: What each training row costs, in the unit of `train.micro_batch_tokens`.
        whole: Names of parameters that move with every method.

    Raises:
        RecipeError: If a LoRA target names no layer.
    """
    machine = this_machine(recipe.model.device)
    total = sum(parameter.numel() for parameter in module.parameters())
    always = sum(module.get_parameter(name).numel() for name in whole)
    lora = recipe.method if isinstance(recipe.method, LoRAMethod) else LoRAMethod()
    layers = shape_of_linears(module, lora.targets, without=whole)
    methods = [_method("full", "full fine-tuning", total, 0, total, recipe, machine)]
    if layers:
        methods.append(_lora(lora, layers, total, always, recipe, machine))
    steps, largest = recipe.train.total_steps(len(sizes)), most_tokens(sizes, recipe.train)
    few = len(sizes) < FEW_ROWS and len(methods) > 1
    kind: Kind = "lora" if few else "full"
    why = "few: LoRA is the safer first try" if few else "many for a network of this size: full fine-tuning is cheap"
    return Plan(
        machine=machine,
        precision=recipe.train.precision_on(bf16_gpu=machine.bf16_gpu),
        rows=len(sizes),
        steps=steps,
        tokens=round(sum(sizes) * steps / recipe.train.steps_per_epoch(len(sizes))),
        micro_batch_tokens=largest,
        methods=tuple(methods),
        recommended=kind,
        recommendation=f"{len(sizes):,} rows are {why}; where it matters, run both.",
        notes=NOTES,
    )


def _lora(
    lora: LoRAMethod, layers: Sequence[LinearShape], total: int, always: int, recipe: Recipe, machine: Machine
) -> MethodPlan:
    new = adapter_parameters(layers, lora)
    said = "every linear layer" if lora.targets == "auto" else ", ".join(lora.targets)
    return _method("lora", f"LoRA, rank {lora.rank}, {said}", new + always, new, total, recipe, machine)


def _method(kind: Kind, title: str, moved: int, new: int, total: int, recipe: Recipe, machine: Machine) -> MethodPlan:
    optimizer = recipe.train.optimizer
    states = FP32.optimizer * (1.5 if isinstance(optimizer, Adam) and optimizer.amsgrad else 1)
    if optimizer.states == "int8":
        states = EIGHT_BIT_STATES
    memory = Memory(
        weights=round(FP32.other * (total + new)),
        optimizer=round(states * moved),
        gradients=round(FP32.gradient * moved),
        activations=0,
        logits=0,
        overhead=GPU_CONTEXT_BYTES if machine.device == "cuda" else CPU_OVERHEAD_BYTES,
    )
    return MethodPlan(
        kind=kind,
        title=title,
        parameters_moved=moved,
        share_moved=moved / (total + new),
        peak_bytes=memory.peak,
        memory=memory,
        fits=fits_in(memory.peak, machine),
        flops=0.0,
        seconds=None,
        bytes_on_disk=round(FP32.new * (moved if kind == "lora" else total)),
        # What activations take is not known here, so that only the recipe itself can ask for it.
        checkpointing=recipe.train.activation_checkpointing == "on",
    )
