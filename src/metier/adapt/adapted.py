"""A model made ready for training: what moves, and how to say it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metier.models.structure import saved_buffers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Adapted:
    """A network in which `requires_grad` says what moves.

    Attributes:
        module: The network to train; for LoRA it is wrapped by peft.
        method: One line for people, such as "LoRA, rank 16, alpha 32, every linear layer but the head".
        moved: Numbers that will move.
        total: Numbers in the network, new ones included.
        notes: What the user should know about the choice.
    """

    module: nn.Module
    method: str
    moved: int
    total: int
    notes: tuple[str, ...] = ()

    def patterns(self) -> list[tuple[str, int, int]]:
        """The moving parameters by pattern: (name with `*` for block numbers, tensors, numbers), largest first."""
        tensors: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
                tensors[pattern] += 1
                numbers[pattern] += parameter.numel()
        return [(pattern, tensors[pattern], count) for pattern, count in numbers.most_common()]


def finish(module: nn.Module, method: str, notes: tuple[str, ...] = ()) -> Adapted:
    """Count what moves; tied parameters count once."""
    parameters = list(module.parameters())
    return Adapted(
        module=module,
        method=method,
        moved=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        notes=notes,
    )


def moving_weights(module: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: moving parameters, and buffers (running statistics)."""
    moving = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return moving | saved_buffers(module)
