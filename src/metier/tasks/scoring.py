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


CUT_AT_ONCE = 4096
"""Examples that are cut together: enough to find like ones, few enough to hold their tokens."""


@torch.inference_mode()
def score(task: Task[Any], model: nn.Module, examples: Sequence[Any], *, batch_tokens: int = 4096) -> Loss:
    """Loss of each example, shape (N,), on the CPU in float64; the model is in evaluation mode while it runs."""
    device = next(model.parameters()).device
    total_N = torch.zeros(len(examples), dtype=torch.float64)
    weight_N = torch.zeros(len(examples), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(examples), CUT_AT_ONCE):
            some = examples[start : start + CUT_AT_ONCE]
            for cut in task.cut(some, batch_tokens):
                found = task.loss(model, to_device(task.collate([some[i] for i in cut]), device))
                group = [start + i for i in cut]
                total_N[group], weight_N[group] = found.total_B.double().cpu(), found.weight_B.double().cpu()
    finally:
        model.train(was_training)
    return Loss(total_N, weight_N)


def mean_loss(task: Task[Any], model: nn.Module, examples: Sequence[Any]) -> float:
    """Mean loss of a scored element over examples, with the weights as they are."""
    loss = score(task, model, examples)
    return float(loss.total_B.sum() / loss.weight_B.sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
