"""Batches of several runs as one: their packs one after the other in one sequence, of which none sees another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from metier.models.lean import Pack
from metier.tasks.causal import TokenTask
from metier.tasks.classify import ClassifyByHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from metier.core import Batch
    from metier.tasks.protocol import Task

COUNTS_TOKENS, COUNTS_ROWS = ("place", "start"), ("row",)
"""What of a batch counts from its first token, or from its first row."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Several batches as one.

    Attributes:
        batch: What a task's `loss` reads; the rows stand in the order of the batches.
        tokens: Tokens of each.
        rows: Rows of each.
    """

    batch: Batch
    tokens: tuple[int, ...]
    rows: tuple[int, ...]


def why_apart(tasks: Sequence[Task[Any]]) -> str:
    """Why batches of these tasks cannot be one; empty where they can.

    Args:
        tasks: Suited to networks on one base.
    """
    losses = {getattr(type(task), "loss", None) for task in tasks}
    if not losses <= {TokenTask.loss, ClassifyByHead.loss} or len(losses) > 1:
        return f"the tasks ({', '.join(sorted({task.kind for task in tasks}))}) are not scored alike from packs"
    for task in tasks:
        if not task.layout.packed:  # type: ignore[attr-defined]
            return f"rows are padded: {task.layout.why_not}"  # type: ignore[attr-defined]
    return ""


def joined(batches: Sequence[Batch]) -> Joined:
    """Batches of packs, each collated by its own task, as one pack."""
    tokens = tuple(batch["input_ids"].shape[1] for batch in batches)
    rows = tuple(len(batch["count" if "count" in batch else "label"]) for batch in batches)
    whole = {name: _beside(name, [batch[name] for batch in batches], tokens, rows) for name in batches[0]}
    return Joined(whole, tokens, rows)


def _beside(name: str, parts: list[Tensor], tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
    if name == "attention_mask":
        return Pack.joined([Pack.of(part) for part in parts]).mask()
    counts = tokens if name in COUNTS_TOKENS else rows if name in COUNTS_ROWS else [0] * len(parts)
    firsts = [sum(counts[:number]) for number in range(len(parts))]
    return torch.cat([part + first for part, first in zip(parts, firsts, strict=True)], dim=-1)
