"""The network: tokens, an encoder over genes, a bridge, a decoder over proteins.

Shapes: B cells, G genes, P proteins, N tokens (genes or proteins), D width, H heads, K head width, F random features,
R rows of an embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core import ModelError
from metier.core.panel import Panel
from metier.core.rng import derive
from metier.core.words import first_few
from metier.models.sctranslator.favor import CellByCell, Favor, orthogonal_features
from metier.models.sctranslator.panels import CellReader, Longer
from metier.models.sctranslator.shape import Shape, check_panels, foreign_ids

REDRAW_INTERVAL = 1000
"""Forward passes in training between two draws of the random features. Source: the published network."""


class Attention(nn.Module):
    """FAVOR+ attention without a causal mask. Source: Choromanski et al. 2021, arXiv:2009.14794."""

    projection: Tensor

    def __init__(self, shape: Shape) -> None:
        """Draw the first features and weights."""
        super().__init__()
        inner = shape.heads * shape.head_dim
        self.heads = shape.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(shape.dim, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, shape.dim)
        self.register_buffer("projection", orthogonal_features(shape.features, shape.head_dim))

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None = None, times_N: Tensor | None = None) -> Tensor:
        """Mix tokens, (B, N, D) to (B, N, D).

        A token that is not kept gives no value, but keeps its place in the normaliser, as published; with `times` it
        takes the places of so many equal tokens there.
        """
        q_BHNK, k_BHNK, v_BHNK = (self._by_head(layer(x_BND)) for layer in (self.to_q, self.to_k, self.to_v))
        if keep_BN is not None:
            v_BHNK = v_BHNK.masked_fill(~keep_BN[:, None, :, None], 0.0)
        times_N1 = q_BHNK.new_ones(x_BND.shape[1], 1) if times_N is None else times_N[:, None].to(q_BHNK.dtype)
        # Exponents need the width of the weights, also where the layers around them work in half of it.
        with torch.autocast(x_BND.device.type, enabled=False):
            out_BHNK: Tensor = Favor.apply(q_BHNK, k_BHNK, v_BHNK, times_N1, self.projection)  # type: ignore[no-untyped-call]
        mixed_BND: Tensor = self.to_out(out_BHNK.transpose(1, 2).flatten(2))
        return mixed_BND

    def _by_head(self, x_BNI: Tensor) -> Tensor:
        x_BNHK: Tensor = x_BNI.to(self.projection.dtype).unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return x_BNHK.transpose(1, 2)


class FeedForward(nn.Module):
    """Widen by four, GELU, narrow."""

    def __init__(self, dim: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Each token by itself, (B, N, D) to (B, N, D)."""
        return self.contract(F.gelu(self.expand(x_BND)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalised tokens and added to them."""

    def __init__(self, shape: Shape) -> None:
        """Draw the weights."""
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(shape.dim), Attention(shape)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(shape.dim), FeedForward(shape.dim)

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None = None, times_N: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), keep_BN, times_N)
        return x_BND + self.feed_forward(self.feed_forward_norm(x_BND))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Tokens of one kind and the blocks that read them.

    The published network has both ends in both stacks and uses one in each; the unused ones are kept, so that a
    checkpoint goes back to its original layout with nothing missing.
    """

    calls_since_redraw: Tensor

    def __init__(self, shape: Shape, blocks: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.to_vector, self.to_out = nn.Linear(1, shape.dim), nn.Linear(shape.dim, 1)
        self.identity = nn.Embedding(shape.vocabulary, shape.dim, padding_idx=0)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(blocks))
        self.register_buffer("calls_since_redraw", torch.tensor(0))

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None = None, times_N: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D)."""

        def through(x_BND: Tensor, cells: slice) -> Tensor:
            for block in self.blocks:
                x_BND = block(x_BND, None if keep_BN is None else keep_BN[cells], times_N)
            return x_BND

        weights = [weight for weight in self.blocks.parameters() if weight.requires_grad]
        if not (weights and self._apart(x_BND)):
            return through(x_BND, slice(None))
        y_BND: Tensor = CellByCell.apply(through, x_BND, *weights)  # type: ignore[no-untyped-call]
        return y_BND

    def _apart(self, x_BND: Tensor) -> bool:
        """Whether each cell goes its own way: in training on a CPU whose threads the cells keep equally busy.

        Dropout, as adapters have it, draws in order, and half width is a setting of this thread alone.
        """
        cells, threads = len(x_BND), torch.get_num_threads()
        busy = threads > 1 and cells > 1 and (cells % threads == 0 or cells >= 4 * threads)
        drops = any(isinstance(module, nn.Dropout) and module.p and module.training for module in self.modules())
        plain = x_BND.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        return busy and plain and not drops and torch.is_grad_enabled()

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Draw new random features for every block."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for number, attention in enumerate(attentions):
            count, width = attention.projection.shape
            dice = torch.Generator().manual_seed(derive(seed, "features", number))
            attention.projection.copy_(orthogonal_features(count, width, dice))


class Bridge(nn.Module):
    """From the axis of genes to the axis of proteins, for each of the D channels."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.inner, self.outer = nn.Linear(shape.genes, shape.bridge), nn.Linear(shape.bridge, shape.proteins)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BGD: Tensor) -> Tensor:
        """(B, G, D) to (B, P, D)."""
        inner_BDI = F.relu(self.dropout(self.inner(x_BGD.transpose(1, 2))))
        return self.outer(inner_BDI).transpose(1, 2)  # type: ignore[no-any-return]


class Rows(nn.Embedding):
    """The rows of an embedding that are in use, found by the ids of the whole; the first is the padding's."""

    ids_R: Tensor
    row_by_id: Tensor

    def __init__(self, whole: nn.Embedding, ids_R: Tensor) -> None:
        """Gather the rows."""
        super().__init__(len(ids_R), whole.embedding_dim, 0, _weight=whole.weight.detach()[ids_R])
        self.weight.requires_grad_(whole.weight.requires_grad)
        row_by_id = torch.full((whole.num_embeddings,), -1).to(ids_R.device)
        row_by_id[ids_R] = torch.arange(len(ids_R), device=ids_R.device)
        self.register_buffer("ids_R", ids_R, persistent=False)
        self.register_buffer("row_by_id", row_by_id, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look ids up, any shape to (..., D).

        Raises:
            ModelError: If a row was left out.
        """
        rows = self.row_by_id[ids]
        if bool((rows < 0).any()):
            some = sorted({int(found) for found in ids[rows < 0]})
            raise ModelError(
                f"{len(some)} ids were left out of the rows in use: {first_few(some)}",
                where="model",
                hint="restrict the network to the ids of every panel that it will read",
            )
        return super().forward(rows)


class ScTranslator(nn.Module):
    """RNA of a cell in, abundance of its proteins out.

    Attributes:
        shape: Its sizes.
        redraw_interval: Forward passes in training between two draws of the random features; 0 keeps them.
        seed: With the number of draws, decides every draw.
    """

    draws: Tensor

    def __init__(
        self, shape: Shape, *, dropout: float = 0.1, redraw_interval: int = REDRAW_INTERVAL, seed: int = 0
    ) -> None:
        """Draw the weights from torch's own generator."""
        super().__init__()
        self.shape, self.redraw_interval, self.seed = shape, redraw_interval, seed
        self.encoder, self.decoder = Stack(shape, shape.encoder_blocks), Stack(shape, shape.decoder_blocks)
        self.bridge = Bridge(shape, dropout)
        self.register_buffer("draws", torch.tensor(0))

    def forward(
        self,
        rna_BG: Tensor,
        gene_BG: Tensor,
        protein_BP: Tensor,
        keep_gene_BG: Tensor | None = None,
        keep_protein_BP: Tensor | None = None,
    ) -> Tensor:
        """Predict the proteins.

        Panels may be narrower than the network. Genes that are lacking then count as padding, value and id 0, as the
        published scripts pad: all such tokens are equal in every block, so one stands for all and nothing else is spent
        on them. Proteins that are lacking are computed, for the bridge gives each place another value, and cut off.

        Args:
            rna_BG: Values, scaled to 0..1 within each cell.
            gene_BG: Ids of the genes, int64, 0 for padding.
            protein_BP: Ids of the proteins, int64, 0 for padding.
            keep_gene_BG: False where a gene is padding; None keeps all.
            keep_protein_BP: The same for proteins.

        Returns:
            Abundances, shape (B, P).

        Raises:
            ModelError: If there are more genes or proteins than the network holds.
        """
        genes, proteins = rna_BG.shape[1], protein_BP.shape[1]
        check_panels(self.shape, genes=genes, proteins=proteins)
        if self.training and self.redraw_interval:
            self._redraw_when_due()
        encoded_BGD = self._encoded(rna_BG, gene_BG, keep_gene_BG, self.shape.genes - genes)
        lacking = self.shape.proteins - proteins
        identity_BPD = self.decoder.identity(F.pad(protein_BP, (0, lacking)))
        keep_BP = _padded(keep_protein_BP, protein_BP, lacking)
        abundance_BP1: Tensor = self.decoder.to_out(self.decoder(self.bridge(encoded_BGD) + identity_BPD, keep_BP))
        return abundance_BP1[:, :proteins, 0]

    def _encoded(self, rna_BG: Tensor, gene_BG: Tensor, keep_BG: Tensor | None, lacking: int) -> Tensor:
        """Encode the genes and `lacking` tokens of padding, all of which one token stands for; shape (B, G, D)."""
        one, times_G = min(lacking, 1), None
        if lacking:
            times_G = F.pad(rna_BG.new_ones(rna_BG.shape[1]), (0, one), value=lacking)
        keep_BG = _padded(keep_BG, gene_BG, one)
        value_BG1, gene_BG = F.pad(rna_BG, (0, one))[..., None], F.pad(gene_BG, (0, one))
        encoded_BGD = self.encoder(self.encoder.to_vector(value_BG1) + self.encoder.identity(gene_BG), keep_BG, times_G)
        if lacking > 1:
            encoded_BGD = torch.cat([encoded_BGD, encoded_BGD[:, -1:].expand(-1, lacking - 1, -1)], dim=1)
        return encoded_BGD  # type: ignore[no-any-return]

    def reader(self, panel: Panel, *, longer: Longer = "refuse", seed: int = 0) -> CellReader:
        """How this network reads the cells of a panel.

        Args:
            panel: Genes and proteins with their ids; genes without one are passed over.
            longer: What to do with more genes than the network holds: refuse them, or take a random choice each time.
            seed: Decides the choices.

        Raises:
            ModelError: If ids are lacking or unknown, or the panel is longer than the network.
        """
        return CellReader(self.shape, panel, longer=longer, seed=seed)

    def restricted(self, ids: Iterable[int]) -> ScTranslator:
        """A copy whose two embeddings hold only these ids and the padding.

        Most rows never get a gradient, and Adam does not move such a row: both its moments stay zero. So, without
        weight decay, the copy trains to the same bits as the whole at the cost of the rows in use. Give it the ids of
        every panel that it will read; `merged_into` brings the result back.

        Raises:
            ModelError: If an id is none of the network's.
        """
        unique = sorted({0, *map(int, ids)})
        if unique[0] < 0 or unique[-1] >= self.shape.vocabulary:
            raise foreign_ids([number for number in unique if not 0 <= number < self.shape.vocabulary], self.shape)
        small = copy.deepcopy(self)
        for stack in (small.encoder, small.decoder):
            stack.identity = Rows(stack.identity, torch.tensor(unique, device=stack.identity.weight.device))
        return small

    @torch.no_grad()
    def merged_into(self, original: ScTranslator) -> ScTranslator:
        """Write the weights of a restricted copy into the network that it was made from, and give that back.

        Raises:
            ModelError: If the sizes differ.
        """
        if self.shape != original.shape:
            raise ModelError("the copy has other sizes", where="model", hint="merge into the network it was made from")
        there = original.state_dict()
        for name, tensor in self.state_dict().items():
            owner = self.get_submodule(name.rpartition(".")[0])
            there[name][owner.ids_R if isinstance(owner, Rows) else ...] = tensor.to(there[name].device)
        return original

    @torch.no_grad()
    def _redraw_when_due(self) -> None:
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if int(stack.calls_since_redraw) < self.redraw_interval:
                stack.calls_since_redraw += 1
                continue
            stack.redraw(derive(self.seed, name, int(self.draws)))
            stack.calls_since_redraw.zero_()
            self.draws += 1


def _padded(keep_BN: Tensor | None, ids_BN: Tensor, lacking: int) -> Tensor | None:
    """What is kept once `lacking` places of padding follow; None keeps all."""
    if keep_BN is None and not lacking:
        return None
    return F.pad(torch.ones_like(ids_BN, dtype=torch.bool) if keep_BN is None else keep_BN, (0, lacking))
