"""scTranslator, a network from the RNA of a cell to the abundance of its proteins, as a clean family.

Source: its published code and checkpoints (Liu et al. 2023, bioRxiv 2023.07.04.547619). A token is a gene or a protein:
its value and the embedding of its id. An encoder reads the genes, a bridge maps the axis of genes to the axis of
proteins, a decoder reads the proteins. Attention is FAVOR+ with positive random features.

Shapes: B cells, G genes, P proteins, N tokens (genes or proteins), D width, H heads, K head width, F random features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from metier.core import Fault, ModelError
from metier.core.files import storage_error, write_json
from metier.core.rng import derive

EPSILON = 1e-4
"""What is added to every random feature. Source: the published network."""
REDRAW_INTERVAL = 1000
"""Forward passes in training between two draws of the random features. Source: the published network."""
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network.

    Attributes:
        dim: Width of a token.
        genes: Genes that the bridge takes.
        proteins: Proteins that it gives.
        bridge: Width between the two.
        vocabulary: Ids of genes and proteins, 0 for padding.
        heads: Attention heads.
        head_dim: Width of a head.
        features: Random features of a head.
        encoder_blocks: Blocks over genes.
        decoder_blocks: Blocks over proteins.
    """

    dim: int
    genes: int
    proteins: int
    bridge: int
    vocabulary: int = 85_500
    heads: int = 8
    head_dim: int = 64
    features: int = 266
    encoder_blocks: int = 2
    decoder_blocks: int = 2

    @classmethod
    def of(cls, dim: int, genes: int, proteins: int) -> Shape:
        """The published proportions for these sizes."""
        return cls(dim, genes, proteins, math.ceil(math.sqrt(genes * proteins)))


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

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None) -> Tensor:
        """Mix tokens, (B, N, D) to (B, N, D).

        A token that is not kept gives no value, but keeps its place in the normaliser, as published.
        """
        q_BHNK, k_BHNK, v_BHNK = (self._by_head(layer(x_BND)) for layer in (self.to_q, self.to_k, self.to_v))
        if keep_BN is not None:
            v_BHNK = v_BHNK.masked_fill(~keep_BN[:, None, :, None], 0.0)
        q_BHNF = self._features(q_BHNK, over=(-1,))
        k_BHNF = self._features(k_BHNK, over=(-1, -2))
        # A column of ones carries the normaliser through the same two products.
        ones_BHN1 = v_BHNK.new_ones(*v_BHNK.shape[:-1], 1)
        mixed_BHNV = q_BHNF @ (k_BHNF.transpose(-1, -2) @ torch.cat([v_BHNK, ones_BHN1], dim=-1))
        out_BHNK = mixed_BHNV[..., :-1] / mixed_BHNV[..., -1:]
        mixed_BND: Tensor = self.to_out(out_BHNK.transpose(1, 2).flatten(2))
        return mixed_BND

    def _by_head(self, x_BNI: Tensor) -> Tensor:
        x_BNHK: Tensor = x_BNI.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return x_BNHK.transpose(1, 2)

    def _features(self, x_BHNK: Tensor, *, over: tuple[int, ...]) -> Tensor:
        """Positive features whose products estimate the softmax kernel, but for a factor that cancels out."""
        scaled_BHNK = x_BHNK * x_BHNK.shape[-1] ** -0.25
        dash_BHNF = scaled_BHNK @ self.projection.T
        half_BHN1 = scaled_BHNK.square().sum(dim=-1, keepdim=True) / 2
        most = dash_BHNF.detach().amax(dim=over, keepdim=True)
        return torch.exp(dash_BHNF - (half_BHN1 + most)) + EPSILON


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

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), keep_BN)
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

    def forward(self, x_BND: Tensor, keep_BN: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        for block in self.blocks:
            x_BND = block(x_BND, keep_BN)
        return x_BND

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

        Args:
            rna_BG: Values, scaled to 0..1 within each cell.
            gene_BG: Ids of the genes, int64, 0 for padding.
            protein_BP: Ids of the proteins, int64, 0 for padding.
            keep_gene_BG: False where a gene is padding; None keeps all.
            keep_protein_BP: The same for proteins.

        Returns:
            Abundances, shape (B, P).
        """
        if self.training and self.redraw_interval:
            self._redraw_when_due()
        tokens_BGD = self.encoder.to_vector(rna_BG[..., None]) + self.encoder.identity(gene_BG)
        bridged_BPD = self.bridge(self.encoder(tokens_BGD, keep_gene_BG))
        decoded_BPD = self.decoder(bridged_BPD + self.decoder.identity(protein_BP), keep_protein_BP)
        abundance_BP1: Tensor = self.decoder.to_out(decoded_BPD)
        return abundance_BP1.squeeze(-1)

    @torch.no_grad()
    def _redraw_when_due(self) -> None:
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if int(stack.calls_since_redraw) < self.redraw_interval:
                stack.calls_since_redraw += 1
                continue
            stack.redraw(derive(self.seed, name, int(self.draws)))
            stack.calls_since_redraw.zero_()
            self.draws += 1


def orthogonal_features(count: int, width: int, dice: torch.Generator | None = None) -> Tensor:
    """Random directions, orthogonal in blocks of `width`, with the lengths of Gaussian vectors; shape (count, width).

    The signs of the decomposition are put right, without which some directions would never be drawn and the kernel be
    estimated with a bias; the published code leaves them.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4; Mezzadri 2007, arXiv:math-ph/0609050.
    """
    blocks = []
    for _ in range(-(-count // width)):
        q_KK, r_KK = torch.linalg.qr(torch.randn(width, width, generator=dice))
        blocks.append((q_KK * r_KK.diagonal().sign()).T)
    lengths_F1: Tensor = torch.randn(count, width, generator=dice).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths_F1


def check_panels(shape: Shape, *, genes: int, proteins: int) -> None:
    """Refuse more genes or proteins than the bridge was made for.

    Raises:
        ModelError: With the counts.
    """
    faults = [
        Fault(f"model: {word}", f"{found:,} {word}, but the network holds {most:,}", f"choose at most {most:,} of them")
        for word, found, most in (("genes", genes, shape.genes), ("proteins", proteins, shape.proteins))
        if found > most
    ]
    if faults:
        raise ModelError.of(faults)


# The original layout: (pattern there, name here); `\1` is the number of a block.
LAYOUT = (
    (r"performer\.net\.layers\.(\d+)\.0\.fn\.fast_attention\.projection_matrix", r"blocks.\1.attention.projection"),
    (r"performer\.net\.layers\.(\d+)\.0\.fn\.to_", r"blocks.\1.attention.to_"),
    (r"performer\.net\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.attention_norm."),
    (r"performer\.net\.layers\.(\d+)\.1\.fn\.fn\.w1\.", r"blocks.\1.feed_forward.expand."),
    (r"performer\.net\.layers\.(\d+)\.1\.fn\.fn\.w2\.", r"blocks.\1.feed_forward.contract."),
    (r"performer\.net\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.feed_forward_norm."),
    (r"performer\.proj_updater\.calls_since_last_redraw", "calls_since_redraw"),
    (r"pos_emb\.", "identity."),
    (r"^enc\.", "encoder."),
    (r"^dec\.", "decoder."),
    (r"^translator\.fc0\.", "bridge.inner."),
    (r"^translator\.fc1\.", "bridge.outer."),
)
TWICE = "performer.proj_updater.instance."
"""Where the original state dict names the tensors of `performer.net.` a second time."""


def from_original(tensors: Mapping[str, Tensor]) -> ScTranslator:
    """The network of a checkpoint in the original layout, in evaluation mode.

    Raises:
        ModelError: With the tensors that are missing, left over or misshapen.
    """
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    here = {_renamed(name): tensor for name, tensor in named.items() if TWICE not in name}
    network = ScTranslator(_shape_of(here))
    _fill(network, {**here, "draws": torch.tensor(0)})
    return network.eval()


def to_original(network: ScTranslator) -> dict[str, Tensor]:
    """The state dict that the published scripts read."""
    there = {_original(name): tensor for name, tensor in network.state_dict().items() if name != "draws"}
    again = {name.replace("performer.net.", TWICE): t for name, t in there.items() if "performer.net." in name}
    return there | again


def save(network: ScTranslator, folder: Path) -> None:
    """Write model.safetensors and config.json.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
    except SafetensorError as error:
        raise storage_error(folder, OSError(str(error))) from error
    except OSError as error:
        raise storage_error(folder, error) from error
    config = {"dropout": network.bridge.dropout.p, "redraw_interval": network.redraw_interval, "seed": network.seed}
    write_json(folder / CONFIG, {"architectures": ["ScTranslator"], **asdict(network.shape), **config})


def load(folder: Path) -> ScTranslator:
    """What `save` wrote, in evaluation mode.

    Raises:
        ModelError: If a file is missing or damaged, or tensors are missing, left over or misshapen.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        shape = Shape(**{name: int(config[name]) for name in Shape.__slots__})
        network = ScTranslator(shape, **{name: config[name] for name in ("dropout", "redraw_interval", "seed")})
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the network cannot be read: {' '.join(str(error).split())[:200]}",
            where=str(folder),
            hint=f"the folder needs {CONFIG} and {WEIGHTS} as they were saved",
        ) from error
    _fill(network, tensors)
    return network.eval()


def _renamed(name: str) -> str:
    for there, here in LAYOUT:
        name = re.sub(there, here, name)
    return name


def _original(name: str) -> str:
    for there, here in LAYOUT:
        # Each rule backwards: the name here becomes the pattern, the pattern there the name.
        pattern = re.escape(here).replace(re.escape(r"\1"), r"(\d+)")
        start = "^" if there.startswith("^") else r"(?<![\w])"
        name = re.sub(start + pattern, there.removeprefix("^").replace(r"(\d+)", r"\1").replace(r"\.", "."), name)
    return name


def _shape_of(tensors: Mapping[str, Tensor]) -> Shape:
    try:
        features, head_dim = tensors["encoder.blocks.0.attention.projection"].shape
        bridge, genes = tensors["bridge.inner.weight"].shape
        vocabulary, dim = tensors["encoder.identity.weight"].shape
        return Shape(
            dim=dim,
            genes=genes,
            proteins=tensors["bridge.outer.weight"].shape[0],
            bridge=bridge,
            vocabulary=vocabulary,
            heads=tensors["encoder.blocks.0.attention.to_q.weight"].shape[0] // head_dim,
            head_dim=head_dim,
            features=features,
            encoder_blocks=_count(tensors, "encoder"),
            decoder_blocks=_count(tensors, "decoder"),
        )
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"this is no scTranslator: {error} is missing or misshapen",
            where="model",
            hint="it needs an encoder, a bridge and a decoder as the published checkpoints have them",
        ) from error


def _count(tensors: Mapping[str, Tensor], stack: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{stack}.blocks.")})


def _fill(network: ScTranslator, tensors: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    faults = [Fault(name, "is missing", "get the checkpoint again") for name in sorted(own.keys() - tensors.keys())]
    faults += [Fault(name, "is no part of the network", "remove it") for name in sorted(tensors.keys() - own.keys())]
    faults += [
        Fault(
            name, f"has the shape {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}", "check its origin"
        )
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if faults:
        raise ModelError.of(faults)
    network.load_state_dict(dict(tensors))
