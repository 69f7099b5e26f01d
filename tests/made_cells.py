"""Cells made for tests: a few cell types and donors, and proteins that follow genes."""

import warnings

import numpy as np
import pytest

anndata = pytest.importorskip("anndata")
mudata = pytest.importorskip("mudata")
pd = pytest.importorskip("pandas")
sparse = pytest.importorskip("scipy.sparse")

SYMBOLS = ("CD3E", "CD19", "CD14", "NKG7", "ACTB", "MS4A1", "LYZ", "GNLY", "PPBP", "CD8A")


def symbols(number):
    return [SYMBOLS[i] if i < len(SYMBOLS) else f"AB{i}X{i % 7}" for i in range(number)]


def synthetic(cells=120, genes=40, proteins=6, donors=2, seed=0):
    """Counts of three cell types and some donors; each protein follows one gene."""
    chance = np.random.default_rng(seed)
    kinds = chance.integers(0, 3, cells)
    level = chance.gamma(1.0, 1.0, (3, genes))
    rna = chance.poisson(level[kinds]).astype(np.float32)
    protein = chance.poisson(3 + 5 * rna[:, :proteins]).astype(np.float32)
    names = [f"cell{i}-1" for i in range(cells)]
    obs = pd.DataFrame(
        {"Donor_ID": [f"P{i % donors}" for i in range(cells)], "celltype.l1": np.array(["T", "B", "Mono"])[kinds]},
        names,
    )
    obs = obs.astype("category")
    left = anndata.AnnData(sparse.csr_matrix(rna), obs=obs, var=pd.DataFrame(index=symbols(genes)))
    right = anndata.AnnData(
        protein, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=[f"p{i}" for i in range(proteins)])
    )
    return left, right


def muon(**parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mudata.MuData(parts)


def write_h5mu(path, **parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        muon(**parts).write_h5mu(path)
    return path


def write_pair(folder, rna, proteins):
    rna.write_h5ad(folder / "rna.h5ad")
    proteins.write_h5ad(folder / "proteins.h5ad")
    return folder / "rna.h5ad", folder / "proteins.h5ad"
