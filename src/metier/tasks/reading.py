"""What a network will read, said before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from metier.models.lean import in_order
from metier.tasks.store import sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.models.lean import Layout
    from metier.recipe import TrainSection
    from metier.tasks.protocol import Task

MOST_STEPS = 200
"""Steps that are looked at: enough to tell, few enough to take no time."""
MOST_ROWS, MOST_TOKENS = 20_000, 2_000_000
"""Rows among which a shared beginning is looked for, and their tokens."""


def reading(task: Task[Any], examples: Sequence[Any], section: TrainSection) -> tuple[str, ...]:
    """How rows are laid, what sharing saves, and which rows are longer than the budget, as sentences for people.

    Args:
        task: Suited to the network; tasks that lay nothing out have nothing to say.
        examples: Encoded training rows.
        section: Batch size and budget.
    """
    layout: Layout | None = getattr(task, "layout", None)
    if layout is None:
        return ()
    said = []
    if not layout.packed:
        said.append(f"rows are padded, in batches of like length: {layout.why_not}")
    budget = section.token_budget
    long = sum(size > budget for size in sizes(task, examples))
    if long:
        said.append(f"{long} rows are longer than train.micro_batch_tokens={budget}; each is read alone")
    if layout.shares:
        said += _shared(task, examples, section)
    return tuple(said)


def _shared(task: Task[Any], examples: Sequence[Any], section: TrainSection) -> list[str]:
    """What beginning most rows share, and how many tokens that saves."""
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(section.seed))
    order = shuffled[: max(MOST_ROWS, MOST_STEPS * section.batch_size)].tolist()
    whole = read = 0
    for begin in range(0, min(len(order), MOST_STEPS * section.batch_size), section.batch_size):
        rows = [examples[i] for i in order[begin : begin + section.batch_size]]
        whole += sum(task.size(row) for row in rows)
        read += sum(task.read([rows[i] for i in cut]) for cut in task.cut(rows, section.token_budget))
    if whole < 1.05 * read:
        return []
    looked_at = _ids(examples, order[:MOST_ROWS])
    length, count = most_shared(looked_at)
    of = "" if len(looked_at) == len(examples) else f" of {len(looked_at):,} looked at"
    return [f"a beginning of {length} tokens is shared by {count} rows{of}: {whole / read:.1f}x fewer tokens are read"]


def _ids(examples: Sequence[Any], order: Sequence[int]) -> list[list[int]]:
    """Token ids of the first rows of an order that add up to no more than is looked at."""
    found: list[list[int]] = []
    total = 0
    for i in order:
        ids = examples[i].ids.tolist()
        total += len(ids)
        if found and total > MOST_TOKENS:
            break
        found.append(ids)
    return found


def most_shared(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The beginning whose sharing saves most: its tokens and its rows."""
    _, common = in_order(rows, [len(row) for row in rows])
    best, stack = (0, 0), list[tuple[int, int]]()  # (length, first row) of beginnings that go on
    for place, length in enumerate([*common, 0]):
        first = place
        while stack and stack[-1][0] > length:
            ended, first = stack.pop()
            count = place - first + 1
            best = max(best, (ended, count), key=lambda found: found[0] * (found[1] - 1))
        if not stack or stack[-1][0] < length:
            stack.append((length, first))
    return best
