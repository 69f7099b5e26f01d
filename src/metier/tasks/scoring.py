"""The loss of every example, for validation and for the evidence.

Shapes: N examples in the order given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from metier.core import Batch, Loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.tasks.protocol import Task


@torch.inference_mode()
def score(task: Task[Any], model: nn.Module, examples: Sequence[Any], *, batch_tokens: int = 4096) -> Loss:
    """Loss of each example, shape (N,), on the CPU in float64; the model is in evaluation mode while it runs."""
    device = next(model.parameters()).device
    total_N = torch.zeros(len(examples), dtype=torch.float64)
    weight_N = torch.zeros(len(examples), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for group in map(list, task.cut(examples, batch_tokens)):
            found = task.loss(model, to_device(task.collate([examples[i] for i in group]), device))
            total_N[group], weight_N[group] = found.total_B.double().cpu(), found.weight_B.double().cpu()
    finally:
        model.train(was_training)
    return Loss(total_N, weight_N)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
