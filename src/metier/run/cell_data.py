"""The tables of a job on cells, and which of their cells teach, choose and judge."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.core import DataError
from metier.core.rng import derive
from metier.data.cells import CellTable, read_cells, split_cells
from metier.data.records import Cells, Splits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metier.recipe import CellsTask, DataSection, Recipe

    Rows = NDArray[np.int64]

JUDGING = ("validation", "test")


def read_splits(recipe: Recipe, task: CellsTask) -> Splits:
    """The cells of every split; no cell stands in two of them.

    Raises:
        DataError: With everything that is wrong with a table, or cells that teach and judge.
    """
    section = recipe.data
    table = _read(section.train, section.proteins, section, task)
    shares = {name: share for name in JUDGING if isinstance(share := getattr(section, name), float)}
    rows, notes = split_cells(
        table, shares.get("validation", 0.0), shares.get("test", 0.0), seed=section.seed, group=section.group
    )
    parts = {name: Cells(table, found) for name, found in rows.items()}
    facts, said = [*table.notes, *notes], list[str]()
    for name in JUDGING:
        if name not in shares:
            other = _read(str(getattr(section, name)), None, section, task)
            facts += [f"{name}: {note}" for note in other.notes]
            said += _check_proteins(table, other, name)
            parts[name] = Cells(other, np.arange(len(other)))
            parts["train"], more = _apart(parts["train"], parts[name], name, section)
            said += more
    for name, part in parts.items():
        if section.max_rows is not None and len(part) > section.max_rows:
            parts[name] = Cells(part.table, _drawn(part.rows, section.max_rows, section.seed, name))
            said.append(f"{name}: {section.max_rows:,} of {len(part):,} cells are used, as data.max_rows says.")
    panel = table.panel
    return Splits(
        **parts,
        format="cells",
        reason=f"{len(table):,} cells, {len(panel.genes):,} genes, {len(panel.proteins):,} proteins",
        notes=tuple(said),
        fingerprint=_fingerprint(parts),
        facts=tuple(facts),
    )


def _read(file: str, proteins: str | None, section: DataSection, task: CellsTask) -> CellTable:
    return read_cells(file, proteins, columns=section.columns, group=section.group, organism=task.organism)


def _check_proteins(table: CellTable, other: CellTable, name: str) -> list[str]:
    """The other table must have proteins that are learnt.

    Raises:
        DataError: If it has none of them.
    """
    lacking = [protein for protein in table.panel.proteins if protein not in set(other.panel.proteins)]
    if len(lacking) == len(table.panel.proteins):
        what = f"has none of the {len(lacking)} proteins of the training table, such as {lacking[0]}"
        raise DataError(what, where=other.where, hint="name a file of the same proteins, or rename them alike")
    return [f"{name} lacks {len(lacking)} proteins: they are not judged."] if lacking else []


def _apart(train: Cells, other: Cells, name: str, section: DataSection) -> tuple[Cells, list[str]]:
    """The training cells that may stay: a cell of the same name with the same RNA is the same cell.

    Raises:
        DataError: If there are such cells and `data.overlap` refuses them.
    """
    _, left, right = np.intersect1d(
        train.table.names[train.rows], other.table.names[other.rows], assume_unique=True, return_indices=True
    )
    same = _sums(train, left) == _sums(other, right)
    twice = left[same]
    if not len(twice) or train.table.panel.genes != other.table.panel.genes:
        return train, []
    said = f"{len(twice):,} training cells also stand in {name} ({other.table.where})"
    if section.overlap == "refuse":
        where = f"{train.table.where}:{train[int(twice[0])].table.names[train.rows[twice[0]]]}"
        hint = "data.overlap=drop leaves them out of training; data.overlap=allow keeps them and the report says so"
        raise DataError(f"{said}, this one first", where=where, hint=hint)
    if section.overlap == "allow":
        return train, [f"{said}. They stay, as data.overlap=allow says: the figures flatter the tuned model."]
    return Cells(train.table, np.delete(train.rows, twice)), [f"{said}. They are left out of training."]


def _sums(part: Cells, places: Rows) -> Any:
    return np.asarray(part.table.rna(part.rows[places]).sum(axis=1)).ravel() if len(places) else np.empty(0)


def _drawn(rows: Rows, most: int, seed: int, name: str) -> Rows:
    chance = np.random.default_rng(derive(seed, "max_rows", name))
    return np.sort(chance.choice(rows, most, replace=False))


def _fingerprint(parts: dict[str, Cells]) -> str:
    digest = hashlib.sha256()
    seen: dict[int, str] = {}
    for name in ("train", *JUDGING):
        part = parts[name]
        whole = seen.setdefault(id(part.table), part.table.fingerprint())
        digest.update(f"{name}\n{whole}\n".encode())
        digest.update(part.rows.astype("<i8").tobytes())
    return digest.hexdigest()
