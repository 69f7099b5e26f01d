"""Optimizers and how their rate moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, assert_never

import torch

from metier.core import RecipeError
from metier.recipe import Adam, AdamW, Constant, Cosine, Linear, Step
from metier.training.rounding import RoundedAdam

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.recipe import OptimizerSection, ScheduleSection

DECAY_FULL = 0.01
"""Default weight decay where base weights move; adapters are not decayed."""


def build_optimizer(
    section: OptimizerSection, module: nn.Module, *, learning_rate: float, adapters: bool, seed: int = 0
) -> Optimizer:
    """The optimizer over everything that moves, in torch's fused form where it exists.

    Args:
        section: The recipe's settings.
        module: What requires a gradient moves; it is on its device, in its format.
        learning_rate: Peak rate.
        adapters: Whether only adapters move.
        seed: For the rounding of bf16 weights.

    Raises:
        RecipeError: If 8-bit states are asked for where there are none.
    """
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: Any = moving
    decoupled = isinstance(section, AdamW)
    if isinstance(section, AdamW):
        decay = (0.0 if adapters else DECAY_FULL) if section.weight_decay == "auto" else section.weight_decay
        groups = _groups(moving, decay)
    amsgrad = isinstance(section, Adam) and section.amsgrad
    if section.states == "int8":
        return _eight_bit(groups, moving, learning_rate=learning_rate, betas=section.betas, decoupled=decoupled)
    if any(parameter.dtype == torch.bfloat16 for parameter in moving):
        return RoundedAdam(groups, learning_rate=learning_rate, betas=section.betas, seed=seed, amsgrad=amsgrad)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in moving)
    return kind(groups, lr=learning_rate, betas=section.betas, amsgrad=amsgrad, fused=fused)


def _groups(moving: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    # Vectors are biases and norms: decaying them pulls the network towards zero output, not towards simplicity.
    groups = [
        {"params": [p for p in moving if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _eight_bit(
    groups: Any, moving: Sequence[nn.Parameter], *, learning_rate: float, betas: tuple[float, float], decoupled: bool
) -> Optimizer:
    """Adam with moments in 8 bits, a scale for each block; tensors below 4096 numbers keep theirs in fp32.

    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """
    where = "train.optimizer.states"
    devices = sorted({parameter.device.type for parameter in moving} - {"cuda"})
    if devices:
        raise RecipeError(
            f"8-bit states need a CUDA device, and what moves is on: {', '.join(devices)}",
            where=where,
            hint="set it to fp32, or model.device to cuda where there is a GPU",
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise RecipeError(
            f"8-bit states need bitsandbytes, which does not load: {error}",
            where=where,
            hint="pip install 'metier[qlora]'",
        ) from error
    kind = bitsandbytes.optim.AdamW8bit if decoupled else bitsandbytes.optim.Adam8bit
    made: Optimizer = kind(groups, lr=learning_rate, betas=betas, **({} if decoupled else {"weight_decay": 0.0}))
    return made


def build_schedule(
    section: ScheduleSection, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """The schedule as a multiple of the peak rate for each step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(section, step, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    )


def rate_factor(section: ScheduleSection, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """Multiple of the peak rate for step `step`, counted from 0; the first step of a warm-up is not zero."""
    warmup = math.ceil(section.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    gone = (step - warmup) / max(1, total_steps - warmup)
    match section:
        case Constant():
            return 1.0
        case Linear():
            return max(0.0, 1.0 - gone)
        case Cosine():
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, gone)))
        case Step():
            return float(section.gamma ** (step // (section.step_size * steps_per_epoch)))
        case _:
            assert_never(section)
