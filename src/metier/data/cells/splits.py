"""Cells set aside so that no donor is on both sides where there are several, and cells dealt out to processes."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError
from metier.core.rng import derive
from metier.data.cells.matrix import Rows
from metier.data.cells.parts import Words
from metier.data.cells.table import NO_GROUP, CellTable
from metier.data.faults import count, listed
from metier.data.split import FEW_ROWS, round_half_up

DONOR_LIKE = ("donor", "sample", "batch")
"""What splits go by when nothing is named, the first that has several values."""
DONORS_FOR_VALIDATION = 3
"""With fewer donors left, whole ones for validation would leave too few to learn from."""


def split_cells(
    table: CellTable, validation: float, test: float, *, seed: int, group: str | None = None
) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Rows under "train" and, for each share above 0, under "validation" and "test"; and notes on how they were drawn.

    Args:
        table: The cells.
        validation: Share of all cells that choose the best step, or 0.
        test: Share of all cells that judge, or 0. Where a group column has several values whole groups are taken,
            those whose cells come nearest to the share.
        seed: The draw's seed.
        group: Column of `table.obs` to go by; None takes the donor, sample or batch; "" or "none" draws at random.

    Raises:
        DataError: If a share of these cells is no cell, or groups are asked for that do not exist.
    """
    _check_shares(table, validation, test)
    labels, word = _group_of(table, group)
    rest: Rows = np.arange(len(table))
    found: dict[str, Rows] = {}
    notes: list[str] = []
    for name, share, least in (("test", test, 2), ("validation", validation, DONORS_FOR_VALIDATION)):
        if share <= 0:
            continue
        chance, wanted = np.random.default_rng(derive(seed, "cells", name)), round_half_up(share * len(table))
        kinds = len(np.unique(labels[rest])) if labels is not None else 0
        if labels is not None and kinds >= least:
            found[name], said = _whole_groups(labels, rest, wanted, chance)
            notes.append(f"{name} is every cell of {word} {said}: {_share(found[name], table)}.")
        else:
            found[name] = _stratified(table, rest, wanted, chance)
            notes.append(
                f"{name} is drawn at random{_because(name, word, kinds, table)}, {_share(found[name], table)}."
            )
        rest = np.setdiff1d(rest, found[name])
    notes += [
        f"{name} has only {count(len(rows), 'cell')}: what it measures has a wide interval."
        for name, rows in found.items()
        if len(rows) < FEW_ROWS
    ]
    return {"train": rest, **found}, tuple(notes)


def _share(rows: Rows, table: CellTable) -> str:
    return f"{count(len(rows), 'cell')} ({len(rows) / len(table):.0%})"


def _because(name: str, word: str, kinds: int, table: CellTable) -> str:
    """How cells are drawn one by one, and why."""
    strata = ", in equal shares of each cell type" if "cell_type" in table.obs else ""
    if not word:
        return strata
    left = f"{count(kinds, f'{word} is', f'{word}s are')} left" if name == "validation" and kinds else f"one {word}"
    return f"{strata} (from the {word}s that are learnt: only {left})"


def _check_shares(table: CellTable, validation: float, test: float) -> None:
    if min(validation, test) < 0 or validation + test >= 1:
        what = (
            f"validation and test take {validation:.0%} and {test:.0%} of the cells, and nothing is left to learn from"
        )
        raise DataError(what, where="data.validation", hint="lower the shares, such as 0.1 each")
    for name, share in (("test", test), ("validation", validation)):
        needed = ceil(0.5 / share) + 1 if share else 0
        if len(table) < needed or round_half_up((validation + test) * len(table)) >= len(table):
            what = f"{count(len(table), 'cell is', 'cells are')} too few to set {share:.0%} aside for {name}"
            hint = f"at least {max(needed, 3)} cells are needed, or name a file: data.{name}=FILE"
            raise DataError(what, where=table.where, hint=hint)


def _group_of(table: CellTable, group: str | None) -> tuple[Words | None, str]:
    """The label of each cell that splits go by, and what to call it."""
    if group in NO_GROUP:
        return None, ""
    if group is None:
        usable = [word for word in DONOR_LIKE if word in table.obs]
        group = next((word for word in usable if 1 < len(np.unique(table.obs[word])) <= len(table) / 2), None)
        if group is None:
            return None, next((word for word in usable if len(np.unique(table.obs[word])) == 1), "")
    elif group not in table.obs:
        what = f"obs has no column {group!r}, which data.group names"
        raise DataError(what, where=table.where, hint=f"known are {listed(sorted(table.obs)) or 'none'}")
    labels = table.obs[group]
    if missing := int((labels == "").sum()):
        what = f"{count(missing, 'cell names', 'cells name')} no {group}: they may belong to either side"
        raise DataError(what, where=table.where, hint="fill it or take them out; data.group=none splits at random")
    if len(np.unique(labels)) < 2:
        what = f"every cell has the {group} {str(labels[0])!r}: no whole {group} can be set aside"
        raise DataError(what, where=table.where, hint="data.group=none splits at random")
    return labels, group


def _whole_groups(labels: Words, rest: Rows, wanted: int, chance: np.random.Generator) -> tuple[Rows, str]:
    """The cells of groups that come near to a number, never of all; the groups in words."""
    kinds, sizes = np.unique(labels[rest], return_counts=True)
    order = chance.permutation(len(kinds))
    chosen: list[int] = []
    total = 0
    for place in order:
        if len(chosen) < len(kinds) - 1 and abs(total + sizes[place] - wanted) < abs(total - wanted):
            chosen.append(int(place))
            total += int(sizes[place])
    if not chosen:
        chosen = [int(order[np.argmin(sizes[order])])]
    names = kinds[sorted(chosen)]
    return rest[np.isin(labels[rest], names)], listed(names.tolist())


def _stratified(table: CellTable, rest: Rows, wanted: int, chance: np.random.Generator) -> Rows:
    """That many cells, of each type about the same share.

    The cells of a type are put in random order and evenly onto a line from 0 to 1; the first on the line are taken.
    """
    types = table.obs["cell_type"][rest] if "cell_type" in table.obs else np.zeros(len(rest))
    _, kind, sizes = np.unique(types, return_inverse=True, return_counts=True)
    draw = chance.random(len(rest))
    order = np.lexsort((draw, kind))
    rank = np.empty(len(rest))
    rank[order] = np.arange(len(rest)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    line = (rank + 0.5) / sizes[kind]
    return np.sort(rest[np.lexsort((draw, line))[:wanted]])


def rank_rows(
    rows: NDArray[Any], rank: int, world_size: int, *, seed: int, epoch: int, drop_last: bool = False
) -> Rows:
    """The rows of one of several processes in one epoch, in a new order each epoch.

    Every process gets the same number. Without `drop_last` every row stands somewhere, and the first of the order stand
    twice where the number does not divide; with it the last of the order are left out.

    Raises:
        DataError: If there is no such process, or there are too few rows for each to have one.
    """
    if not 0 <= rank < world_size:
        what = f"rank {rank} of {world_size} processes does not exist"
        raise DataError(what, where="rank", hint="ranks go from 0 to the number of processes less one")
    if len(rows) < (world_size if drop_last else 1):
        what = f"{count(len(rows), 'cell')} for {count(world_size, 'process', 'processes')}"
        raise DataError(what, where="data", hint="start fewer processes, or give more cells")
    order = np.random.default_rng(derive(seed, "ranks", epoch)).permutation(np.asarray(rows, dtype=np.int64))
    each = len(rows) // world_size if drop_last else ceil(len(rows) / world_size)
    return np.resize(order, each * world_size)[rank::world_size]
