"""A large synthetic set of cells, RNA and proteins in two h5ad files, written in chunks: memory stays flat.

Counts are drawn, so nothing can be learnt from them but how fast cells are read.

    python bench/synthetic_cells.py /tmp/cells --cells 1000000 --genes 4000 --density 0.02
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import h5py
import numpy as np

TEXT = h5py.string_dtype()
CHUNK = 1 << 16
DONORS = ("A", "B")


def write_rna(path: Path, cells: int, genes: int, density: float, *, seed: int = 0, at_once: int = 10_000) -> None:
    """An h5ad of counts with about that share of values above zero, and donors."""
    chance = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        frame(file, "obs", [f"cell{i}" for i in range(cells)], {"donor": [DONORS[i % 2] for i in range(cells)]})
        frame(file, "var", [f"GENE{i}" for i in range(genes)], {})
        matrix = group(file, "X", "csr_matrix", "0.1.0")
        matrix.attrs["shape"] = np.array([cells, genes])
        data, indices = (growing(matrix, name, kind) for name, kind in (("data", "f4"), ("indices", "i4")))
        starts = [np.zeros(1, np.int64)]
        for start in range(0, cells, at_once):
            rows = min(at_once, cells - start)
            # Drawing places with repeats and dropping the repeats costs one sort, where a full draw costs rows x genes.
            places = np.unique(chance.integers(0, rows * genes, int(rows * genes * density)))
            append(indices, (places % genes).astype(np.int32))
            append(data, 1 + chance.poisson(0.5, len(places)).astype(np.float32))
            lengths = np.bincount(places // genes, minlength=rows)
            starts.append(starts[-1][-1] + np.cumsum(lengths))
        matrix["indptr"] = np.concatenate(starts)
        finish(file)


def write_proteins(path: Path, cells: int, proteins: int, *, seed: int = 0, at_once: int = 100_000) -> None:
    """An h5ad of dense protein counts for the same cells."""
    chance = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        frame(file, "obs", [f"cell{i}" for i in range(cells)], {})
        frame(file, "var", [f"PROTEIN{i}" for i in range(proteins)], {})
        matrix = file.create_dataset("X", (cells, proteins), np.float32)
        matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, cells, at_once):
            stop = min(start + at_once, cells)
            matrix[start:stop] = chance.poisson(20, (stop - start, proteins))
        finish(file)


def group(parent: Any, name: str, kind: str, version: str) -> Any:
    """A group of anndata's format."""
    made = parent.create_group(name)
    made.attrs.update({"encoding-type": kind, "encoding-version": version})
    return made


def frame(file: Any, name: str, index: list[str], columns: dict[str, list[str]]) -> None:
    """A table of annotations."""
    made = group(file, name, "dataframe", "0.2.0")
    made.attrs["_index"] = "_index"
    made.attrs["column-order"] = np.array(list(columns), dtype=TEXT)
    for column, values in {"_index": index, **columns}.items():
        made.create_dataset(column, data=np.array(values, dtype=object), dtype=TEXT)
        made[column].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def growing(parent: Any, name: str, kind: str) -> Any:
    """An empty dataset that can be appended to."""
    return parent.create_dataset(
        name, (0,), kind, maxshape=(None,), chunks=(CHUNK,), compression="gzip", compression_opts=1
    )


def append(stored: Any, values: Any) -> None:
    """Put values at the end."""
    at = stored.shape[0]
    stored.resize((at + len(values),))
    stored[at:] = values


def finish(file: Any) -> None:
    """What else anndata expects of a file."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        group(file, name, "dict", "0.1.0")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=4000)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_rna(asked.folder / "rna.h5ad", asked.cells, asked.genes, asked.density, seed=asked.seed)
    write_proteins(asked.folder / "proteins.h5ad", asked.cells, asked.proteins, seed=asked.seed)
    for file in sorted(asked.folder.glob("*.h5ad")):
        print(f"{file}: {file.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
