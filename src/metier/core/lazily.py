"""Sequences whose items are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class Made(Sequence[Item]):
    """A sequence that makes one item at a time; a slice is a list of them."""

    @abstractmethod
    def make(self, place: int) -> Item:
        """The item at a place, which is not negative."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        """One item, or the items of a slice."""
        if isinstance(place, slice):
            return [self.make(i) for i in range(*place.indices(len(self)))]
        return self.make(range(len(self))[place])

    def __iter__(self) -> Iterator[Item]:
        """Every item in order."""
        return (self.make(i) for i in range(len(self)))
