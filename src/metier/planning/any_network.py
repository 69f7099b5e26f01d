"""The plan for a network that is no transformer of text: what can be counted by looking at it, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metier.adapt import shape_of_linears
from metier.planning.budget import Budget, Steps, whole_or_less
from metier.planning.machine import Machine, resident_bytes, this_machine
from metier.planning.memory import CPU_OVERHEAD_BYTES, EIGHT_BIT_STATES, FP32, Memory
from metier.planning.plans import MethodPlan, Plan, adapter_parameters, filled_steps, fits_in, with_overhead
from metier.recipe import Adam, LoRAMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from metier.planning.advice import Kind
    from metier.recipe import Recipe

FEW_ROWS = 1_000
"""Below so many rows an adapter is the safer first try. Judgement, until a comparison replaces it."""
NOTES = ("activations are counted on a few rows, as full fine-tuning keeps them; time a run or `--probe` tells",)
BEGINNING_BYTES = 100_000_000
"""What adapting, the optimizer's code and the first step bring into the process."""
LOOKED_AT = 4
"""Rows whose forward pass is counted."""


def saved_bytes(module: nn.Module, loss: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of a loss, the network's own parameters not among them.

    Args:
        module: The network.
        loss: Makes the loss; what it keeps is let go again.
    """
    from torch.autograd.graph import saved_tensors_hooks

    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        made = loss()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del made
    return found


def plan_any(
    module: nn.Module, recipe: Recipe, *, sizes: Sequence[int], whole: Sequence[str], kept_bytes: float
) -> Plan:
    """Count what each method moves, and the memory for weights, gradients, optimizer and activations.

    Args:
        module: The network.
        recipe: The job.
        sizes: What each training row costs, in the unit of `train.micro_batch_tokens`.
        whole: Names of parameters that move with every method.
        kept_bytes: What the backward pass needs for each unit, see `saved_bytes`.

    Raises:
        RecipeError: If a LoRA target names no layer.
    """
    machine = this_machine(recipe.model.device)
    lora = recipe.method if isinstance(recipe.method, LoRAMethod) else LoRAMethod()
    layers = shape_of_linears(module, lora.targets, without=whole)
    total = sum(parameter.numel() for parameter in module.parameters())
    scene = _Scene(recipe, machine, total, filled_steps(sizes, recipe.train), kept_bytes)
    methods = [scene.method("full", "full fine-tuning", moved=total, new=0)]
    if layers:
        always = sum(module.get_parameter(name).numel() for name in whole)
        new = adapter_parameters(layers, lora)
        said = "every linear layer" if lora.targets == "auto" else ", ".join(lora.targets)
        methods.append(scene.method("lora", f"LoRA, rank {lora.rank}, {said}", moved=new + always, new=new))
    own = next((method for method in methods if method.kind == recipe.method.kind), methods[0])
    steps = recipe.train.total_steps(len(sizes))
    few = len(sizes) < FEW_ROWS and len(methods) > 1
    kind: Kind = "lora" if few else "full"
    why = "few: LoRA is the safer first try" if few else "many for a network of this size: full fine-tuning is cheap"
    return Plan(
        machine=machine,
        precision=recipe.train.precision_on(bf16_gpu=machine.bf16_gpu),
        rows=len(sizes),
        steps=steps,
        tokens=round(sum(sizes) * steps / recipe.train.steps_per_epoch(len(sizes))),
        micro_batch_tokens=own.micro_batch_tokens,
        budget=own.budget,
        methods=tuple(methods),
        recommended=kind,
        recommendation=f"{len(sizes):,} rows are {why}; where it matters, run both.",
        notes=NOTES,
    )


@dataclass(frozen=True, slots=True)
class _Scene:
    """What is the same for every method."""

    recipe: Recipe
    machine: Machine
    total: int
    steps: Steps
    kept_bytes: float

    def method(self, kind: Kind, title: str, *, moved: int, new: int) -> MethodPlan:
        """What one method takes with the largest budget that fits."""
        train = self.recipe.train
        budget = Budget(tokens=train.token_budget, reason="set in the recipe")
        if train.micro_batch_tokens == "auto":
            budget = whole_or_less(self.steps, fits=lambda n: fits_in(self._memory(moved, new, n).peak, self.machine))
        tokens = self.steps.read(budget.tokens).largest
        memory = self._memory(moved, new, tokens)
        return MethodPlan(
            kind=kind,
            title=title,
            parameters_moved=moved,
            share_moved=moved / (self.total + new),
            peak_bytes=memory.peak,
            memory=memory,
            fits=fits_in(memory.peak, self.machine),
            flops=0.0,
            seconds=None,
            bytes_on_disk=round(FP32.new * (moved if kind == "lora" else self.total)),
            budget=budget,
            micro_batch_tokens=tokens,
            # Nobody knows whether this network can compute again, so that only the recipe itself can ask for it.
            checkpointing=train.activation_checkpointing == "on",
        )

    def _memory(self, moved: int, new: int, tokens: int) -> Memory:
        optimizer = self.recipe.train.optimizer
        states = FP32.optimizer * (1.5 if isinstance(optimizer, Adam) and optimizer.amsgrad else 1)
        if optimizer.states == "int8":
            states = EIGHT_BIT_STATES
        if self.recipe.guards.l2_sp is not None:
            states += FP32.other  # the values that weights began with and are pulled to
        memory = Memory(
            weights=round(FP32.other * (self.total + new)),
            optimizer=round(states * moved),
            gradients=round(FP32.gradient * moved),
            activations=round(self.kept_bytes * tokens),
            logits=0,
            overhead=0,
        )
        memory = with_overhead(memory, self.machine, cut=tokens < self.steps.whole)
        held = resident_bytes()
        if self.machine.device == "cuda" or held is None:
            return memory
        # The network is loaded already, so that the process can be asked what it takes beside it.
        around = max(0, held - round(FP32.other * self.total))
        return memory.model_copy(update={"overhead": memory.overhead - CPU_OVERHEAD_BYTES + around + BEGINNING_BYTES})
