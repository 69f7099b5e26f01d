"""How an scTranslator reads the cells of a panel.

Shapes: B cells, G genes, P proteins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metier.core import Fault, ModelError
from metier.core.panel import Panel
from metier.core.rng import derive
from metier.core.words import first_few
from metier.models.sctranslator.shape import Shape, check_panels, foreign_ids

LOWEST = 1e-8
"""Where a cell's values begin once they are scaled; they end at 1. Source: the published scripts."""
Longer = Literal["refuse", "sample"]
"""What to do with more genes than a network holds."""


class CellReader:
    """How a network reads the cells of one panel.

    Attributes:
        width: Gene tokens of a cell, padding aside.
        ids: Every id that it may ask for, for `ScTranslator.restricted`.
    """

    def __init__(self, shape: Shape, panel: Panel, *, longer: Longer, seed: int) -> None:
        """Find the columns and check the ids; see `ScTranslator.reader`."""
        gene_ids_G, protein_ids_P = _ids(panel.gene_ids, panel.genes), _ids(panel.protein_ids, panel.proteins)
        self.columns_G: NDArray[np.intp] = gene_ids_G.nonzero()[0]
        self.gene_ids_G, self.protein_ids_P, self.seed = gene_ids_G[self.columns_G], protein_ids_P, seed
        self.width = min(len(self.columns_G), shape.genes)
        self.ids = frozenset(self.gene_ids_G.tolist()) | frozenset(protein_ids_P.tolist())
        self._check(shape, panel, longer)

    def inputs(self, counts: Any) -> dict[str, Tensor]:
        """The arguments of `ScTranslator.forward` for a sparse table or an array of counts, (B, genes of the panel).

        Each cell is scaled to 1e-8..1 over all its genes that have an id, as published; a cell whose genes are all
        equal is 1e-8 throughout. Of more genes than the network holds, each call takes a random choice in the panel's
        order; the seed and the counts decide it, so the same cells give the same bits, also after a stop.
        """
        values_BG = counts[:, self.columns_G]
        values_BG = np.asarray(values_BG.toarray() if hasattr(values_BG, "toarray") else values_BG, dtype=np.float64)
        scaled_BG, ids_G = _scaled(values_BG), self.gene_ids_G
        if len(ids_G) > self.width:
            dice = np.random.default_rng(derive(self.seed, hashlib.sha256(values_BG.tobytes()).hexdigest()))
            chosen_G = np.sort(dice.choice(len(ids_G), self.width, replace=False))
            scaled_BG, ids_G = scaled_BG[:, chosen_G], ids_G[chosen_G]
        return {
            "rna_BG": torch.from_numpy(scaled_BG.astype(np.float32)),
            "gene_BG": torch.from_numpy(ids_G).repeat(len(scaled_BG), 1),
            "protein_BP": torch.from_numpy(self.protein_ids_P).repeat(len(scaled_BG), 1),
        }

    def _check(self, shape: Shape, panel: Panel, longer: Longer) -> None:
        nameless = [panel.proteins[place] for place in np.flatnonzero(self.protein_ids_P == 0)]
        table = "give the id table of the network (column my_Id)"
        faults = []
        if not self.width:
            faults.append(Fault("model: genes", "no gene of the panel has an id of the network", table))
        if nameless:
            what = f"{len(nameless)} proteins have no id: {first_few(nameless)}"
            faults.append(Fault("model: proteins", what, f"{table} with these proteins in it, or leave them out"))
        if len(self.columns_G) > shape.genes and longer == "refuse":
            what = f"{len(self.columns_G):,} genes with an id, but the network holds {shape.genes:,}"
            remedy = f"choose {shape.genes:,} of them, the most variable ones, or let it sample (longer: sample)"
            faults.append(Fault("model: genes", what, remedy))
        if faults:
            raise ModelError.of(faults)
        check_panels(shape, genes=self.width, proteins=len(panel.proteins))
        foreign = sorted(number for number in self.ids if not 0 < number < shape.vocabulary)
        if foreign:
            raise foreign_ids(foreign, shape)


def _ids(ids: Sequence[int], names: Sequence[str]) -> NDArray[np.int64]:
    """One id for each name, 0 where none is known."""
    return np.array(ids or [0] * len(names), dtype=np.int64)


def _scaled(values_BG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row from LOWEST to 1. Source: `normalization` of the published scripts."""
    least_B1, most_B1 = values_BG.min(axis=1, keepdims=True), values_BG.max(axis=1, keepdims=True)
    span_B1 = np.where(most_B1 > least_B1, most_B1 - least_B1, 1.0)
    scaled_BG: NDArray[np.float64] = LOWEST + (values_BG - least_B1) / span_B1 * (1 - LOWEST)
    return scaled_BG
