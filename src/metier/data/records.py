"""The shapes a row can have once it is read, whatever file and format it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    import numpy as np
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
