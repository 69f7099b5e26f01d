"""One modality of cells, out of a file or an object in memory: names, annotations and matrices behind one face."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.core import DataError
from metier.data.cells.matrix import AGAIN, Matrix, StoredFile, memory_matrix, package, readable, stored_matrix
from metier.data.faults import Faults, listed, nearest, refuse

Words = NDArray[np.str_]
RNA = frozenset({"rna", "gex", "geneexpression", "mrna"})
PROTEIN = frozenset({"prot", "protein", "proteins", "adt", "ab", "antibody", "antibodycapture"})
FEATURE_COLUMNS = ("feature_types", "feature_type")
RAW = "raw.X"


@dataclass(frozen=True, slots=True)
class Frame:
    """Annotations of cells, genes or proteins.

    Attributes:
        names: The index.
        columns: Names of the columns.
        get: The values of a column, by its name.
    """

    names: Words
    columns: tuple[str, ...]
    get: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One modality.

    Attributes:
        where: File and modality, for messages.
        obs: Annotations of its cells.
        var: Annotations of its genes or proteins.
        layers: Names of the layers, and "raw.X" where there is one.
        matrix: Opens "X", a layer or "raw.X".
        raw_var: Annotations of the columns of "raw.X".
    """

    where: str
    obs: Frame
    var: Frame
    layers: tuple[str, ...]
    matrix: Callable[[str], Matrix]
    raw_var: Callable[[], Frame]

    def columns_of(self, layer: str) -> Frame:
        """Annotations of the columns of a matrix."""
        return self.raw_var() if layer == RAW else self.var

    def check_layer(self, layer: str, word: str) -> None:
        """A named layer must be there.

        Raises:
            DataError: If it is not.
        """
        if layer != "X" and layer not in self.layers:
            near = nearest(layer, self.layers)
            hint = f"did you mean {near}?" if near else f"it has {listed(self.layers) or 'none'}"
            raise DataError(f"has no layer {layer!r}, which data.columns.{word} names", where=self.where, hint=hint)


@dataclass(frozen=True, slots=True)
class Opened:
    """What was handed in, taken apart.

    Attributes:
        where: The file, or what the object is.
        rna: The genes.
        protein: The proteins, None where none are asked for.
        shared: Annotations above the modalities, None where there are none.
        apart: Whether RNA and proteins were handed in as two things.
    """

    where: str
    rna: Part
    protein: Part | None
    shared: Frame | None
    apart: bool


def open_parts(
    file: Any, proteins: Any, columns: Mapping[str, str], *, with_proteins: bool, memory_bytes: int
) -> Opened:
    """Take a file or an object apart into RNA and proteins.

    Raises:
        DataError: If a file cannot be read, or RNA or proteins are not to be found.
    """
    if with_proteins and proteins is not None:
        return _two(file, proteins, columns, memory_bytes)
    where, found, shared = _modalities(file, memory_bytes, "AnnData")
    rna = _chosen(where, found, columns.get("rna"), "rna", RNA)
    if not with_proteins:
        return Opened(where, rna, None, shared, apart=False)
    if len(found) == 1:
        what, hint = "holds RNA only", "name the h5ad file of the proteins: data.proteins=FILE; or give an h5mu"
        raise DataError(what, where=where, hint=hint)
    protein = _chosen(where, found, columns.get("protein"), "protein", PROTEIN)
    return Opened(where, rna, protein, shared, apart=False)


def _two(file: Any, proteins: Any, columns: Mapping[str, str], memory_bytes: int) -> Opened:
    """RNA and proteins out of two files or objects; what is wrong with either is told at once."""
    opened, gathered = [], []
    for given, label in ((file, "AnnData"), (proteins, "AnnData of proteins")):
        try:
            opened.append(_modalities(given, memory_bytes, label))
        except DataError as error:
            gathered.append(Faults.of(error))
    refuse(*gathered)
    (where, found, shared), (other, beside, _) = opened
    if any(_word(name) in PROTEIN for name in found):
        what = f"holds proteins already ({listed(list(found))}), and data.proteins names others"
        raise DataError(what, where=where, hint="name one of them: leave data.proteins out, or give an h5ad of RNA")
    rna = _chosen(where, found, columns.get("rna"), "rna", RNA)
    return Opened(where, rna, _chosen(other, beside, columns.get("protein"), "protein", PROTEIN), shared, apart=True)


def _word(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _chosen(where: str, found: Mapping[str, Part], named: str | None, word: str, usual: frozenset[str]) -> Part:
    """The modality that is named, or the only one, or the one whose name says it."""
    have = listed(list(found))
    if named is not None and named not in found:
        hint = f"it has {have}" if list(found) != [""] else "it is a single matrix: leave the word out"
        raise DataError(f"has no modality {named!r}, which data.columns.{word} names", where=where, hint=hint)
    if named is not None:
        return found[named]
    if list(found) == [""]:
        return found[""]
    matching = [name for name in found if _word(name) in usual]
    if len(matching) == 1:
        return found[matching[0]]
    kind = "RNA" if word == "rna" else "proteins"
    what = f"{have}: several of these could be {kind}" if matching else f"{have}: none of these is known as {kind}"
    raise DataError(what, where=where, hint=f"say which it is: data.columns={{{word}: NAME}}")


def _modalities(given: Any, memory_bytes: int, label: str) -> tuple[str, dict[str, Part], Frame | None]:
    """Where, the modalities by name (one without a name for plain AnnData), and annotations above them."""
    if isinstance(given, str | Path):
        return _of_file(Path(given), memory_bytes)
    if hasattr(given, "mod"):
        found = {name: _of_memory(part, f"MuData:{name}", memory_bytes) for name, part in given.mod.items()}
        return "MuData", found, _memory_frame(given.obs)
    if hasattr(given, "obs_names") and hasattr(given, "var_names"):
        return label, {"": _of_memory(given, label, memory_bytes)}, None
    what = f"is a {type(given).__name__}"
    raise DataError(what, where="data", hint="give the path of an h5mu or h5ad file, an AnnData or a MuData")


def _of_file(path: Path, memory_bytes: int) -> tuple[str, dict[str, Part], Frame | None]:
    where, file = str(path), StoredFile(path)
    root = file.open()
    with readable(path):
        names, keys = (list(root["mod"]) if "mod" in root else []), set(root)
    if names:
        with readable(path):
            shared = _stored_frame(root["obs"], where) if "obs" in root else None
        return where, {name: _of_group(file, f"mod/{name}/", memory_bytes) for name in names}, shared
    if {"obs", "var"} <= keys:
        return where, {"": _of_group(file, "", memory_bytes)}, None
    what = f"is HDF5, but neither h5mu nor h5ad: it holds {listed(sorted(keys)) or 'nothing'}"
    hint = "convert it: scanpy.read_10x_h5(...) reads 10x files, .write_h5ad(...) writes"
    raise DataError(what, where=where, hint=hint)


def _of_group(file: StoredFile, prefix: str, memory_bytes: int) -> Part:
    where = f"{file.path}:{prefix.strip('/').removeprefix('mod/')}".rstrip(":")
    with readable(file.path):
        group = file.open()[prefix or "/"]
        obs, var = (_stored_frame(group[name], f"{where}:{name}") for name in ("obs", "var"))
        layers = (*group.get("layers", ()), *([RAW] if "raw" in group and "X" in group["raw"] else []))
        has_matrix = "X" in group

    def matrix(layer: str) -> Matrix:
        if layer == "X" and not has_matrix:
            raise DataError("has no matrix X", where=where, hint=f"name a layer: {listed(layers) or 'there is none'}")
        key = {"X": "X", RAW: "raw/X"}.get(layer, f"layers/{layer}")
        return stored_matrix(file, prefix + key, memory_bytes=memory_bytes)

    def raw_var() -> Frame:
        with readable(file.path):
            return _stored_frame(file.open()[f"{prefix}raw/var"], f"{where}:raw/var")

    return Part(where, obs, var, layers, matrix, raw_var)


def _of_memory(data: Any, where: str, memory_bytes: int) -> Part:
    layers = (*data.layers, *([RAW] if data.raw is not None else []))
    backed = bool(getattr(data, "isbacked", False))
    if backed and data.is_view:
        raise DataError("is a view of a file", where=where, hint="call .to_memory() on it first")

    def matrix(layer: str) -> Matrix:
        if backed and layer in {"X", RAW}:
            key = "X" if layer == "X" else "raw/X"
            return stored_matrix(StoredFile(Path(data.filename)), key, memory_bytes=memory_bytes)
        values = data.X if layer == "X" else data.raw.X if layer == RAW else data.layers[layer]
        return memory_matrix(values, f"{where}:{layer}")

    frames = _memory_frame(data.obs), _memory_frame(data.var)
    return Part(where, *frames, layers, matrix, lambda: _memory_frame(data.raw.var))


def _memory_frame(frame: Any) -> Frame:
    columns = [str(name) for name in frame.columns]
    return Frame(
        np.asarray(frame.index, dtype=np.str_), tuple(columns), lambda name: frame.iloc[:, columns.index(name)].array
    )


def _stored_frame(stored: Any, where: str) -> Frame:
    index = stored.attrs.get("_index") if hasattr(stored, "keys") else None
    if index is None:
        what = "is laid out as anndata did before version 0.7"
        raise DataError(what, where=where, hint="read and write the file once with a current anndata")
    columns = tuple(str(name) for name in stored.attrs.get("column-order", ()))
    names = np.asarray(_element(stored, str(index), where), dtype=np.str_)
    if names.ndim != 1:
        raise DataError("is damaged: its index is no list of names", where=where, hint=AGAIN)

    def get(name: str) -> Any:
        found = _element(stored, name, f"{where}:{name}")
        if np.shape(found) != names.shape:
            what = f"is damaged: it has not one value for each of {len(names):,} names"
            raise DataError(what, where=f"{where}:{name}", hint=AGAIN)
        return found

    return Frame(names, columns, get)


def _element(stored: Any, name: str, where: str) -> Any:
    """One column.

    Raises:
        DataError: If anndata cannot read it.
    """
    read = package("anndata.io").read_elem
    try:
        return read(stored[name])
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise DataError(f"cannot be read: {said}", where=where, hint="write the file again with anndata") from error


def words(values: Any) -> Words:
    """A column as text; what is missing is the empty word."""
    if hasattr(values, "categories"):
        kinds = np.array(["", *_texts(np.asarray(values.categories, dtype=object))], dtype=np.str_)
        return kinds[np.asarray(values.codes, dtype=np.int64) + 1]
    return np.array(_texts(np.asarray(values, dtype=object)), dtype=np.str_).reshape(len(values))


def _texts(values: NDArray[np.object_]) -> list[str]:
    missing = package("pandas").isna(values)
    return ["" if gone else str(value).strip() for value, gone in zip(values, missing, strict=True)]


def mixed_features(part: Part) -> dict[str, int]:
    """How many columns of each kind a matrix has, where it says that it mixes genes with something else."""
    column = next((name for name in FEATURE_COLUMNS if name in part.var.columns), None)
    if column is None:
        return {}
    kinds, numbers = np.unique(words(part.var.get(column)), return_counts=True)
    return dict(zip(kinds.tolist(), numbers.tolist(), strict=True)) if len(kinds) > 1 else {}
