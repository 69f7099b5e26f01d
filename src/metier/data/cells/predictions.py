"""Predicted proteins as an h5ad that any anndata reads, written piece by piece and whole or not at all.

Shapes: B cells of the source, P proteins.
Source: anndata's on-disk format, anndata.readthedocs.io/en/latest/fileformat-prose.html.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError
from metier.core.files import staged_file
from metier.data.cells.matrix import Rows, StoredFile, package, readable
from metier.data.cells.parts import RNA
from metier.data.faults import count, listed

PREDICTED = "protein_predicted"
MATRIX_BYTES = 200_000_000
"""A source matrix that takes less goes with the predictions."""
CHUNK_BYTES = 1 << 20


def write_predictions(
    source: Any,
    predicted: Iterable[tuple[Rows, NDArray[Any]]],
    names: Sequence[str],
    output: str | Path,
    facts: Mapping[str, Any],
    *,
    modality: str | None = None,
    matrix_bytes: int = MATRIX_BYTES,
) -> Path:
    """Write a new h5ad with the source's cells and `obsm["protein_predicted"]`, in bounded memory.

    Args:
        source: The h5mu or h5ad that was predicted from, or the MuData or AnnData; it is never written to.
        predicted: Rows of the source's RNA and their values, shape (rows, P), in any order; a cell that is not among
            them is NaN, and `uns["metier"]["cells_without_prediction"]` counts them.
        names: The proteins; written to `uns["metier"]["proteins"]`.
        output: The file to write or replace.
        facts: What else stands in `uns["metier"]`: text, numbers, lists or mappings.
        modality: Which of a joint source's parts is the RNA, where its name does not say it.
        matrix_bytes: X goes along if it takes less than this; `uns["metier"]["X"]` says what was done.

    Raises:
        DataError: If values do not fit the cells and proteins, or the output is the source.
        StorageError: If the file cannot be written.
    """
    target = Path(output)
    if isinstance(source, str | Path) and target.exists() and target.samefile(source):
        raise DataError("is the file that was predicted from", where=str(target), hint="name another output file")
    if not names:
        raise DataError("there are no proteins to write", where=str(target), hint="name the panel's proteins")
    h5py = package("h5py")
    with staged_file(target) as staged:
        cells, said = _write_cells(source, staged, modality, matrix_bytes)
        with h5py.File(staged, "r+") as file:
            left = _write_values(file, predicted, cells, len(names), target)
            stated = {"proteins": list(names), "cells_without_prediction": left, "X": said}
            package("anndata.io").write_elem(file["uns"], "metier", _plain({**facts, **stated}))
    return target


def _write_cells(source: Any, staged: Path, modality: str | None, matrix_bytes: int) -> tuple[int, str]:
    """Cells, genes and, if it is small, X; the number of cells and what was done with X."""
    if isinstance(source, str | Path):
        return _copy_cells(Path(source), staged, modality, matrix_bytes)
    anndata = package("anndata")
    data = source
    if hasattr(source, "mod"):
        data = source.mod[_rna_of(list(source.mod), "MuData", modality)]
    size = 0 if data.isbacked else _bytes_of(data.X)
    keep = 0 < size < matrix_bytes
    with warnings.catch_warnings():
        # anndata tells that it makes text columns categorical in the copy; the caller's own object stays as it is.
        warnings.simplefilter("ignore")
        anndata.AnnData(X=data.X if keep else None, obs=data.obs.copy(), var=data.var.copy()).write_h5ad(staged)
    return int(data.n_obs), _said(size, keep=keep)


def _copy_cells(path: Path, staged: Path, modality: str | None, matrix_bytes: int) -> tuple[int, str]:
    root = StoredFile(path).open()
    with readable(path):
        group = root[f"mod/{_rna_of(list(root['mod']), str(path), modality)}"] if "mod" in root else root
        index = group["obs"][group["obs"].attrs["_index"]]
        cells = len(index["codes"] if hasattr(index, "keys") else index)
        size = _stored_bytes(group["X"]) if "X" in group else 0
    keep = 0 < size < matrix_bytes
    with package("h5py").File(staged, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("obs", "var", *(("X",) if keep else ())):
            group.copy(group[name], file, name)
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            file.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    root.close()
    return cells, _said(size, keep=keep)


def _rna_of(names: Sequence[str], where: str, modality: str | None) -> str:
    """The modality that holds the genes."""
    if modality in names:
        return str(modality)
    found = [name for name in names if "".join(filter(str.isalpha, name.lower())) in RNA]
    if len(found) != 1 and len(names) != 1:
        what = f"{listed(names)}: which of these is RNA is not clear"
        raise DataError(what, where=where, hint="name it: data.columns={rna: NAME}")
    return found[0] if found else names[0]


def _bytes_of(matrix: Any) -> int:
    if matrix is None:
        return 0
    return int(matrix.data.nbytes + matrix.indices.nbytes) if hasattr(matrix, "indices") else int(np.size(matrix)) * 4


def _stored_bytes(stored: Any) -> int:
    sets = [stored[name] for name in ("data", "indices") if name in stored] if hasattr(stored, "keys") else [stored]
    return sum(int(part.size) * part.dtype.itemsize for part in sets)


def _said(size: int, *, keep: bool) -> str:
    if keep:
        return "copied from the source"
    return (
        f"left out: {size / 1e6:,.0f} MB, see the source"
        if size
        else "left out: the source keeps it on disk or has none"
    )


def _write_values(
    file: Any, predicted: Iterable[tuple[Rows, NDArray[Any]]], cells: int, proteins: int, target: Path
) -> int:
    """Fill `obsm`; the number of cells that have no prediction."""
    chunk = max(1, min(max(cells, 1), CHUNK_BYTES // (4 * proteins)))
    stored = file["obsm"].create_dataset(
        PREDICTED, (cells, proteins), np.float32, chunks=(chunk, proteins), maxshape=(None, proteins), fillvalue=np.nan
    )
    stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    done_B = np.zeros(cells, bool)
    for rows, values in predicted:
        values_BP = np.asarray(values, dtype=np.float32)
        _check_block(rows, values_BP, done_B, proteins, target)
        order = np.argsort(rows, kind="stable")
        rows_in_order, at = rows[order], 0
        for run in np.split(rows_in_order, np.flatnonzero(np.diff(rows_in_order) != 1) + 1):
            if len(run):
                stored[run[0] : run[-1] + 1] = values_BP[order[at : at + len(run)]]
            at += len(run)
        done_B[rows] = True
    return int((~done_B).sum())


def _check_block(
    rows: Rows, values_BP: NDArray[np.float32], done_B: NDArray[np.bool_], proteins: int, target: Path
) -> None:
    what = ""
    if values_BP.shape != (len(rows), proteins):
        what = f"predictions of shape {values_BP.shape} for {count(len(rows), 'cell')} and {count(proteins, 'protein')}"
    elif len(rows) and not 0 <= rows.min() <= rows.max() < len(done_B):
        what = f"predictions for cell {rows.max():,} of a source that has {count(len(done_B), 'cell')}"
    elif done_B[rows].any() or len(np.unique(rows)) < len(rows):
        what = "a cell is predicted twice"
    elif wrong := int((~np.isfinite(values_BP)).sum()):
        what = f"{count(wrong, 'prediction is', 'predictions are')} not finite"
    if what:
        raise DataError(what, where=str(target), hint="nothing was written; predict again from the same source")


def _plain(value: Any) -> Any:
    """A value as anndata writes it: text, numbers, arrays and mappings of these; anything else as JSON."""
    if isinstance(value, Mapping):
        return {str(key).replace("/", "_"): _plain(inner) for key, inner in value.items()}
    if isinstance(value, str | bool | int | float | np.ndarray | np.generic):
        return value
    if isinstance(value, Sequence) and value and len({isinstance(item, str) for item in value}) == 1:
        if isinstance(value[0], str):
            return np.array(list(value), dtype=object)
        if all(isinstance(item, int | float) for item in value):
            return np.array(list(value))
    return json.dumps(value, ensure_ascii=False, default=str)
