"""Which examples are read at once: what fits in a budget of tokens, with as little read twice or for nothing as can be.

A gradient does not depend on the cut, so the cut is free to follow lengths and likeness.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from metier.models.lean import LEAST_SHARED, in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    Cuts = tuple[tuple[int, ...], ...]

SMALLEST_CUT_TOKENS = 512
"""Below this a padded cut is too small to keep the matrix units busy, so padding is the lesser evil. Measured on a
2-core CPU with SmolLM2-135M."""
MOST_PADDING = 0.15
"""Share of padding from which a new cut is begun."""
HALVINGS = 5
"""Steps of the search for even cuts: a 64th of the most is near enough."""


def by_length(sizes: Sequence[int], most_tokens: int) -> Cuts:
    """For rows that are padded to the longest: rows of like length together, longest first, with little padding.

    Args:
        sizes: Tokens of each row.
        most_tokens: Most tokens of a cut, padding included; a longer row stands alone.
    """
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    used = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        longest = sizes[group[0]] if group else sizes[index]
        full = (len(group) + 1) * longest > most_tokens
        padded = 1 - (used + sizes[index]) / ((len(group) + 1) * longest)
        if group and (full or (padded > MOST_PADDING and used >= SMALLEST_CUT_TOKENS)):
            groups.append(tuple(group))
            group, used = [], 0
        group.append(index)
        used += sizes[index]
    return (*groups, tuple(group)) if group else tuple(groups)


def best_fit(sizes: Sequence[int], most_tokens: int) -> Cuts:
    """For rows that stand end to end: each row, longest first, goes where it leaves the least room.

    Source: best-fit decreasing, Johnson 1973; for packing of text Ding et al. 2024, arXiv:2404.10830.

    Args:
        sizes: Tokens of each row.
        most_tokens: Most tokens of a cut; a longer row stands alone.
    """
    return _even(partial(_best_fit, sizes), most_tokens)


def _best_fit(sizes: Sequence[int], most_tokens: int) -> Cuts:
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), ordered
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_right(rooms, (sizes[index], -1))
        if at < len(rooms):
            room, group = rooms.pop(at)
            groups[group].append(index)
        else:
            room, group = most_tokens, len(groups)
            groups.append([index])
        left = (room - sizes[index], group)
        rooms.insert(bisect_right(rooms, left), left)
    return tuple(tuple(group) for group in groups)


def by_beginning(rows: Sequence[Sequence[int]], shareable: Sequence[int], most_tokens: int) -> Cuts:
    """For rows that share what they begin with alike: rows that begin alike together.

    Args:
        rows: Token ids of each row.
        shareable: How many tokens of each may be shared.
        most_tokens: Most tokens of a cut, what is shared counted once; a longer row stands alone.
    """
    order, common = in_order(rows, shareable)
    if not any(length >= LEAST_SHARED for length in common):
        return best_fit([len(row) for row in rows], most_tokens)

    def filled(most: int) -> Cuts:
        groups: list[tuple[int, ...]] = []
        group: list[int] = []
        used = 0
        for place, index in enumerate(order):
            shared = common[place - 1] if group else 0
            cost = len(rows[index]) - (shared if shared >= LEAST_SHARED else 0)
            if group and used + cost > most:
                groups.append(tuple(group))
                group, used, cost = [], 0, len(rows[index])
            group.append(index)
            used += cost
        return (*groups, tuple(group)) if group else tuple(groups)

    return _even(filled, most_tokens)


def _even(cut: Callable[[int], Cuts], most_tokens: int) -> Cuts:
    """The cuts made even, by the least tokens that need no more cuts.

    None is then a small rest, which costs as many passes over the weights as a large one, and the largest, which
    decides the memory, is smaller.

    Args:
        cut: Makes cuts of at most so many tokens.
        most_tokens: The most.
    """
    cuts = cut(most_tokens)
    if len(cuts) < 2:
        return cuts
    # Two cuts hold more than the most together, or they would be one.
    low, high = most_tokens // 2, most_tokens
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        tried = cut(middle)
        if len(tried) > len(cuts):
            low = middle
        else:
            cuts, high = tried, middle
    return cuts


class Unpacked:
    """What a task has in common with others whose examples are never packed: like sizes are read together."""

    def size(self, example: Any) -> int:
        """What the example costs."""
        raise NotImplementedError

    def suited(self, module: nn.Module) -> Self:  # noqa: ARG002
        """The task itself: every network reads it alike."""
        return self

    def cut(self, examples: Sequence[Any], most_tokens: int) -> Cuts:
        """Examples of like size together."""
        return by_length([self.size(example) for example in examples], most_tokens)

    def read(self, examples: Sequence[Any]) -> int:
        """The largest size as often as there are examples."""
        return len(examples) * max(self.size(example) for example in examples)
