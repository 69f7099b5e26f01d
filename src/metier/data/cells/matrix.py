"""A matrix of cells, in memory or left on disk, of which only the rows asked for are read.

Shapes: B cells, N columns (genes or proteins), V stored values.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError
from metier.data.cells.looking import Facts, facts, look_through
from metier.data.faults import excerpt

Rows = NDArray[np.int64]
VALUES_AT_ONCE = 1 << 24
"""Values of a dense block while a matrix is walked through: 64 MiB, whatever the number of cells."""
CHUNK_CACHE_BYTES = 1 << 26
"""Compressed chunks kept unpacked, so that neighbouring rows do not unpack one chunk again and again."""
AGAIN = "write the file again"
SIGNATURES = {b"\x1f\x8b": "gzip: unpack it first", b"PK": "zip: unpack it first"}


def package(name: str) -> Any:
    """A package that only cell data needs.

    Raises:
        DataError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = f"cells need the package {name.partition('.')[0]}, which is not installed"
        raise DataError(what, where="data", hint="pip install 'metier[bio]'") from error


class Matrix(Protocol):
    """Cells by columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of columns."""
        ...

    def read(self, rows: Rows) -> Any:
        """These rows in this order, float32, shape (rows, N): sparse where the matrix is, else dense."""
        ...


def sparse(block_BN: Any) -> Any:
    """A block as a `csr_matrix`, its columns in order and each at most once."""
    from scipy import sparse as scipy_sparse

    found = scipy_sparse.csr_matrix(block_BN)
    found.sum_duplicates()
    return found


def dense(block_BN: Any) -> NDArray[np.float32]:
    """A block as an array of its own."""
    return np.asarray(block_BN.toarray() if hasattr(block_BN, "toarray") else block_BN, dtype=np.float32)


def blocks(cells: int, columns: int) -> Iterator[Rows]:
    """All rows, as many at once as fit into bounded memory; the cuts depend on the shape alone."""
    step = max(1, VALUES_AT_ONCE // max(1, columns))
    for start in range(0, cells, step):
        yield np.arange(start, min(start + step, cells))


def narrowed(values: Any) -> Any:
    """Values as float32; what is too large becomes infinite, and the check of values then names it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Some rows of a matrix, in the order of a table.

    Attributes:
        matrix: Where the values are.
        rows: Row of the matrix for each cell of the table.
    """

    matrix: Matrix
    rows: Rows

    def read(self, rows: Rows) -> Any:
        """The cells at these places of the table."""
        return self.matrix.read(self.rows[rows])


@dataclass(frozen=True, slots=True)
class MemoryMatrix:
    """A matrix that fits.

    Attributes:
        values: A `csr_matrix` or an array, float32.
    """

    values: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of columns."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def read(self, rows: Rows) -> Any:
        """A copy of these rows."""
        return self.values[rows]


class StoredFile:
    """An HDF5 file, looked through once, and opened anew in each process that reads it: handles survive no fork."""

    def __init__(self, path: Path) -> None:
        """Remember the path; nothing is opened yet."""
        self.path = path
        self._seen: Facts | None = None
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the path, and which file was looked through."""
        return {"path": self.path, "_seen": self._seen, "_opened": None}

    def open(self) -> Any:
        """The open `h5py.File`.

        Raises:
            DataError: If it is no whole, regular HDF5 file, if it has changed since it was looked through, or h5py is
                missing.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._open())
        return self._opened[1]

    def _open(self) -> Any:
        h5py = package("h5py")
        _check_regular(self.path)
        with readable(self.path):
            with self.path.open("rb") as file:
                start = file.read(8)
            if h5py.is_hdf5(self.path):
                return self._looked_through(lambda: h5py.File(self.path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES))
        known = next((said for sign, said in SIGNATURES.items() if start.startswith(sign)), None)
        what = f"is no HDF5 file, it begins with {start!r}" + (f" ({known})" if known else "")
        raise DataError(what, where=str(self.path), hint="cells come as h5mu or h5ad, written by mudata or anndata")

    def _looked_through(self, opened: Callable[[], Any]) -> Any:
        now = facts(self.path)
        if self._seen is None:
            look_through(self.path)
            self._seen = now
        found = opened()
        if facts(self.path) != self._seen:
            found.close()
            hint = "start again; while a run reads a file, write new cells to another one"
            raise DataError("has changed since it was looked through", where=str(self.path), hint=hint)
        return found


def _check_regular(path: Path) -> None:
    try:
        exists, regular = path.exists(), path.is_file()
        size = path.stat().st_size if regular else 0
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), hint="check its permissions") from error
    if not exists:
        raise DataError("no such file", where=str(path), hint=f"paths are relative to {Path.cwd()}")
    if not regular:
        kind = "a folder" if path.is_dir() else "no regular file"
        raise DataError(f"is {kind}", where=str(path), hint="name one h5mu or h5ad file; zarr stores are not read")
    if not size:
        raise DataError("is empty (0 bytes)", where=str(path), hint="write or copy it again")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the HDF5 library's words into ours.

    Raises:
        DataError: If the file ends early, a part is missing or a block cannot be unpacked.
    """
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        said = str(error)
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "it is gone"
        if "truncated" in said:
            what = f"is cut short ({size}): the copy or the download did not finish"
        else:
            what = f"cannot be read ({size}): {excerpt(said.strip(chr(34)), 160)}"
        raise DataError(what, where=str(path), hint="copy or write the file again") from error


@dataclass(frozen=True, slots=True)
class StoredSparse:
    """A CSR matrix left on disk; only where each row begins is kept in memory.

    Attributes:
        file: The file.
        key: The group in it.
        shape: Number of cells and of columns.
        starts: First value of each row and the end of the last, shape (B + 1,).
    """

    file: StoredFile
    key: str
    shape: tuple[int, int]
    starts: Rows

    def read(self, rows: Rows) -> Any:
        """These rows; each run of neighbours is one read.

        Raises:
            DataError: If the file cannot be read or names columns that do not exist.
        """
        from scipy import sparse as scipy_sparse

        order, back = np.unique(rows, return_inverse=True)
        lengths = self.starts[order + 1] - self.starts[order]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        data_V, columns_V = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int32)
        with readable(self.file.path):
            group, at = self.file.open()[self.key], 0
            stored_data, stored_columns = group["data"], group["indices"]
            for first, last in _runs(order):
                low, high = self.starts[first], self.starts[last]
                here = slice(at, at + int(high - low))
                data_V[here] = narrowed(stored_data[low:high])
                columns_V[here] = stored_columns[low:high]
                at = here.stop
        if len(columns_V) and not 0 <= columns_V.min() <= columns_V.max() < self.shape[1]:
            what = f"the sparse matrix {self.key} names columns that do not exist: it is damaged"
            raise DataError(what, where=str(self.file.path), hint=AGAIN)
        block_BN = scipy_sparse.csr_matrix((data_V, columns_V, starts), shape=(len(order), self.shape[1]))
        return block_BN if np.array_equal(order, rows) else block_BN[back]


@dataclass(frozen=True, slots=True)
class StoredDense:
    """A dense matrix left on disk.

    Attributes:
        file: The file.
        key: The dataset in it.
        shape: Number of cells and of columns.
    """

    file: StoredFile
    key: str
    shape: tuple[int, int]

    def read(self, rows: Rows) -> NDArray[np.float32]:
        """These rows; each run of neighbours is one read.

        Raises:
            DataError: If the file cannot be read.
        """
        order, back = np.unique(rows, return_inverse=True)
        block_BN, at = np.empty((len(order), self.shape[1]), np.float32), 0
        with readable(self.file.path):
            stored = self.file.open()[self.key]
            for first, last in _runs(order):
                block_BN[at : at + last - first] = narrowed(stored[first:last])
                at += last - first
        return block_BN if np.array_equal(order, rows) else block_BN[back]


def _runs(order: Rows) -> list[tuple[int, int]]:
    """Sorted rows as half-open ranges of neighbours."""
    if not len(order):
        return []
    cuts = np.flatnonzero(np.diff(order) != 1) + 1
    first, last = order[np.concatenate([[0], cuts])], order[np.concatenate([cuts - 1, [-1]])] + 1
    return [(int(a), int(b)) for a, b in zip(first, last, strict=True)]


def stored_matrix(file: StoredFile, key: str, *, memory_bytes: int) -> Matrix:
    """The matrix under a key of a file, read whole if it takes less than `memory_bytes`.

    Raises:
        DataError: If it is damaged, holds no numbers, or is stored by columns and too large to turn round.
    """
    where = f"{file.path}:{key}"
    with readable(file.path):
        stored = file.open()[key]
        encoding = str(stored.attrs.get("encoding-type", ""))
        if not hasattr(stored, "keys"):
            return _dense_matrix(file, key, stored, where, memory_bytes)
        if encoding not in {"csr_matrix", "csc_matrix"}:
            what = f"is stored as {encoding or 'something unnamed'}, neither dense nor a sparse matrix"
            raise DataError(what, where=where, hint="read and write the file with anndata 0.8 or newer")
        data, indices, indptr = (stored[name] for name in ("data", "indices", "indptr"))
        shape = np.asarray(stored.attrs["shape"])
        whole = all(len(getattr(part, "shape", None) or ()) == 1 for part in (data, indices, indptr))
        if not whole or shape.shape != (2,) or shape.dtype.kind not in "iu":
            raise DataError("the sparse matrix is damaged: a part of it is none", where=where, hint=AGAIN)
        lines, width = map(int, shape if encoding == "csr_matrix" else shape[::-1])
        starts = np.asarray(indptr[:], dtype=np.int64)
        held, columns = len(data), len(indices)
        _check_numbers(data.dtype, where)
    if len(starts) != lines + 1 or starts[0] or (np.diff(starts) < 0).any() or not starts[-1] == held == columns:
        what = f"the sparse matrix of {lines:,} x {width:,} is damaged: its parts do not fit together"
        raise DataError(what, where=where, hint=AGAIN)
    small = held * 8 < memory_bytes
    found = StoredSparse(file, key, (lines, width), starts)
    if encoding == "csr_matrix":
        return MemoryMatrix(found.read(np.arange(lines))) if small else found
    if small:
        return MemoryMatrix(found.read(np.arange(lines)).T.tocsr())
    raise DataError(
        f"is stored by columns (CSC, {held:,} values): cells cannot be read one by one",
        where=where,
        hint="store it by rows: adata.X = adata.X.tocsr(), then write the file again",
    )


def _dense_matrix(file: StoredFile, key: str, stored: Any, where: str, memory_bytes: int) -> Matrix:
    _check_numbers(stored.dtype, where)
    if len(stored.shape) != 2:
        raise DataError(f"has {len(stored.shape)} axes, not cells x columns", where=where, hint=AGAIN)
    found = StoredDense(file, key, (int(stored.shape[0]), int(stored.shape[1])))
    small = stored.size * 4 < memory_bytes
    return MemoryMatrix(found.read(np.arange(found.shape[0]))) if small else found


def memory_matrix(values: Any, where: str) -> Matrix:
    """A matrix that the caller holds; it is never written to.

    Raises:
        DataError: If it is neither an array nor a scipy matrix of numbers.
    """
    from scipy import sparse as scipy_sparse

    if scipy_sparse.issparse(values):
        _check_numbers(values.dtype, where)
        return MemoryMatrix(scipy_sparse.csr_matrix(narrowed(values)))
    if isinstance(values, np.ndarray) and values.ndim == 2:
        _check_numbers(values.dtype, where)
        return MemoryMatrix(narrowed(np.asarray(values)))
    what = "has no matrix" if values is None else f"is a {type(values).__name__}, neither an array nor a scipy matrix"
    raise DataError(what, where=where, hint="fill it, or call adata.to_memory() first")


def _check_numbers(dtype: np.dtype[Any], where: str) -> None:
    if dtype.kind not in "biuf":
        raise DataError(f"holds {dtype}, no numbers", where=where, hint="store the counts as numbers")
