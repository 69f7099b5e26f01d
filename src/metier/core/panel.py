"""Which genes are read and which proteins are measured: the word that cell data, cell networks and cell tasks share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """The two axes of a table of cells.

    Attributes:
        genes: Name of each gene, in the order of the RNA's columns: a symbol where symbols are known, else the id.
        proteins: Name of each protein, in the order of the protein columns.
        gene_ids: The published network's id (`my_Id`) of each gene, 0 for none; empty where no id is known.
        protein_ids: The same for proteins.
    """

    genes: tuple[str, ...]
    proteins: tuple[str, ...]
    gene_ids: tuple[int, ...] = ()
    protein_ids: tuple[int, ...] = ()

    def only(self, proteins: Collection[str]) -> Panel:
        """The same genes with some of the proteins, in the panel's order."""
        kept = [i for i, name in enumerate(self.proteins) if name in set(proteins)]
        ids = tuple(self.protein_ids[i] for i in kept) if self.protein_ids else ()
        return Panel(self.genes, tuple(self.proteins[i] for i in kept), self.gene_ids, ids)
