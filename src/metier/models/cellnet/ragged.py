"""Cells as bags of expressed genes: sums, scales and principal axes, without a dense table.

Shapes: B cells, N expressed genes of all cells of a batch, G genes of a panel, V genes of the network, D width,
C components, F features of the kernel (D + C), M landmarks, K proteins of pretraining, P proteins asked for,
O proteins of the network, R rank of a kernel, L strengths of shrinkage, X and Y some proteins, S splits of the cells,
W a search's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

OVERSAMPLE, POWER_ITERATIONS = 10, 4
"""Of the search for principal directions. Source: Halko, Martinsson & Tropp 2011."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """A table of cells x genes by its entries, in the order of cells and in the order of genes.

    Attributes:
        value_N: Entries, cell after cell; `gene_N`, `offset_B` say where.
        cell_N: Cells of the same entries, gene after gene; `again_N`, `offset_V` say where.
        mean_V: Mean of each gene, zeros included.
    """

    value_N: Tensor
    gene_N: Tensor
    offset_B: Tensor
    again_N: Tensor
    cell_N: Tensor
    offset_V: Tensor
    mean_V: Tensor

    @classmethod
    def of(cls, value_N: Tensor, gene_N: Tensor, offset_B: Tensor, genes: int) -> Ragged:
        """Sort the entries once for both orders."""
        order_N = gene_N.argsort(stable=True)
        length_V = torch.bincount(gene_N, minlength=genes)
        sum_V = value_N.new_zeros(genes).index_add_(0, gene_N, value_N)
        return cls(
            value_N=value_N,
            gene_N=gene_N,
            offset_B=offset_B,
            again_N=value_N[order_N],
            cell_N=cells(gene_N, offset_B)[order_N],
            offset_V=length_V.cumsum(0) - length_V,
            mean_V=sum_V / max(1, len(offset_B)),
        )

    def principal(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """Leading left and right singular vectors of the centred table, (B, C) and (V, C); fewer for few cells.

        Source: Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.4.
        """
        cells_, genes = len(self.offset_B), len(self.mean_V)
        dice = torch.Generator().manual_seed(seed)
        wide = min(number + OVERSAMPLE, cells_, genes)
        basis_VW = torch.randn(genes, wide, generator=dice)
        for _ in range(POWER_ITERATIONS):
            basis_BW = torch.linalg.qr(self._of_genes(basis_VW))[0]
            basis_VW = torch.linalg.qr(self._of_cells(basis_BW))[0]
        left_BW, power_W, right_WW = torch.linalg.svd(self._of_genes(basis_VW), full_matrices=False)
        kept = min(number, int((power_W > power_W.amax() * 1e-5).sum()))
        return left_BW[:, :kept], basis_VW @ right_WW[:kept].T

    def _of_genes(self, x_VW: Tensor) -> Tensor:
        sum_BW = F.embedding_bag(self.gene_N, x_VW, self.offset_B, mode="sum", per_sample_weights=self.value_N)
        return sum_BW - self.mean_V @ x_VW

    def _of_cells(self, x_BW: Tensor) -> Tensor:
        sum_VW = F.embedding_bag(self.cell_N, x_BW, self.offset_V, mode="sum", per_sample_weights=self.again_N)
        return sum_VW - self.mean_V[:, None] * x_BW.sum(0)


@torch.no_grad()
def cells(gene_N: Tensor, offset_B: Tensor) -> Tensor:
    """Which cell each expressed gene belongs to, int64 (N,)."""
    length_B = torch.diff(offset_B, append=offset_B.new_tensor([len(gene_N)]))
    return torch.repeat_interleave(torch.arange(len(offset_B), device=offset_B.device), length_B)


def totals(count_N: Tensor, gene_N: Tensor, offset_B: Tensor) -> Tensor:
    """Sum of each cell, (B,)."""
    return count_N.new_zeros(len(offset_B)).index_add_(0, cells(gene_N, offset_B), count_N)


def scaled(count_N: Tensor, gene_N: Tensor, offset_B: Tensor, depth: Tensor) -> Tensor:
    """log(1 + count) after every cell is scaled to the same depth."""
    total_B = totals(count_N, gene_N, offset_B)
    return torch.log1p(count_N * (depth / total_B.clamp_min(1.0))[cells(gene_N, offset_B)])
