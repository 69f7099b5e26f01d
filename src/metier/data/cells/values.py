"""What counts must be, checked in one walk through a matrix in bounded memory.

Shapes: B cells, N columns (genes or proteins).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.core.words import first_few
from metier.data.cells.matrix import Aligned, blocks, dense, sparse
from metier.data.cells.parts import Words
from metier.data.faults import Faults, count

LOG_CEILING = 20.0
"""No log1p of a count is larger: e^20 is 485 million."""
EVEN = 0.05
"""Spread of the cells' sums, over their mean, below which they were made equal."""


@dataclass(slots=True)
class Oddity:
    """Values of one wrong kind.

    Attributes:
        number: How many.
        first: Cell, column and value of the first.
    """

    number: int = 0
    first: tuple[int, int, float] = (0, 0, 0.0)

    def note(self, wrong: NDArray[np.bool_], block_BN: Any, start: int) -> None:
        """Count the wrong ones among the stored values of a block whose first cell is `start`."""
        if not (found := int(wrong.sum())):
            return
        if not self.number:
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(block_BN.indptr, at, side="right")) - 1
            self.first = (start + row, int(block_BN.indices[at]), float(block_BN.data[at]))
        self.number += found


@dataclass(slots=True)
class Tally:
    """What a walk through a matrix found.

    Attributes:
        sums_B: Sum of each cell.
        exponential_B: Sum of expm1 of each cell, as far as the values may be logarithms.
        highest: The largest value.
        lowest: The smallest value, at most 0.
        infinite: Values that are not finite.
        negative: Values below zero.
        broken: Values that are no whole numbers.
    """

    sums_B: NDArray[np.float64]
    exponential_B: NDArray[np.float64]
    highest: float = 0.0
    lowest: float = 0.0
    infinite: Oddity = field(default_factory=Oddity)
    negative: Oddity = field(default_factory=Oddity)
    broken: Oddity = field(default_factory=Oddity)

    def see(self, block_BN: Any, start: int, *, gaps: bool) -> None:
        """Take in one block, sparse; with `gaps` NaN stands for "not measured"."""
        values = block_BN.data
        self.infinite.note(np.isinf(values) if gaps else ~np.isfinite(values), block_BN, start)
        finite = np.where(np.isfinite(values), values, np.float32(0))
        self.negative.note(finite < 0, block_BN, start)
        broken = finite != np.trunc(finite)
        self.broken.note(broken, block_BN, start)
        self.highest = max(self.highest, float(finite.max(initial=0)))
        self.lowest = min(self.lowest, float(finite.min(initial=0)))
        here = slice(start, start + block_BN.shape[0])
        self.sums_B[here] = _row_sums(finite, block_BN.indptr)
        if broken.any() and self.highest < LOG_CEILING:
            self.exponential_B[here] = _row_sums(np.expm1(finite), block_BN.indptr)


def _row_sums(values: NDArray[np.float32], starts: NDArray[Any]) -> NDArray[np.float64]:
    running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    found: NDArray[np.float64] = running[starts[1:]] - running[starts[:-1]]
    return found


def check_rna(source: Aligned, names: Words, genes: Words, where: str, remedy: str, faults: Faults) -> list[str]:
    """Refuse what is no counts; notes on empty cells."""
    tally = _walk(source)
    _check(tally, names, genes, where, remedy, faults, counts=True)
    empty = int((tally.sums_B == 0).sum())
    if empty and empty == len(tally.sums_B) and not tally.infinite.number + tally.negative.number:
        faults.add("nothing counted", where, f"no gene is counted in any of {count(empty, 'cell')}", remedy)
    return [f"{where}: {count(empty, 'cell has', 'cells have')} no RNA count."] if empty else []


def _walk(source: Aligned) -> Tally:
    cells = len(source.rows)
    tally = Tally(np.zeros(cells), np.zeros(cells))
    for rows in blocks(cells, source.matrix.shape[1]):
        tally.see(sparse(source.read(rows)), int(rows[0]), gaps=False)
    return tally


def check_proteins(
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    names: Words,
    proteins: Words,
    where: str,
    remedy: str,
    faults: Faults,
    *,
    counts: bool,
) -> tuple[list[str], tuple[str, ...]]:
    """Refuse what is no counts; notes, and the names of proteins that are constant or never measured."""
    tally = Tally(np.zeros(len(names)), np.zeros(len(names)))
    measured_P = np.zeros(len(proteins), np.int64)
    lowest_P, highest_P = np.full(len(proteins), np.inf), np.full(len(proteins), -np.inf)
    for rows in blocks(len(names), len(proteins)):
        block_BP = dense(read(rows))
        tally.see(sparse(block_BP), int(rows[0]), gaps=True)
        measured_P += (~np.isnan(block_BP)).sum(axis=0)
        lowest_P = np.minimum(lowest_P, np.where(np.isnan(block_BP), np.inf, block_BP).min(axis=0))
        highest_P = np.maximum(highest_P, np.where(np.isnan(block_BP), -np.inf, block_BP).max(axis=0))
    _check(tally, names, proteins, where, remedy, faults, counts=counts)
    never, fixed = measured_P == 0, (measured_P > 0) & (lowest_P == highest_P)
    zero = fixed & (highest_P == 0)
    if len(proteins) and (never | fixed).all() and len(names) > 1:
        faults.add("nothing measured", where, "no protein differs between any two cells", "give measured proteins")
    groups = (
        (zero, "zero in every cell"),
        (fixed & ~zero, "the same in every cell"),
        (never, "never measured"),
    )
    notes = [
        f"{where}: {count(int(which.sum()), 'protein is', 'proteins are')} {said}: "
        f"{first_few(proteins[which].tolist(), 12)}."
        for which, said in groups
        if which.any()
    ]
    return notes, tuple(proteins[never | fixed].tolist())


def _check(
    tally: Tally, names: Words, columns: Words, where: str, remedy: str, faults: Faults, *, counts: bool
) -> None:
    def at(oddity: Oddity) -> str:
        row, column, value = oddity.first
        return f"first {value:.4g} in cell {names[row]} at {columns[column]}"

    if number := tally.infinite.number:
        what = f"{count(number, 'value is', 'values are')} not finite, {at(tally.infinite)}"
        faults.add("not finite", where, what, "take out these cells, or give the counts they were made of: " + remedy)
    if not counts:
        return
    if number := tally.negative.number:
        said = "z-scored or corrected values" if tally.broken.number else "differences"
        what = f"{count(number, 'value is', 'values are')} negative, down to {tally.lowest:.4g}, {at(tally.negative)}"
        faults.add("negative", where, f"{what}: these are {said}, not counts", remedy)
    elif number := tally.broken.number:
        what = f"{count(number, 'value is', 'values are')} no whole numbers, {at(tally.broken)}"
        said = f"{what}, at most {tally.highest:.4g}: {_made_of(tally)}, not counts"
        faults.add("no counts", where, said, remedy)


def _made_of(tally: Tally) -> str:
    """What values that are no counts look like."""
    if tally.highest < LOG_CEILING and (level := _even(tally.exponential_B)):
        return f"log-normalised values (each cell's expm1 sums to about {level:,.0f})"
    if level := _even(tally.sums_B):
        return f"normalised values (each cell sums to about {level:,.4g})"
    return "logarithms or corrected values" if tally.highest < LOG_CEILING else "normalised or corrected values"


def _even(sums_B: NDArray[np.float64]) -> float:
    """The sum that nearly all cells share, 0 where they share none."""
    kept = sums_B[sums_B > 0]
    if len(kept) < 2:
        return 0.0
    middle = float(np.median(kept))
    return middle if float(np.median(np.abs(kept - middle))) < EVEN * middle else 0.0
