"""The shapes a row can have once it is read, whatever file and format it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metier.data.cells import CellTable

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; the assistant's are what is learnt.

    Attributes:
        where: File and line, such as "train.jsonl:12".
        messages: The turns in order.
        tools: Tool definitions as JSON text, put to the chat template; None where there are none.
        extras: The row's other columns, such as "test" (unit-test code) or the group column.
    """

    where: str
    messages: tuple[Message, ...]
    tools: str | None = None
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it."""

    where: str
    prompt: str
    completion: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text."""

    where: str
    text: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class."""

    where: str
    text: str
    label: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Columns:
    """A row as it stands, for a task of the user's own.

    Attributes:
        where: File and line.
        values: Column to value; out of CSV every value is text.
        extras: The same, so that groups are found.
    """

    where: str
    values: Mapping[str, Any]
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        table: Where it stands.
        row: Its place there.
    """

    table: CellTable
    row: int

    @property
    def where(self) -> str:
        """File and name of the cell."""
        return f"{self.table.where}:{self.table.names[self.row]}"

    @property
    def extras(self) -> Mapping[str, Any]:
        """Its donor, type and their like."""
        return {name: str(values[self.row]) for name, values in self.table.obs.items()}


@dataclass(frozen=True, slots=True)
class Cells(Sequence[Cell]):
    """Some cells of a table, made one by one as they are asked for.

    Attributes:
        table: Where they stand.
        rows: Their places there, int64.
    """

    table: CellTable
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> Cells: ...
    def __getitem__(self, place: int | slice) -> Cell | Cells:
        if isinstance(place, slice):
            return Cells(self.table, self.rows[place])
        return Cell(self.table, int(self.rows[place]))


Record = Conversation | Completion | Document | Labelled | Columns | Cell


class Records(Sequence[Record]):
    """Rows of a file, made one by one as they are asked for."""

    def __init__(self, make: Callable[[int], Record], places: Sequence[int] | NDArray[np.int64]) -> None:
        """Take what makes the record of a place, and the places in order."""
        self._make, self._places = make, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Records: ...
    def __getitem__(self, place: int | slice) -> Record | Records:
        if isinstance(place, slice):
            return Records(self._make, self._places[place])
        return self._make(int(self._places[place]))

    def __iter__(self) -> Iterator[Record]:
        return (self._make(int(place)) for place in self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def pick(self, rows: Sequence[int]) -> Records:
        """Some of them, by index."""
        return Records(self._make, self._places[np.asarray(rows, dtype=np.int64)])


def pick(records: Sequence[Record], rows: Sequence[int]) -> Sequence[Record]:
    """Some of the records, by index."""
    return records.pick(rows) if isinstance(records, Records) else [records[row] for row in rows]


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows to learn from, to choose by, and to be judged on.

    Attributes:
        train: Rows to learn from.
        validation: Rows that choose the best step.
        test: Rows that give the reported figures.
        format: The recognised or given format of the training file.
        reason: How the format was recognised, as a sentence for the user.
        notes: What the reader did or saw that the user should know (rows dropped, personal data, overlap allowed).
        fingerprint: Hex sha256 over the content of all three splits, in order.
        facts: What was recognised and how it was split, where that is more than a sentence.
    """

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    format: str
    reason: str
    notes: tuple[str, ...]
    fingerprint: str
    facts: tuple[str, ...] = ()
