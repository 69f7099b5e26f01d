"""Cells with their RNA and proteins, joined by name and checked whole, read by rows.

Shapes: B cells, G genes, P proteins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError
from metier.core.panel import Panel
from metier.data.cells.genes import gene_names, model_ids, protein_names, repeated
from metier.data.cells.matrix import Aligned, Matrix, Rows, blocks, dense, sparse
from metier.data.cells.parts import RAW, Frame, Opened, Part, Words, mixed_features, open_parts, words
from metier.data.cells.values import check_proteins, check_rna
from metier.data.faults import Faults, count, listed, nearest, refuse

MEMORY_BYTES = 1 << 30
"""A matrix that takes less than this is read whole; a larger one stays on disk."""
LEAST_SHARED = 0.5
"""Share of either side's cells that the other must have."""
MASK_LAYER = "mask"
NO_GROUP = frozenset({"", "none"})
OBS_COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "donor": ("donor", "donor_id", "individual", "individual_id", "patient", "patient_id", "subject", "subject_id"),
        "cell_type": ("cell_type", "celltype", "celltype_l1", "cell_type_l1", "annotation", "cell_annotation"),
        "batch": ("batch", "batch_id"),
        "sample": ("sample", "sample_id"),
    }
)
OTHER_COLUMNS = ("rna", "protein", "layer", "protein_layer", "mask", "symbols", "gene_ids", "protein_ids")


@dataclass(frozen=True, slots=True, eq=False)
class CellTable:
    """Cells, their RNA and their proteins; each cell has its place, from 0.

    Attributes:
        where: The file, or what the object was.
        names: Name of each cell.
        panel: The genes and proteins.
        obs: Under "donor", "cell_type", "batch" and "sample", as far as known, the value of each cell, "" for none;
            and under its own name the column to group by.
        notes: What was recognised, joined, dropped or is worth knowing.
        constant: Proteins that are the same in every cell or never measured.
        rna_source: The RNA's matrix and its row for each cell.
        protein_source: The same for proteins, None where there are none.
        mask_source: Which proteins were measured, None where every value that is no NaN was.
    """

    where: str
    names: Words
    panel: Panel
    obs: Mapping[str, Words]
    notes: tuple[str, ...]
    constant: tuple[str, ...]
    rna_source: Aligned
    protein_source: Aligned | None = None
    mask_source: Aligned | None = None

    @classmethod
    def of(cls, rna: Any, proteins: Any = None, **options: Any) -> CellTable:
        """The cells of an AnnData of RNA with one of proteins, or of a MuData; `options` as for `read_cells`.

        Raises:
            DataError: With everything that is wrong.
        """
        return read_cells(rna, proteins, **options)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def measured(self) -> bool:
        """Whether there are proteins."""
        return self.protein_source is not None

    @property
    def on_disk(self) -> bool:
        """Whether the RNA is left on disk."""
        return hasattr(self.rna_source.matrix, "file")

    def rna(self, rows: Rows) -> Any:
        """RNA counts of these cells, in this order: a float32 `csr_matrix`, shape (rows, G).

        Raises:
            DataError: If the file can no longer be read.
        """
        return sparse(self.rna_source.read(rows))

    def proteins(self, rows: Rows) -> NDArray[np.float32]:
        """Protein counts of these cells, in this order, NaN where not measured; shape (rows, P).

        Raises:
            DataError: If the file can no longer be read.
        """
        if self.protein_source is None:
            return np.empty((len(rows), 0), np.float32)
        return _measured(self.protein_source, self.mask_source, rows)

    def source_rows(self, rows: Rows) -> Rows:
        """Rows of the RNA's file or object for cells of this table."""
        return self.rna_source.rows[rows]

    def fingerprint(self) -> str:
        """Hex sha256 over names, annotations and values; how and where they are stored does not count.

        Raises:
            DataError: If the file can no longer be read.
        """
        digest = hashlib.sha256()
        panel = self.panel
        axes = {"g": panel.genes, "p": panel.proteins, "G": panel.gene_ids, "P": panel.protein_ids, "n": self.names}
        labelled: dict[str, Iterable[Any]] = {**axes, **{f"obs {name}": self.obs[name] for name in sorted(self.obs)}}
        for label, values in labelled.items():
            digest.update(f"\0{label}\0".encode())
            for value in values:
                digest.update(f"{value}\0".encode())
        for rows in blocks(len(self), len(self.panel.genes)):
            found = self.rna(rows)
            found.eliminate_zeros()
            for array in (np.diff(found.indptr).astype("<i8"), found.indices.astype("<i4"), found.data.astype("<f4")):
                digest.update(array.tobytes())
        for rows in blocks(len(self), len(self.panel.proteins)) if self.measured else ():
            block_BP = self.proteins(rows)
            gaps_BP = np.isnan(block_BP)
            digest.update(np.packbits(gaps_BP).tobytes())
            digest.update(np.where(gaps_BP, np.float32(0), block_BP).astype("<f4").tobytes())
        return digest.hexdigest()


def _measured(source: Aligned, mask: Aligned | None, rows: Rows) -> NDArray[np.float32]:
    values_BP = dense(source.read(rows))
    return values_BP if mask is None else np.where(dense(mask.read(rows)) != 0, values_BP, np.float32(np.nan))


def read_cells(
    file: Any,
    proteins: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    group: str | None = None,
    organism: Literal["human", "mouse"] | None = "human",
    with_proteins: bool = True,
    protein_values: Literal["counts", "any"] = "counts",
    memory_bytes: int = MEMORY_BYTES,
) -> CellTable:
    """Read, join and check cells.

    Args:
        file: Path of an h5mu, or of an h5ad of RNA; or a MuData or an AnnData of RNA.
        proteins: Path of an h5ad of proteins or an AnnData of them, joined by the names of the cells; None where
            `file` holds both.
        columns: Your name for "rna" and "protein" (modalities), "layer" and "protein_layer" ("raw.X" for raw.X),
            "mask" (a layer of the proteins, 0 where not measured), "symbols" (a column of var), "gene_ids" and
            "protein_ids" (a column of var or a table of name,id), "donor", "cell_type", "batch" and "sample".
        group: Column of obs that splits go by; kept in `obs` under its own name.
        organism: Whose genes the model knows; None accepts any.
        with_proteins: False reads RNA alone, to predict.
        protein_values: "any" takes proteins that are no counts.
        memory_bytes: A matrix that takes less is read whole; a larger one stays on disk.

    Raises:
        DataError: With everything that is wrong.
    """
    named = dict(columns or {})
    _check_words(named)
    opened = open_parts(file, proteins, named, with_proteins=with_proteins, memory_bytes=memory_bytes)
    faults, notes = Faults(opened.where), list[str]()
    sides = _sides(opened, named, faults)
    rna_rows, protein_rows = _joined(opened, faults, notes)
    panel = _panel(opened, named, organism, faults, notes)
    names = opened.rna.obs.names[rna_rows]
    obs = _annotations(opened, named, group, names, faults, notes)
    refuse(faults)
    rna, measured, mask = (
        Aligned(side, rows) if side else None
        for side, rows in zip(sides, (rna_rows, protein_rows, protein_rows), strict=True)
    )
    constant = _check_values(
        opened, panel, names, rna, measured, mask, faults, notes, counts=protein_values == "counts"
    )
    refuse(faults)
    if rna is None:
        raise DataError("has no RNA", where=opened.where, hint="give a matrix of cells x genes")
    return CellTable(opened.where, names, panel, MappingProxyType(obs), tuple(notes), constant, rna, measured, mask)


def _check_words(columns: Mapping[str, str]) -> None:
    known = (*OBS_COLUMNS, *OTHER_COLUMNS)
    faults = Faults("data.columns")
    for word in columns:
        if word not in known:
            near = nearest(word, known)
            hint = f"did you mean {near}?" if near else f"for cells it may name {', '.join(known)}"
            faults.add("unknown", f"data.columns.{word}", "is no word that cells know", hint)
    refuse(faults)


def _sides(opened: Opened, columns: Mapping[str, str], faults: Faults) -> tuple[Matrix | None, ...]:
    """The matrices of RNA, of proteins and of what was measured; what is wrong with them is added to `faults`."""
    rna, protein = opened.rna, opened.protein
    wanted = [(rna, columns.get("layer", "X"), "layer")]
    if protein is not None:
        wanted.append((protein, columns.get("protein_layer", "X"), "protein_layer"))
        mask = columns.get("mask", MASK_LAYER if MASK_LAYER in protein.layers else None)
        wanted += [(protein, mask, "mask")] if mask else []
    found: list[Matrix | None] = [_opened(part, layer, word, faults) for part, layer, word in wanted]
    for part in (rna, protein) if opened.apart else (rna,):
        if part and len(kinds := mixed_features(part)) > 1:
            said = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
            hint = "split it: adata[:, adata.var.feature_types == KIND].write_h5ad(FILE), one file for each kind"
            faults.add("mixed", part.where, f"mixes columns of several kinds: {said}", hint)
    return (*found, None, None)[:3]


def _opened(part: Part, layer: str, word: str, faults: Faults) -> Matrix | None:
    """A matrix of the shape that the part's names say."""
    try:
        part.check_layer(layer, word)
        found = part.matrix(layer)
        wanted = (len(part.obs.names), len(part.columns_of(layer).names))
    except DataError as error:
        for fault in error.faults:
            faults.add(fault.what, fault.where, fault.what, fault.hint)
        return None
    if found.shape != wanted:
        have, want = (f"{cells:,} x {columns:,}" for cells, columns in (found.shape, wanted))
        faults.add("shape", part.where, f"{layer} is {have}, but there are names for {want}", "write the file again")
        return None
    return found


def _joined(opened: Opened, faults: Faults, notes: list[str]) -> tuple[Rows, Rows]:
    """Rows of RNA and of proteins, cell by cell, in the order of the RNA."""
    rna, protein = opened.rna, opened.protein
    for part in (rna, protein):
        if part is None:
            continue
        if not len(part.obs.names):
            faults.add("no cells", part.where, "has no cells", "give a matrix of cells x genes")
        elif again := repeated(part.obs.names):
            what = f"{count(len(again), 'cell name stands', 'cell names stand')} more than once: {listed(again, 4)}"
            hint = "put the donor or run before the barcode, on both sides: adata.obs_names = donor + '_' + barcode"
            faults.add("repeated", part.where, what, hint)
    everyone = np.arange(len(rna.obs.names))
    if protein is None or faults:
        return everyone, np.arange(len(protein.obs.names) if protein else 0)
    left, right = rna.obs.names, protein.obs.names
    _, rna_rows, protein_rows = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    order = np.argsort(rna_rows)
    rna_rows, protein_rows = rna_rows[order], protein_rows[order]
    _check_join(opened, len(rna_rows), faults)
    dropped = [f"{len(side) - len(rna_rows):,} {kind}" for side, kind in ((left, "of RNA"), (right, "of proteins"))]
    if len(rna_rows) < max(len(left), len(right)):
        notes.append(f"{len(rna_rows):,} cells have both RNA and proteins; left out: {' and '.join(dropped)}.")
    if (np.diff(protein_rows) < 0).any():
        notes.append(f"{protein.where}: its cells stand in another order than the RNA's; they are joined by name.")
    return rna_rows, protein_rows


def _check_join(opened: Opened, shared: int, faults: Faults) -> None:
    """Enough cells must have the same name on both sides, and the names must be names."""
    left, right = opened.rna.obs.names, opened.protein.obs.names if opened.protein else opened.rna.obs.names
    where = opened.protein.where if opened.protein else opened.where
    if opened.apart and all(np.array_equal(side, np.arange(len(side)).astype(np.str_)) for side in (left, right)):
        what = "the cells have no names, only their numbers, on both sides"
        faults.add("no names", where, what, "set obs_names to the barcodes: cells are never matched by position")
    if shared >= LEAST_SHARED * max(len(left), len(right)):
        return
    examples = f"such as {left[0]} and {right[0]}"
    if not shared:
        what = f"none of its {len(right):,} cells has the name of one of the {len(left):,} cells of RNA ({examples})"
        if len(left) == len(right):
            what += "; the number is equal, but cells are never matched by position"
    else:
        what = f"only {shared:,} cells have both: of {len(left):,} of RNA and {len(right):,} of proteins ({examples})"
    faults.add("join", where, what, _join_hint(left, right, shared))


def _join_hint(left: Words, right: Words, shared: int) -> str:
    bare_left, bare_right = ({re.sub(r"[-_.]\d+$", "", name) for name in side.tolist()} for side in (left, right))
    if len(bare_left & bare_right) > max(shared, LEAST_SHARED * min(len(left), len(right))):
        return "the barcodes agree but for their ending (-1): write obs_names alike on both sides"
    if shared:
        return "if they do belong together, keep the shared cells on both sides: adata[adata.obs_names.isin(...)]"
    return "write obs_names alike on both sides"


def _panel(opened: Opened, columns: Mapping[str, str], organism: str | None, faults: Faults, notes: list[str]) -> Panel:
    rna, protein = opened.rna, opened.protein
    layer = columns.get("layer", "X")
    var = rna.columns_of(layer) if layer in {"X", *rna.layers} else rna.var
    genes, said = gene_names(var, rna.where, columns.get("symbols"), organism, faults)
    gene_ids, known = model_ids(var, genes, rna.where, columns.get("gene_ids"), "gene_ids", faults)
    notes += [f"{rna.where}: {note}." for note in (said, known) if note]
    if protein is None:
        return Panel(tuple(genes.tolist()), (), gene_ids, ())
    layer = columns.get("protein_layer", "X")
    var = protein.columns_of(layer) if layer in {"X", *protein.layers} else protein.var
    proteins = protein_names(var, protein.where, faults)
    protein_ids, known = model_ids(var, proteins, protein.where, columns.get("protein_ids"), "protein_ids", faults)
    notes += [f"{protein.where}: {note}." for note in (f"{len(proteins):,} proteins", known) if note]
    return Panel(tuple(genes.tolist()), tuple(proteins.tolist()), gene_ids, protein_ids)


def _annotations(
    opened: Opened, columns: Mapping[str, str], group: str | None, names: Words, faults: Faults, notes: list[str]
) -> dict[str, Words]:
    """What is known of each cell, from the RNA's annotations, those above it, or the proteins'."""
    frames = [frame for frame in (opened.rna.obs, opened.shared, opened.protein and opened.protein.obs) if frame]
    found: dict[str, Words] = {}
    for word, usual in OBS_COLUMNS.items():
        place = (
            _place(frames, columns[word], f"data.columns.{word}", faults) if word in columns else _usual(frames, usual)
        )
        values = _values(*place, names) if place else None
        if place and values is not None and (values != "").any():
            found[word] = values
            notes.append(f"{word} is obs[{place[1]!r}]: {count(len(np.unique(values)), 'value')}.")
    if group is not None and group not in NO_GROUP and group not in found:
        place = _place(frames, group, "data.group", faults)
        found |= {group: _values(*place, names)} if place else {}
    return found


def _place(frames: list[Frame], column: str, word: str, faults: Faults) -> tuple[Frame, str] | None:
    """The frame that has a column; a missing one is a fault."""
    for frame in frames:
        for name in (column, f"rna:{column}"):
            if name in frame.columns:
                return frame, name
    every = list(dict.fromkeys(name for frame in frames for name in frame.columns))
    near = nearest(column, every)
    hint = f"did you mean {near}?" if near else f"obs has {listed(every) or 'no columns'}"
    faults.add("no column", faults.file, f"obs has no column {column!r}, which {word} names", hint)
    return None


def _usual(frames: list[Frame], usual: tuple[str, ...]) -> tuple[Frame, str] | None:
    """The first column whose name is a usual one, whatever its case and punctuation."""
    for frame in frames:
        plain = {re.sub(r"[^a-z0-9]+", "_", name.rpartition(":")[2].lower()): name for name in reversed(frame.columns)}
        for word in usual:
            if word in plain:
                return frame, plain[word]
    return None


def _values(frame: Frame, column: str, names: Words) -> Words:
    """A column's value for each of these cells, "" for a cell that the frame does not have."""
    values = words(frame.get(column))
    if np.array_equal(frame.names, names):
        return values
    order = np.argsort(frame.names)
    place = order[np.searchsorted(frame.names, names, sorter=order).clip(max=len(order) - 1)]
    return np.where(frame.names[place] == names, values[place], "")


def _check_values(
    opened: Opened,
    panel: Panel,
    names: Words,
    rna: Aligned | None,
    measured: Aligned | None,
    mask: Aligned | None,
    faults: Faults,
    notes: list[str],
    *,
    counts: bool,
) -> tuple[str, ...]:
    """Look at every value once; the proteins that do not vary."""
    if rna is not None:
        where, remedy = opened.rna.where, _remedy(opened.rna, "layer")
        notes += check_rna(rna, names, np.array(panel.genes), where, remedy, faults)
    if measured is None or opened.protein is None:
        return ()
    more, constant = check_proteins(
        lambda rows: _measured(measured, mask, rows),
        names,
        np.array(panel.proteins),
        opened.protein.where,
        _remedy(opened.protein, "protein_layer"),
        faults,
        counts=counts,
    )
    notes += more
    return constant


def _remedy(part: Part, word: str) -> str:
    """How to name the counts, as far as the layers say."""
    usual = next((layer for layer in part.layers if layer.lower() in {"counts", "raw", "raw_counts"}), None)
    if usual:
        return f"give the raw counts: data.columns={{{word}: {usual}}} reads layers[{usual!r}]"
    if RAW in part.layers:
        return f"give the raw counts: data.columns={{{word}: {RAW}}} reads raw.X"
    have = f"this one has {listed(part.layers)}" if part.layers else "this one has no layers"
    return f"give the raw counts; data.columns={{{word}: NAME}} reads a layer ({have})"
