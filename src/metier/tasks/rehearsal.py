"""A task and a network of somebody else's, tried on two rows before anything expensive begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metier.core import RecipeError
from metier.models import in_their_code
from metier.tasks.values import predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.data.records import Record
    from metier.tasks.values import ValueTask

ROWS = 2


def rehearse(task: ValueTask[Any], module: nn.Module, examples: Sequence[Any], records: Sequence[Record]) -> None:
    """Run everything that the run will ask of them once.

    Args:
        task: The task.
        module: The network.
        examples: Encoded rows.
        records: The same rows.

    Raises:
        RecipeError: If something raises, or is not what it must be.
        ModelError: If the network's answer has another shape than the targets.
    """
    few = examples[:ROWS]
    _check_batch(task, few)
    with in_their_code("the task's size", where="task.use"):
        _wants(
            all(isinstance(task.size(e), int) and task.size(e) >= 1 for e in few), "size is no whole number from 1 on"
        )
    with in_their_code("the task's features", where="task.use"):
        features = task.features([example.content for example in few])
    _wants(
        features is None or (getattr(features, "shape", (0,))[0] == len(few) and len(features.shape) == 2),
        f"features are no matrix with {len(few)} rows for {len(few)} examples",
    )
    with in_their_code("the task's groups", where="task.use"):
        groups = task.groups(records[:ROWS])
    _wants(all(len(values) == len(few) for values in groups.values()), "groups do not have one value for each row")
    with in_their_code("the task's loss", where="task.use"):
        answer = predicted(module, task.collate(few))
        task.loss(module, task.collate(few))
    _wants(answer.requires_grad or not any(p.requires_grad for p in module.parameters()), "the answer has no gradient")


def _check_batch(task: ValueTask[Any], few: Sequence[Any]) -> None:
    with in_their_code("the task's batch", where="task.use"):
        made = task.batch([example.content for example in few])
    is_pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Mapping)
    _wants(is_pair, "batch returns no pair of arguments by name and targets")
    inputs, target = made
    _wants(
        isinstance(target, Tensor) and all(isinstance(value, Tensor) for value in inputs.values()),
        "batch returns something else than tensors",
    )
    shape = tuple(target.shape)
    wanted = {(len(few), len(task.names))} | ({(len(few),)} if len(task.names) == 1 else set())
    _wants(
        shape in wanted, f"batch returns targets of the shape {shape} for {len(few)} rows and {len(task.names)} names"
    )
    _wants(not bool(torch.isinf(target).any()), "targets are infinite; NaN says that nothing was measured")


def _wants(holds: object, otherwise: str) -> None:
    """Raise RecipeError unless it holds."""
    if not holds:
        raise RecipeError(otherwise, where="task.use", hint="see metier.ValueTask for what each method returns")
