"""What a network for cells is made of, how it reads a panel, and what names of genes and antibodies mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from metier.core import ModelError
from metier.core.panel import Panel

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TransformName = Literal["clr", "log1p", "minmax", "none"]
ALIASES = {
    "B7H1": "CD274",
    "PDL1": "CD274",
    "PDCD1": "CD279",
    "PD1": "CD279",
    "CTLA4": "CD152",
    "LAG3": "CD223",
    "TIM3": "CD366",
    "HAVCR2": "CD366",
    "OX40": "CD134",
    "ICOS": "CD278",
    "BTLA": "CD272",
    "IL7R": "CD127",
    "IL7RA": "CD127",
    "IL7RALPHA": "CD127",
    "IL2RA": "CD25",
    "IL3RA": "CD123",
    "CD3D": "CD3",
    "CD3E": "CD3",
    "CD3G": "CD3",
    "CD8A": "CD8",
    "CD4T": "CD4",
    "NCAM": "CD56",
    "NCAM1": "CD56",
    "FCGR3A": "CD16",
    "MS4A1": "CD20",
    "FUT4": "CD15",
    "SELL": "CD62L",
    "LSELECTIN": "CD62L",
    "CCR7": "CD197",
    "CKIT": "CD117",
    "PECAM": "CD31",
    "PECAM1": "CD31",
    "EPCAM": "CD326",
    "LAMP1": "CD107A",
    "TCRGAMMADELTA": "TCRGD",
    "TCRALPHABETA": "TCRAB",
    "MHCII": "HLADR",
}
"""Names of one antibody target, brought to one: (as `protein_keys` writes it, its common name)."""


@dataclass(frozen=True, slots=True)
class CellConfig:
    """What a network is made of.

    Attributes:
        genes: Genes of the pretraining.
        proteins: Proteins of the pretraining.
        new_genes: Genes that came with other panels.
        new_proteins: Protein columns that came with other panels.
        width: Width of a cell's state.
        blocks: Residual blocks over it.
        dropout: Of a cell's state and of each block.
        panel_odds: Share of the training batches that see a part of the panel only.
        panel_share: Smallest part of the panel that such a batch sees.
        components: Leading components of new cells that the kernel reads beside the state; 0 before `extended`.
        landmarks: Cells that the kernel remembers; 0 before `extended`.
        transform: How protein counts became what it predicts.
    """

    genes: tuple[str, ...]
    proteins: tuple[str, ...]
    new_genes: tuple[str, ...] = ()
    new_proteins: tuple[str, ...] = ()
    width: int = 256
    blocks: int = 2
    dropout: float = 0.1
    panel_odds: float = 0.8
    panel_share: float = 0.05
    components: int = 0
    landmarks: int = 0
    transform: TransformName = "clr"

    @property
    def all_genes(self) -> tuple[str, ...]:
        """Every gene, in the order of the rows."""
        return self.genes + self.new_genes

    @property
    def all_proteins(self) -> tuple[str, ...]:
        """Every protein, in the order of the outputs."""
        return self.proteins + self.new_proteins

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> CellConfig:
        """What `asdict` gave, back from JSON."""
        found: dict[str, Any] = {name: values[name] for name in cls.__slots__}
        for name in ("genes", "proteins", "new_genes", "new_proteins"):
            found[name] = tuple(found[name])
        return cls(**found)


@dataclass(frozen=True, slots=True)
class CellReader:
    """Turns counts into the arguments of `CellNet.forward`.

    Attributes:
        column_G: Columns of the panel that the network knows.
        row_G: Row of each of them in the network.
        protein_P: Output of each protein of the panel.
    """

    column_G: np.ndarray[Any, np.dtype[np.int64]]
    row_G: np.ndarray[Any, np.dtype[np.int64]]
    protein_P: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def width(self) -> int:
        """What a cell costs beside others: next to nothing."""
        return 1

    @classmethod
    def of(cls, config: CellConfig, panel: Panel) -> CellReader:
        """The reader of a panel.

        Raises:
            ModelError: If a protein of the panel has no output.
        """
        row = {gene_key(name): number for number, name in reversed(list(enumerate(config.all_genes)))}
        # A gene that stands in two columns is read from the first.
        first = {row[gene_key(name)]: column for column, name in reversed(list(enumerate(panel.genes)))
                 if gene_key(name) in row}  # fmt: skip
        pairs = sorted((column, number) for number, column in first.items())
        columns, rows = (np.array([pair[axis] for pair in pairs], dtype=np.int64) for axis in (0, 1))
        return cls(columns, rows, np.array(outputs(config, panel.proteins), dtype=np.int64))

    def inputs(self, counts: csr_matrix) -> dict[str, Tensor]:
        """Arguments of `forward` for the rows of a sparse table, cells x genes of the panel."""
        table = counts[:, self.column_G].tocsr()
        table.sort_indices()
        return {
            "count_N": torch.from_numpy(np.asarray(table.data, dtype=np.float32)),
            "gene_N": torch.from_numpy(self.row_G[table.indices]),
            "offset_B": torch.from_numpy(np.asarray(table.indptr[:-1], dtype=np.int64)),
            "panel_G": torch.from_numpy(self.row_G),
            "protein_P": torch.from_numpy(self.protein_P),
        }


def gene_key(name: str) -> str:
    """A gene's name without case, and an Ensembl id without its version."""
    key = name.strip().upper()
    return re.sub(r"\.\d+$", "", key) if key.startswith("ENS") else key


def protein_keys(name: str) -> tuple[str, ...]:
    """What an antibody's name may mean, best guess first: `CD3_TotalSeqB`, `cd3.1` and `CD3E` all give `CD3`.

    Clone numbers are taken off after CD names only, since elsewhere they are the name (`PD-1`, `Siglec-8`). Of a
    name with a synonym in brackets, such as `PD-1 (CD279)`, both are tried.
    """
    plain = re.sub(r"(?i)[\s._-]*(total[\s_-]?seq[\s_-]?[abc]?|antibody|control)(?![a-z]).*$", "", name.strip())
    parts = [part for part in re.split(r"[()]", plain) if part.strip()]
    keys = []
    for part in parts:
        bare = re.sub(r"(?i)^(anti[-_ ]|hu\.|human[-_ ])", "", part.strip())
        bare = re.sub(r"(?i)^(cd\d+[a-z]{0,3})[._-]\d+$", r"\1", bare)
        key = re.sub(r"[^A-Z0-9]", "", bare.upper())
        keys.append(ALIASES.get(key, key))
    return tuple(dict.fromkeys(key for key in keys if key))


def origins(known: Sequence[str], names: Sequence[str]) -> list[int]:
    """Which of the known proteins each name means, -1 for none."""
    number: dict[str, int] = {}
    for place, name in enumerate(known):
        for key in protein_keys(name):
            number.setdefault(key, place)
    return [next((number[key] for key in protein_keys(name) if key in number), -1) for name in names]


def outputs(config: CellConfig, names: Sequence[str]) -> list[int]:
    """The output of each name: by the same name first, then by what the name means."""
    exact = {name.casefold(): number for number, name in reversed(list(enumerate(config.all_proteins)))}
    alike = origins(config.all_proteins, names)
    found = [exact.get(name.casefold(), other) for name, other in zip(names, alike, strict=True)]
    missing = [name for name, number in zip(names, found, strict=True) if number < 0]
    if missing:
        raise ModelError(
            f"{len(missing)} proteins have no output, {missing[0]} for one",
            where="panel: proteins",
            hint="tune the network on cells of this panel, or leave the proteins out",
        )
    return found
