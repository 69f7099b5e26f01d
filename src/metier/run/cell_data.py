"""The tables of a job on cells, and which of their cells teach, choose and judge."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.core import DataError, RecipeError
from metier.core.rng import derive
from metier.data.cells import CellTable, read_cells, split_cells
from metier.data.records import Cells, Splits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from metier.recipe import CellsTask, DataSection, Recipe

    Rows = NDArray[np.int64]

JUDGING = ("validation", "test")
ANNOTATIONS = frozenset({"donor", "cell_type", "batch", "sample"})


def read_splits(recipe: Recipe, task: CellsTask) -> Splits:
    """The cells of every split; no cell stands in two of them.

    Raises:
        DataError: With everything that is wrong with a table, or cells that teach and judge.
    """
    section = recipe.data
    if section.format != "auto":
        raise RecipeError("cells have no format", where="data.format", hint="leave it out")
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
            said += check_proteins(table.panel.proteins, other, name)
            parts[name] = Cells(other, np.arange(len(other)))
            parts["train"], more = _apart(parts["train"], parts[name], name, section)
            said += more
    said += _shared(parts["validation"], parts["test"])
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


def check_proteins(wanted: Sequence[str], other: CellTable, name: str) -> list[str]:
    """Another table must have proteins that are predicted; a note on those that it lacks.

    Raises:
        DataError: If it has none of them.
    """
    there = set(other.panel.proteins)
    lacking = [protein for protein in wanted if protein not in there]
    if len(lacking) == len(wanted):
        what = f"has none of the {len(wanted)} proteins that are predicted, such as {wanted[0]}"
        raise DataError(what, where=other.where, hint="name a file of the same proteins, or rename them alike")
    return [f"{name} lacks {len(lacking)} of {len(wanted)} proteins: they are not judged."] if lacking else []


def _apart(train: Cells, other: Cells, name: str, section: DataSection) -> tuple[Cells, list[str]]:
    """The training cells that may stay.

    Raises:
        DataError: If training cells stand in the other split and `data.overlap` refuses them, or none is left.
    """
    twice = same_cells(train, other)
    if not len(twice):
        return train, []
    said = f"{len(twice):,} training cells also stand in {name} ({other.table.where})"
    if section.overlap == "refuse":
        where = f"{train.table.where}:{train.table.names[train.rows[twice[0]]]}"
        hint = "data.overlap=drop leaves them out of training; data.overlap=allow keeps them and the report says so"
        raise DataError(f"{said}, this one first", where=where, hint=hint)
    if section.overlap == "allow":
        return train, [f"{said}. They stay, as data.overlap=allow says: the figures flatter the tuned model."]
    if len(twice) == len(train):
        hint = f"name other cells for {name}"
        raise DataError(f"no training cell is left: all also stand in {name}", where=train.table.where, hint=hint)
    return Cells(train.table, np.delete(train.rows, twice)), [f"{said}. They are left out of training."]


def _shared(validation: Cells, test: Cells) -> list[str]:
    """A note on cells that both choose the best step and judge it."""
    twice = len(same_cells(validation, test)) if validation.table is not test.table else 0
    return [f"{twice:,} validation cells also stand in test: the best step is chosen by them."] if twice else []


def same_cells(one: Cells, other: Cells) -> Rows:
    """Places in `one` of cells that also stand in `other`: the same name, and the same counts of the genes both have.

    Barcodes repeat between runs of a sequencer by chance, so a name alone says little.
    """
    _, left, right = np.intersect1d(
        one.table.names[one.rows], other.table.names[other.rows], assume_unique=True, return_indices=True
    )
    genes = {gene: column for column, gene in enumerate(other.table.panel.genes)}
    columns = [(column, genes[gene]) for column, gene in enumerate(one.table.panel.genes) if gene in genes]
    if not len(left) or not columns:
        return left[:0]
    mine, theirs = (list(side) for side in zip(*columns, strict=True))
    return np.sort(left[_sums(one, left, mine) == _sums(other, right, theirs)])


def _sums(part: Cells, places: Rows, columns: list[int]) -> Any:
    return np.asarray(part.table.rna(part.rows[places])[:, columns].sum(axis=1)).ravel()


def cells_of(records: Any) -> Cells:
    """The records of a job on cells are cells of one table."""
    if not isinstance(records, Cells):
        raise TypeError(type(records).__name__)
    return records


def without_annotations(columns: Mapping[str, str]) -> dict[str, str]:
    """What `data.columns` says of the matrices, without what it says of each cell: other tables may not have that."""
    return {word: name for word, name in columns.items() if word not in ANNOTATIONS}


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
