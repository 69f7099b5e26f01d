"""The network: a bag of genes, residual blocks, a head that calibration can fit.

Shapes: B cells, N expressed genes of all cells of a batch, G genes of a panel, V genes of the network, D width,
C components, F features of the kernel (D + C), M landmarks, K proteins of pretraining, P proteins asked for,
O proteins of the network, R rank of a kernel, L strengths of shrinkage, X and Y some proteins, S splits of the cells,
W a search's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core.panel import Panel
from metier.models.cellnet.panels import CellConfig, CellReader, gene_key, origins
from metier.models.cellnet.ragged import cells, scaled, totals

COUNTS_PER_CELL = 1e3
"""What the mean rates of the genes of pretraining sum to, and so the depth to which a cell is scaled."""
LEAST_SPREAD = 0.05
"""Smallest standard deviation by which a gene is divided: a gene seen once or twice must not shout."""
LOG_DEPTH = 6.0
"""Roughly the logarithm of a cell's counts, taken off so that its feature starts near zero."""
PRIOR_CELLS = 200.0
"""How many new cells weigh as much as the pretraining in the centre and spread of a gene."""


class Block(nn.Module):
    """Normalise, widen by two, GELU, narrow, add."""

    def __init__(self, width: int, dropout: float) -> None:
        """Draw the weights; the last layer starts at zero, so that every block starts as the identity."""
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        return x_BD + self.dropout(self.contract(F.gelu(self.expand(self.norm(x_BD)))))  # type: ignore[no-any-return]


class Head(nn.Module):
    """What calibration finds: slope and shift of the pretrained answer, and a kernel for what remains.

    Attributes:
        origin_O: Which protein of the pretraining an output starts from; -1 for none.
    """

    origin_O: Tensor

    def __init__(self, origin: Sequence[int], features: int, landmarks: int) -> None:
        """A known protein starts as it is, a new one at zero."""
        super().__init__()
        self.register_buffer("origin_O", torch.tensor(origin, dtype=torch.int64))
        self.slope_O = nn.Parameter((self.origin_O >= 0).float())
        self.shift_O = nn.Parameter(torch.zeros(len(origin)))
        self.landmark_MF = nn.Parameter(torch.zeros(landmarks, features if landmarks else 0))
        self.weight_MO = nn.Parameter(torch.zeros(landmarks, len(origin)))

    def forward(self, known_BK: Tensor, feature_BF: Tensor | None) -> Tensor:
        """Abundance of every protein of the network, (B, O)."""
        answer_BO = self.slope_O * self.prior(known_BK) + self.shift_O
        if feature_BF is None:
            return answer_BO
        return answer_BO + gaussian(feature_BF, self.landmark_MF) @ self.weight_MO

    def prior(self, known_BK: Tensor) -> Tensor:
        """The pretrained answer to each output, zero for new proteins; (B, O)."""
        if not known_BK.shape[1]:
            return known_BK.new_zeros(len(known_BK), len(self.origin_O))
        return torch.where(self.origin_O >= 0, known_BK[:, self.origin_O.clamp_min(0)], 0.0)


class CellNet(nn.Module):
    """RNA of cells in, abundance of their proteins out.

    Attributes:
        config: What it is made of.
    """

    rate_V: Tensor
    center_V: Tensor
    spread_V: Tensor
    middle_C: Tensor
    depth: Tensor
    stretch: Tensor

    def __init__(self, config: CellConfig) -> None:
        """Draw the weights from torch's own generator; new genes start silent."""
        super().__init__()
        self.config = config
        width, rows = config.width, len(config.all_genes)
        self.genes, self.new_genes = nn.Embedding(len(config.genes), width), nn.Embedding(len(config.new_genes), width)
        nn.init.normal_(self.genes.weight, std=width**-0.5)
        nn.init.zeros_(self.new_genes.weight)
        self.loading = nn.Embedding(rows if config.components else 0, config.components)
        nn.init.zeros_(self.loading.weight)
        self.bias, self.depth_weight = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(width, config.dropout) for _ in range(config.blocks))
        self.norm, self.known = nn.LayerNorm(width), nn.Linear(width, len(config.proteins))
        origin = [*range(len(config.proteins)), *origins(config.proteins, config.new_proteins)]
        self.head = Head(origin, width + config.components, config.landmarks)
        self.register_buffer("rate_V", torch.zeros(rows))
        self.register_buffer("center_V", torch.zeros(rows))
        self.register_buffer("spread_V", torch.ones(rows))
        self.register_buffer("middle_C", torch.zeros(config.components))
        self.register_buffer("depth", torch.ones(()))
        # How far states and components are stretched before the kernel of width one.
        self.register_buffer("stretch", torch.zeros(2))

    def forward(self, count_N: Tensor, gene_N: Tensor, offset_B: Tensor, panel_G: Tensor, protein_P: Tensor) -> Tensor:
        """Predict the proteins.

        Args:
            count_N: Counts of the expressed genes, cell after cell.
            gene_N: Row of each of them, int64.
            offset_B: Where each cell starts, int64.
            panel_G: Rows of all genes that were measured, int64.
            protein_P: Which outputs to give, int64.

        Returns:
            Abundances, shape (B, P).
        """
        seen_N = count_N
        if self.training and float(torch.rand(())) < self.config.panel_odds:
            seen_N, panel_G = self._narrowed(count_N, gene_N, panel_G)
        state_BD = self.state(seen_N, gene_N, offset_B, panel_G)
        # The components stay whole: they belong to the one panel that they were found on.
        feature_BF = self.features(state_BD, count_N, gene_N, offset_B) if self.config.landmarks else None
        answer_BO: Tensor = self.head(self.known(state_BD), feature_BF)
        return answer_BO[:, protein_P]

    def state(self, count_N: Tensor, gene_N: Tensor, offset_B: Tensor, panel_G: Tensor) -> Tensor:
        """What the network knows of each cell, (B, D)."""
        table_VD = self._table()
        value_N, total_B = self.values(count_N, gene_N, offset_B, panel_G)
        sum_BD = F.embedding_bag(
            gene_N, table_VD, offset_B, mode="sum", per_sample_weights=value_N / self.spread_V[gene_N]
        )
        zeros_D = (self.center_V / self.spread_V)[panel_G] @ table_VD[panel_G]
        size = (self.rate_V[panel_G] > 0).sum().clamp_min(1).sqrt()
        depth_B1 = (total_B.log1p() - LOG_DEPTH)[:, None]
        x_BD = self.dropout((sum_BD - zeros_D) * (4.0 / size) + self.bias + depth_B1 * self.depth_weight)
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.norm(x_BD)  # type: ignore[no-any-return]

    def values(self, count_N: Tensor, gene_N: Tensor, offset_B: Tensor, panel_G: Tensor) -> tuple[Tensor, Tensor]:
        """log(1 + scaled count) of each expressed gene, and the counts of each cell over genes of known rate.

        A cell is scaled to what an average cell of the pretraining holds on the same panel, not to a fixed sum, so
        that a value means the same whichever genes are measured beside it.
        """
        total_B = totals(count_N * (self.rate_V[gene_N] > 0), gene_N, offset_B)
        scale_B = self.rate_V[panel_G].sum() / total_B.clamp_min(1.0)
        return torch.log1p(count_N * scale_B[cells(gene_N, offset_B)]), total_B

    def features(self, state_BD: Tensor, count_N: Tensor, gene_N: Tensor, offset_B: Tensor) -> Tensor:
        """What the kernel compares, (B, F)."""
        component_BC = self.components(count_N, gene_N, offset_B)
        return torch.cat([state_BD * self.stretch[0], component_BC * self.stretch[1]], dim=1)

    def components(self, count_N: Tensor, gene_N: Tensor, offset_B: Tensor) -> Tensor:
        """Scores of the cells on the leading components of the cells of calibration, (B, C)."""
        value_N = scaled(count_N, gene_N, offset_B, self.depth)
        table_VC = self.loading(torch.arange(len(self.rate_V), device=gene_N.device))
        return F.embedding_bag(gene_N, table_VC, offset_B, mode="sum", per_sample_weights=value_N) - self.middle_C

    def reader(self, panel: Panel) -> CellReader:
        """What turns tables of this panel into the arguments of `forward`; unknown genes are passed over.

        Raises:
            ModelError: If a protein of the panel has no output here.
        """
        return CellReader.of(self.config, panel)

    def extended(self, panel: Panel, *, components: int = 50, landmarks: int = 512) -> CellNet:
        """The same network with rows for what the panel adds: it answers as before until it is calibrated.

        Args:
            panel: Genes and proteins; names that differ only in writing count as the same gene, and every protein
                column that is not here by the same name gets an output of its own.
            components: Leading components of new cells that the kernel may read.
            landmarks: Most cells that the kernel may remember.
        """
        here = {gene_key(name) for name in self.config.all_genes}
        new_genes = {gene_key(name): name for name in reversed(panel.genes) if gene_key(name) not in here}
        outputs = {name.casefold() for name in self.config.all_proteins}
        new_proteins = {name.casefold(): name for name in panel.proteins if name.casefold() not in outputs}
        config = replace(
            self.config,
            new_genes=self.config.new_genes + tuple(reversed(new_genes.values())),
            new_proteins=self.config.new_proteins + tuple(new_proteins.values()),
            components=self.config.components or components,
            landmarks=self.config.landmarks or landmarks,
        )
        with torch.random.fork_rng(devices=[]):
            network = CellNet(config)
        network.to(self.bias.device)
        _grow(self.state_dict(), network.state_dict())
        return network.train(self.training)

    def whole(self) -> tuple[str, ...]:
        """Parameters that calibration fits and that move with every method: the head, and new genes."""
        kept = ("head.", "new_genes.")
        return tuple(name for name, p in self.named_parameters() if name.startswith(kept) and p.numel())

    def knows(self, panel: Panel) -> tuple[str, ...]:
        """Proteins of a panel that it was trained to predict."""
        found = origins(self.config.proteins, panel.proteins)
        return tuple(name for name, at in zip(panel.proteins, found, strict=True) if at >= 0)

    @property
    def is_trained(self) -> bool:
        """Whether it ever saw a cell."""
        return bool(self.rate_V.any())

    def fit(self, inputs: Mapping[str, Tensor], target_BP: Tensor, *, seed: int, head: bool) -> list[str]:
        """What is fitted in closed form before tuning, in place: the scale of the genes and, with `head`, the head.

        Args:
            inputs: Arguments of `forward` for the training cells.
            target_BP: What was measured, NaN where nothing was.
            seed: Decides folds and landmarks.
            head: Whether the head is fitted as well; a network that begins from nothing has nothing to fit it on.

        Returns:
            What was done, in sentences.
        """
        if not bool(self.rate_V.any()):
            self.standardise(inputs)
            with torch.no_grad():
                output_P, mean_P = inputs["protein_P"], torch.nanmean(target_BP, dim=0).nan_to_num()
                own_P = output_P < len(self.config.proteins)
                self.known.bias[output_P[own_P]] = mean_P[own_P]
            return ["gene by gene, centre and spread are those of the training cells"]
        if head:
            from metier.models.cellnet.calibration import calibrate  # it knows the network

            return calibrate(self, inputs, target_BP, seed=seed)
        self.standardise(inputs, prior_cells=PRIOR_CELLS)
        return []

    @torch.no_grad()
    def standardise(self, inputs: Mapping[str, Tensor], *, prior_cells: float = 0.0) -> None:
        """Take rate, centre and spread of each gene from these cells.

        Args:
            inputs: Arguments of `forward` for all the cells.
            prior_cells: How many cells the present centre and spread weigh; 0 forgets them and takes new rates.
        """
        panel_G = inputs["panel_G"]
        if not prior_cells:
            share_V = torch.zeros_like(self.rate_V).index_add_(0, inputs["gene_N"], inputs["count_N"])
            self.rate_V.copy_(share_V * (COUNTS_PER_CELL / share_V.sum().clamp_min(1.0)))
        value_N, _ = self.values(*(inputs[name] for name in ("count_N", "gene_N", "offset_B", "panel_G")))
        number = float(len(inputs["offset_B"]))
        first_V = torch.zeros_like(self.rate_V).index_add_(0, inputs["gene_N"], value_N) / number
        second_V = torch.zeros_like(self.rate_V).index_add_(0, inputs["gene_N"], value_N.square()) / number
        # A gene without a rate has no history to weigh.
        old_V = torch.where(self.rate_V > 0, prior_cells / (number + prior_cells), 0.0)
        center_V = old_V * self.center_V + (1 - old_V) * first_V
        square_V = old_V * (self.spread_V.square() + self.center_V.square()) + (1 - old_V) * second_V
        spread_V = (square_V - center_V.square()).clamp_min(0.0).sqrt().clamp_min(LEAST_SPREAD)
        self.center_V[panel_G], self.spread_V[panel_G] = center_V[panel_G], spread_V[panel_G]

    def _table(self) -> Tensor:
        if not self.config.new_genes:
            return self.genes.weight
        # Through the layer, not its weight: peft puts a layer of its own in its place when it moves whole.
        new_VD = self.new_genes(torch.arange(len(self.config.new_genes), device=self.bias.device))
        return torch.cat([self.genes.weight, new_VD])

    def _narrowed(self, count_N: Tensor, gene_N: Tensor, panel_G: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as a smaller panel would have measured it; its share of the genes is uniform in the logarithm."""
        share = self.config.panel_share ** float(torch.rand(()))
        keep_V = torch.rand(len(self.rate_V)).to(count_N.device) < share
        return count_N * keep_V[gene_N], panel_G[keep_V[panel_G]]


def gaussian(x_BF: Tensor, y_MF: Tensor) -> Tensor:
    """exp(-squared distance), (B, M)."""
    square_BM = x_BF.square().sum(1)[:, None] + y_MF.square().sum(1)[None] - 2 * x_BF @ y_MF.T
    return torch.exp(-square_BM.clamp_min(0.0))


@torch.no_grad()
def _grow(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy each tensor into the first rows of its larger copy; outputs grow along the last axis of the weights."""
    for name, tensor in old.items():
        if tensor.numel() and name != "head.origin_O":
            new[name][tuple(slice(size) for size in tensor.shape)] = tensor


def new(panel: Panel, seed: int) -> CellNet:
    """A network for the genes and proteins of a panel that knows nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CellNet(CellConfig(panel.genes, panel.proteins))
