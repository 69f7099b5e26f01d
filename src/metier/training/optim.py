"""Optimizers and how their rate moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

import torch

from metier.recipe import Adam, AdamW, Constant, Cosine, Linear, Step

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.recipe import OptimizerSection, ScheduleSection

DECAY_FULL = 0.01
"""Default weight decay where base weights move; adapters are not decayed."""


def build_optimizer(section: OptimizerSection, module: nn.Module, *, learning_rate: float, adapters: bool) -> Optimizer:
    """The optimizer over everything that moves, in torch's fused form where it exists."""
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in moving)
    match section:
        case AdamW():
            decay = (0.0 if adapters else DECAY_FULL) if section.weight_decay == "auto" else section.weight_decay
            # Vectors are biases and norms: decaying them pulls the network towards zero output, not towards simplicity.
            groups = [
                {"params": [p for p in moving if p.ndim >= 2], "weight_decay": decay},
                {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            return torch.optim.AdamW(groups, lr=learning_rate, betas=section.betas, fused=fused)
        case Adam():
            return torch.optim.Adam(moving, lr=learning_rate, betas=section.betas, amsgrad=section.amsgrad, fused=fused)
        case _:
            assert_never(section)


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
