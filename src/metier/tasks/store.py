"""Encoded examples as a few long columns of numbers: a row costs its tokens and some bytes, and many stay on disk.

An example is a small frozen dataclass with tensors of one dimension; kept as one object each, a row would cost a
kilobyte whatever it holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from metier.core.lazily import Made
from metier.data.disk import Column, Writer

if TYPE_CHECKING:
    from metier.tasks.protocol import Task

Row = TypeVar("Row")

SHORT_VOCABULARY = 1 << 16
"""Up to so many tokens an id fits in two bytes."""


def keep(rows: Iterable[Row], *, vocabulary: int) -> Sequence[Row]:
    """Examples, kept column by column while they are made.

    Args:
        rows: Dataclasses with `where`, with tensors of shape (T,) of token ids (int64) or flags (bool), and numbers.
        vocabulary: How many tokens there are; every id is less.
    """
    kept: _Growing[Row] | None = None
    for row in rows:
        kept = kept or _Growing(row, np.dtype(np.uint16 if vocabulary <= SHORT_VOCABULARY else np.int32))
        kept.add(row)
    return [] if kept is None else kept.done()


def sizes(task: Task[Any], examples: Sequence[Any]) -> Sequence[int]:
    """What each example costs, in tokens; where they are stored, no token is read for it."""
    if isinstance(examples, Stored):
        return examples.sizes()
    return [task.size(examples[i]) for i in range(len(examples))]


def rows_behind(examples: Sequence[Any]) -> int:
    """How many rows the examples come from; one row may give several."""
    if isinstance(examples, Stored):
        return examples.rows_behind()
    return len({examples[i].where for i in range(len(examples))})


class Stored(Made[Row]):
    """Examples that are made again, one by one, as they are asked for."""

    def __init__(
        self,
        kind: Callable[..., Row],
        places: _Places,
        tensors: dict[str, tuple[Column, Sequence[int]]],
        numbers: dict[str, array[int]],
    ) -> None:
        """Take what `keep` has gathered: each tensor field as its column and where every row's part ends."""
        self._kind, self._places, self._tensors, self._numbers = kind, places, tensors, numbers

    def __len__(self) -> int:
        return len(self._places)

    def make(self, place: int) -> Row:
        """Make an example again."""
        parts: dict[str, Any] = {name: self._tensor(name, place) for name in self._tensors}
        parts |= {name: values[place] for name, values in self._numbers.items()}
        return self._kind(where=self._places[place], **parts)

    def sizes(self) -> list[int]:
        """Tokens of each row."""
        found = np.zeros(len(self), np.int64)
        for column, ends in self._tensors.values():
            if column.dtype != np.bool_:
                found += np.diff(np.asarray(ends), prepend=0)
        sizes: list[int] = found.tolist()
        return sizes

    def rows_behind(self) -> int:
        """How many different places the rows stand at."""
        return self._places.distinct()

    def _tensor(self, name: str, row: int) -> Tensor:
        column, ends = self._tensors[name]
        values = column.read(ends[row - 1] if row else 0, ends[row])
        return torch.from_numpy(values if values.dtype == np.bool_ else values.astype(np.int64))


class _Growing(Generic[Row]):
    """A store while it grows."""

    def __init__(self, first: Row, ids: np.dtype[Any]) -> None:
        self._kind = type(first)
        self._places = _Places()
        values = {field.name: getattr(first, field.name) for field in fields(first)}  # type: ignore[arg-type]
        self._tensors = {
            name: (Writer(np.bool_ if value.dtype == torch.bool else ids), array("q"))
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        self._numbers = {name: array("q") for name, value in values.items() if isinstance(value, int)}

    def add(self, row: Any) -> None:
        self._places.add(row.where)
        for name, (column, ends) in self._tensors.items():
            column.add(getattr(row, name).numpy())
            ends.append(len(column))
        for name, numbers in self._numbers.items():
            numbers.append(getattr(row, name))

    def done(self) -> Stored[Row]:
        tensors: dict[str, tuple[Column, Sequence[int]]] = {
            name: (column.done(), ends) for name, (column, ends) in self._tensors.items()
        }
        return Stored(self._kind, self._places, tensors, self._numbers)


class _Places(Made[str]):
    """Where rows stand: "file:line" as two numbers, anything else as it is."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._by_number: list[str] = []
        self._name, self._line = array("q"), array("q")

    def add(self, where: str) -> None:
        file, _, line = where.rpartition(":")
        if line.isascii() and line.isdigit() and (line == "0" or line[0] != "0") and len(line) < 18:
            self._append(file, int(line))
        else:
            self._append(where, -1)

    def distinct(self) -> int:
        """How many different places there are."""
        pairs = np.stack([np.asarray(self._name), np.asarray(self._line)])
        return int(np.unique(pairs, axis=1).shape[1])

    def _append(self, name: str, line: int) -> None:
        number = self._names.setdefault(name, len(self._names))
        if number == len(self._by_number):
            self._by_number.append(name)
        self._name.append(number)
        self._line.append(line)

    def __len__(self) -> int:
        return len(self._line)

    def make(self, place: int) -> str:
        name, line = self._by_number[self._name[place]], self._line[place]
        return name if line < 0 else f"{name}:{line}"
