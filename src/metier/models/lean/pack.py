"""Rows laid end to end in one sequence, of which none sees another; what rows begin with alike stands there once.

A pack is a forest. A node is a piece of text; its children go on from it. The nodes stand depth first, so that
everything that goes on from a node stands right behind it. A row that shares nothing is a node without children.

Shapes: T tokens of the pack, S nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

LEAST_SHARED = 16
"""Tokens from which sharing a beginning saves more than the further block of attention costs. Judgement."""


class Node(NamedTuple):
    """A piece of text in a pack.

    Attributes:
        start: First token.
        end: One past the last token.
        reach: One past the last token of everything that goes on from it; `end` where nothing does.
        depth: Tokens that stand before it in its rows: the position of its first token.
        row: A number for the row that it is taken from: equal rows have equal numbers, others practically never.
    """

    start: int
    end: int
    reach: int
    depth: int
    row: int = 0

    @property
    def length(self) -> int:
        """Tokens of the piece."""
        return self.end - self.start


@dataclass(frozen=True)
class Pack:
    """The nodes of a pack, depth first."""

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, mask: Tensor) -> Pack:
        """The pack that a mask stands for."""
        return cls(tuple(Node(*row) for row in mask[0, 0].tolist()))

    @classmethod
    def joined(cls, packs: Sequence[Pack]) -> Pack:
        """Packs one after the other, of which none sees another."""
        nodes: list[Node] = []
        for pack in packs:
            first = nodes[-1].end if nodes else 0
            nodes += [Node(n.start + first, n.end + first, n.reach + first, n.depth, n.row) for n in pack.nodes]
        return cls(tuple(nodes))

    def mask(self) -> Tensor:
        """The pack as an attention mask, shape (1, 1, S, 5), int64."""
        return torch.tensor([[list(self.nodes)]], dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return self.nodes[-1].end

    @cached_property
    def shares(self) -> bool:
        """Whether any node has children."""
        return any(node.reach > node.end for node in self.nodes)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(node.depth + node.length for node in self.nodes)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its own row, shape (T,), int64."""
        return torch.cat([torch.arange(node.depth, node.depth + node.length) for node in self.nodes])

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """For each token where its node starts, and how far it is seen; two of shape (T,), int64."""
        lengths = torch.tensor([node.length for node in self.nodes])
        starts, reaches = (torch.tensor(ends) for ends in zip(*((n.start, n.reach) for n in self.nodes), strict=True))
        return starts.repeat_interleave(lengths), reaches.repeat_interleave(lengths)

    def visible(self, *, causal: bool, window: int | None = None) -> Tensor:
        """Which token (row) sees which (column), shape (T, T), bool: what every fast path is held to."""
        place, (start, reach) = torch.arange(self.tokens), self.bounds
        first = place if causal else start
        seen = (place[:, None] >= first[None, :]) & (place[:, None] < reach[None, :])
        if window is not None:
            seen &= self.positions[:, None] - self.positions[None, :] < window
        return seen

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbours of equal length: (first token, nodes, tokens of each)."""
        first, count = self.nodes[0], 0
        for node in self.nodes:
            if node.length != first.length:
                yield first.start, count, first.length
                first, count = node, 0
            count += 1
        yield first.start, count, first.length


@dataclass(frozen=True, slots=True)
class Attending:
    """One way of attending over a pack; layers of a network may have two.

    Attributes:
        pack: The pack.
        causal: Whether a token sees only what stands before it.
        scale: Factor of the scores.
        window: A token sees what stands less than so many places before it; None for all.
    """

    pack: Pack
    causal: bool
    scale: float
    window: int | None

    @property
    def narrow(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and self.pack.longest > self.window


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows in a pack.

    Attributes:
        pack: The forest.
        pieces: For each node the row it is taken from and the range of that row's tokens, in the pack's order.
        begins: For each row where its first token would stand if the pack held all of it up to its own last piece:
            token t of the row stands at `begins + t`, for every t that is not shared.
    """

    pack: Pack
    pieces: tuple[tuple[int, int, int], ...]
    begins: tuple[int, ...]


def lay(rows: Sequence[Sequence[int]], shareable: Sequence[int] | None = None) -> Packed:
    """Lay rows into one pack.

    Args:
        rows: Token ids of each row, none empty.
        shareable: How many tokens of each row may be shared with others, less than its length; None shares nothing.
    """
    laying = _Laying(rows)
    if shareable is None:
        laying.leaves(range(len(rows)), 0)
    else:
        laying.grow(*in_order(rows, shareable), 0)
    return Packed(Pack(tuple(laying.nodes)), tuple(laying.pieces), tuple(laying.begins))


class _Laying:
    """A pack while it grows."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self.nodes: list[Node] = []
        self.pieces: list[tuple[int, int, int]] = []
        self.begins = [0] * len(rows)

    def grow(self, order: Sequence[int], common: Sequence[int], depth: int) -> None:
        """Lay rows that agree up to `depth`, of which neighbours agree up to `common`."""
        alone: list[int] = []
        at = 0
        while at < len(order):
            stop = at + 1
            while stop < len(order) and common[stop - 1] >= depth + LEAST_SHARED:
                stop += 1
            if stop - at == 1:
                alone.append(order[at])
            else:
                end = min(common[at : stop - 1])
                place = self._put(order[at], depth, end)
                self.grow(order[at:stop], common[at : stop - 1], end)
                self.nodes[place] = self.nodes[place]._replace(reach=self.nodes[-1].end)
            at = stop
        self.leaves(alone, depth)

    def leaves(self, members: Sequence[int], depth: int) -> None:
        """Lay what is left of rows; equal lengths side by side are one block of attention."""
        for row in sorted(members, key=lambda i: len(self._rows[i])):
            place = self._put(row, depth, len(self._rows[row]))
            self.begins[row] = self.nodes[place].start - depth

    def _put(self, row: int, depth: int, end: int) -> int:
        start = self.nodes[-1].end if self.nodes else 0
        self.nodes.append(Node(start, start + end - depth, start + end - depth, depth, hash(tuple(self._rows[row]))))
        self.pieces.append((row, depth, end))
        return len(self.nodes) - 1


def in_order(rows: Sequence[Sequence[int]], shareable: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rows so that like beginnings are neighbours, and how many tokens each may share with the next."""
    order = sorted(range(len(rows)), key=lambda i: (list(rows[i][: shareable[i]]), len(rows[i])))
    return order, [alike(rows[a], rows[b], min(shareable[a], shareable[b])) for a, b in pairwise(order)]


def alike(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens two rows begin with alike, at most `most`."""
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # one[:low] agrees, one[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
