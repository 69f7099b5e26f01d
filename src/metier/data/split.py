"""Setting rows aside so that nothing about them is learnt: repeats and groups stay whole, classes keep their shares."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import ceil

from metier.core import DataError
from metier.core.rng import derive
from metier.data import similar
from metier.data.content import asked
from metier.data.faults import count
from metier.data.records import Labelled, Record

FEW_ROWS = 30
"""Below this many, the 95 % interval of a share near 1/2 is wider than a third. Source: Wilson 1927."""


def draw(
    records: Sequence[Record], shares: Mapping[str, float], *, seed: int, group: str | None, file: str
) -> dict[str, list[Record]]:
    """Rows for each named share and, under "train", the rest; the order of the file is kept in each.

    Exact and near duplicates stay on one side together, as do the rows of one group. Rows with labels are stratified.

    Raises:
        DataError: If a share of these rows is no row.
    """
    units = _units(records, group)
    labels = [record.label if isinstance(record, Labelled) else "" for record in records]
    side = ["train"] * len(records)
    for name, share in shares.items():
        wanted = round_half_up(share * len(records))
        chosen = _chosen(
            {key: rows for key, rows in units.items() if side[rows[0]] == "train"},
            labels,
            _quotas(labels, wanted),
            random.Random(derive(seed, "split", name)),  # noqa: S311 - a draw, no secret
        )
        if wanted < 1 or not chosen:
            raise _too_few(file, name, share, len(records), len(units))
        for row in chosen:
            side[row] = name
    return {
        name: [record for record, of in zip(records, side, strict=True) if of == name] for name in ("train", *shares)
    }


def sample(records: Sequence[Record], most: int | None, *, seed: int, name: str) -> list[Record]:
    """At most `most` records, drawn with the seed, in their old order."""
    if most is None or len(records) <= most:
        return list(records)
    drawn = random.Random(derive(seed, "max_rows", name)).sample(range(len(records)), most)  # noqa: S311
    return [records[index] for index in sorted(drawn)]


def round_half_up(number: float) -> int:
    """The nearest integer; a half goes up, so that 10 % of 5 rows is one row."""
    return int(number + 0.5)


def _units(records: Sequence[Record], group: str | None) -> dict[int, list[int]]:
    """Rows that must not be parted, by the smallest of them."""
    parent = similar.clusters([asked(record) for record in records])
    if group is not None:
        first: dict[str, int] = {}
        for index, record in enumerate(records):
            similar.join(parent, index, first.setdefault(str(record.extras[group]), index))
    units: dict[int, list[int]] = defaultdict(list)
    for index in range(len(parent)):
        units[similar.root(parent, index)].append(index)
    return units


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
    units: Mapping[int, list[int]], labels: Sequence[str], quotas: Counter[str], chance: random.Random
) -> list[int]:
    """Rows of units drawn at random: first those that fit the quotas, then those that fit their sum.

    The last rows of a label are never taken out of training.
    """
    left = Counter(labels[row] for rows in units.values() for row in rows)
    order = list(units)
    chance.shuffle(order)
    chosen: list[int] = []
    wanted = quotas.total()
    open_quotas = Counter(quotas)
    for strict in (True, False):
        for key in list(order):
            need = Counter(labels[row] for row in units[key])
            fits = need <= open_quotas if strict else len(chosen) + need.total() <= wanted
            if fits and need.total() < left.total() and all(left[label] > number for label, number in need.items()):
                chosen += units[key]
                open_quotas -= need
                left -= need
                order.remove(key)
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
