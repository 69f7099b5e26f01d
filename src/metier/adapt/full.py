"""Full fine-tuning: every parameter moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metier.adapt.adapted import Adapted, finish

if TYPE_CHECKING:
    from torch import nn


def adapt(module: nn.Module) -> Adapted:
    """Let every floating-point parameter move."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return finish(module, "full fine-tuning")
