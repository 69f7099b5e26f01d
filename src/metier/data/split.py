"""Setting rows aside so that nothing about them is learnt: repeats and groups stay whole, classes keep their shares."""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, MutableSequence, Sequence
from math import ceil
from typing import overload

import numpy as np

from metier.core import DataError
from metier.core.rng import derive
from metier.data import similar
from metier.data.content import asked
from metier.data.faults import count
from metier.data.records import Labelled, Record, pick

FEW_ROWS = 30
"""Below this many, the 95 % interval of a share near 1/2 is wider than a third. Source: Wilson 1927."""


def draw(
    records: Sequence[Record], shares: Mapping[str, float], *, seed: int, group: str | None, file: str
) -> dict[str, Sequence[Record]]:
    """Rows for each named share and, under "train", the rest; the order of the file is kept in each.

    Exact and near duplicates stay on one side together, as do the rows of one group. Rows with labels are stratified.

    Raises:
        DataError: If a share of these rows is no row.
    """
    units = _units(records, group)
    labels = [sys.intern(record.label) if isinstance(record, Labelled) else "" for record in records]
    side = ["train"] * len(records)
    for name, share in shares.items():
        wanted = round_half_up(share * len(records))
        chosen = _chosen(
            units,
            array("q", (unit for unit in range(len(units)) if side[units[unit][0]] == "train")),
            labels,
            _quotas(labels, wanted),
            random.Random(derive(seed, "split", name)),  # noqa: S311 - a draw, no secret
        )
        if wanted < 1 or not chosen:
            raise _too_few(file, name, share, len(records), len(units))
        for row in chosen:
            side[row] = name
    return {name: pick(records, [row for row, of in enumerate(side) if of == name]) for name in ("train", *shares)}


def sample(records: Sequence[Record], most: int | None, *, seed: int, name: str) -> Sequence[Record]:
    """At most `most` records, drawn with the seed, in their old order."""
    if most is None or len(records) <= most:
        return records
    drawn = random.Random(derive(seed, "max_rows", name)).sample(range(len(records)), most)  # noqa: S311
    return pick(records, sorted(drawn))


def round_half_up(number: float) -> int:
    """The nearest integer; a half goes up, so that 10 % of 5 rows is one row."""
    return int(number + 0.5)


class _Units(Sequence[list[int]]):
    """Rows that must not be parted, ordered by the smallest of each unit."""

    def __init__(self, parent: MutableSequence[int]) -> None:
        root_N = np.fromiter((similar.root(parent, index) for index in range(len(parent))), np.int64, len(parent))
        self._rows = np.argsort(root_N, kind="stable")
        self._ends = np.cumsum(np.unique(root_N, return_counts=True)[1])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, unit: int) -> list[int]: ...
    @overload
    def __getitem__(self, unit: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, unit: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(unit, slice):
            return [self[i] for i in range(*unit.indices(len(self)))]
        rows: list[int] = self._rows[self._ends[unit - 1] if unit else 0 : self._ends[unit]].tolist()
        return rows


def _units(records: Sequence[Record], group: str | None) -> _Units:
    parent = similar.clusters(map(asked, records))
    if group is not None:
        first: dict[str, int] = {}
        for index, record in enumerate(records):
            similar.join(parent, index, first.setdefault(str(record.extras[group]), index))
    return _Units(parent)


def _quotas(labels: Sequence[str], wanted: int) -> Counter[str]:
    """How many rows of each label to take: largest remainders, so that they add up to `wanted`."""
    have = Counter(labels)
    exact = {label: wanted * number / len(labels) for label, number in have.items()}
    quotas = Counter({label: int(number) for label, number in exact.items()})
    rest = wanted - quotas.total()
    for label in sorted(exact, key=lambda label: (int(exact[label]) - exact[label], label))[:rest]:
        quotas[label] += 1
    return quotas


def _chosen(
    units: _Units, order: array[int], labels: Sequence[str], quotas: Counter[str], chance: random.Random
) -> list[int]:
    """Rows of the units in `order`, drawn at random: first those that fit the quotas, then those that fit their sum.

    The last rows of a label are never taken out of training.
    """
    left = Counter(labels[row] for unit in order for row in units[unit])
    chance.shuffle(order)
    chosen: list[int] = []
    wanted = quotas.total()
    open_quotas = Counter(quotas)
    for strict in (True, False):
        passed = array("q")
        for unit in order:
            if len(chosen) == wanted:
                return chosen
            rows = units[unit]
            need = Counter(labels[row] for row in rows)
            fits = need <= open_quotas if strict else len(chosen) + need.total() <= wanted
            if fits and need.total() < left.total() and all(left[label] > number for label, number in need.items()):
                chosen += rows
                open_quotas -= need
                left -= need
            else:
                passed.append(unit)
        order = passed
    return chosen


def _too_few(file: str, name: str, share: float, rows: int, units: int) -> DataError:
    needed = ceil(0.5 / share) + 1
    if rows >= needed and units < rows:
        what = (
            f"no {share:.0%} of {count(rows, 'row')} can be set aside for {name}: near copies and groups stay "
            f"together, and they form {count(units, 'block')} that are too large"
        )
        return DataError(what, where=file, hint=f"name a file of other rows with data.{name}=FILE")
    what = f"{count(rows, 'row')} are too few to set {share:.0%} aside for {name}"
    return DataError(what, where=file, hint=f"at least {needed} rows are needed, or name a file: data.{name}=FILE")
