"""Rows that cannot be learnt from, gathered while they are encoded and told by kind."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from metier.core import DataError, Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOWN = 5
"""Rows of one kind that are named; the others are counted."""
TOO_LONG = "are longer than task.max_tokens"
"""A kind that several tasks know."""


class Refusals:
    """What is wrong with rows, by kind."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._faults: dict[str, list[Fault]] = defaultdict(list)
        self._most: dict[str, int] = defaultdict(int)

    def add(self, kind: str, fault: Fault, *, tokens: int = 0) -> None:
        """Note a row.

        Args:
            kind: What it has in common with its like, as a sentence about several rows: "hold nothing to learn".
            fault: What is wrong with it.
            tokens: How many it needs, where that is what is wrong.
        """
        self._faults[kind].append(fault)
        self._most[kind] = max(self._most[kind], tokens)

    def refuse(self, rows: int) -> None:
        """Raise what was noted, if anything was.

        Args:
            rows: How many were looked at.

        Raises:
            DataError: With the first rows of each kind, and how many there are.
        """
        shown = [fault for kind in self._faults for fault in self._shown(kind, rows)]
        if shown:
            raise DataError.of(shown)

    def _shown(self, kind: str, rows: int) -> Iterator[Fault]:
        faults = self._faults[kind]
        yield from faults[:SHOWN]
        if len(faults) > SHOWN:
            most = f"; the longest needs {self._most[kind]:,} tokens" if self._most[kind] else ""
            file = faults[0].where.rpartition(":")[0]
            yield Fault(file, f"and {len(faults) - SHOWN:,} more: {len(faults):,} of {rows:,} rows {kind}{most}", "")
