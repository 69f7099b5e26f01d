"""The values that travel between rooms. Frozen: a room answers with a new value, it never edits one.

Shapes: B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]
"""Named tensors; a task's `collate` makes them and only its `loss` reads them."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss kept as one sum for each example, so that batches of unequal size add up exactly.

    Attributes:
        total_B: Sum over the scored elements of each example, in nats or squared units of the target.
        weight_B: How many elements each example scored, float.
    """

    total_B: Tensor
    weight_B: Tensor


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step did.

    Attributes:
        step: Number of optimizer steps taken so far, from 1.
        epoch: Passes over the training examples so far, as a fraction.
        loss: Mean loss per scored element over the whole batch, before the step.
        grad_norm: L2 norm of the mean gradient before clipping.
        learning_rate: Rate with which the step was taken.
        weight: Scored elements in the batch, in the task's unit.
        tokens: Elements the model read without padding: what the task's `size` counts.
        seconds: Wall time of the step.
        most_tokens: Most tokens in one forward pass from here on, lowered where memory ran out; 0 where
            nobody counts.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    weight: float
    tokens: int
    seconds: float
    most_tokens: int = 0
