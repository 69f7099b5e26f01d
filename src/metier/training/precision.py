"""In which number format weights rest and arithmetic is done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from metier.recipe import TrainSection
    from metier.recipe.train import PrecisionName

PURE_BF16_NOTE = (
    "precision bf16 keeps the weights themselves in bf16: updates are rounded up or down by chance, so that on average "
    "none is lost; a weight still has 8 significant bits, and gradients of several micro-batches are summed in bf16. "
    "Where memory allows, mixed is more exact."
)
"""Source for what rounding to nearest would lose: arXiv:2010.06192, arXiv:2502.20566."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A resolved choice."""

    name: PrecisionName
    device: torch.device

    def place(self, module: nn.Module) -> None:
        """Move the network to its device, in its resting format."""
        module.to(self.device, dtype=torch.bfloat16 if self.name == "bf16" else None)

    def follow(self, module: nn.Module) -> None:
        """Move what was added to a placed network to its device: an adapter stays in float32, for its small steps."""
        module.to(self.device)

    def arithmetic(self) -> AbstractContextManager[object]:
        """The context of every forward pass."""
        if self.name == "mixed":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def choose(section: TrainSection, device: torch.device) -> Precision:
    """The recipe's precision on this device."""
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Precision(section.precision_on(bf16_gpu=gpu), device)
