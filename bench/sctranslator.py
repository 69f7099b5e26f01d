"""Training speed of our scTranslator beside the published formulas, step by step in one interleaved run.

The published side is a plain restatement, written here from the description of the network: numerator and normaliser
of the attention as two products, the projection repeated for every cell, every ratio multiplied out, Adam as its
script calls it. Both sides hold the same weights and see the same cells; outputs and gradients are compared first. Ours
trains twice, with the whole embeddings and with the rows in use alone, which gives the same weights to the bit.

    python bench/sctranslator.py --all --rounds 7
    python bench/sctranslator.py --dim 32 --genes 2000 --batch 4

Shapes: B cells, G genes, P proteins, N tokens, D width, H heads, K head width, F random features.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core import heap
from metier.models.sctranslator import EPSILON, Attention, ScTranslator, Shape, Stack

PROTEINS = 100


def published_features(x_BHNK: Tensor, projection_FK: Tensor, *, query: bool) -> Tensor:
    """Positive random features, every factor in its place."""
    size = x_BHNK.shape[-1] ** -0.25
    ratio = projection_FK.shape[0] ** -0.5
    repeated_BHFK = projection_FK.expand(*x_BHNK.shape[:2], *projection_FK.shape).contiguous()
    dash_BHNF = torch.einsum("...id,...jd->...ij", size * x_BHNK, repeated_BHFK)
    diagonal_BHN1 = ((x_BHNK**2).sum(dim=-1) / 2.0 * size**2).unsqueeze(-1)
    over = (-1,) if query else (-1, -2)
    most = dash_BHNF.amax(dim=over, keepdim=True).detach()
    return ratio * (torch.exp(dash_BHNF - diagonal_BHN1 - most) + EPSILON)


def published_attention(layer: Attention, x_BND: Tensor, keep_BN: Tensor) -> Tensor:
    """Linear attention with numerator and normaliser apart."""
    q, k, v = (f(x_BND).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v))
    v = v.masked_fill(~keep_BN[:, None, :, None], 0.0)
    q = published_features(q, layer.projection, query=True)
    k = published_features(k, layer.projection, query=False)
    normaliser = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
    context = torch.einsum("...nd,...ne->...de", k, v)
    out = torch.einsum("...de,...nd,...n->...ne", context, q, normaliser)
    return layer.to_out(out.transpose(1, 2).flatten(2))


def published_stack(stack: Stack, x_BND: Tensor, keep_BN: Tensor) -> Tensor:
    """The blocks of one stack."""
    for block in stack.blocks:
        x_BND = x_BND + published_attention(block.attention, block.attention_norm(x_BND), keep_BN)
        wide = F.gelu(block.feed_forward.expand(block.feed_forward_norm(x_BND)))
        x_BND = x_BND + block.feed_forward.contract(wide)
    return x_BND


def published(network: ScTranslator, *cells: Tensor) -> Tensor:
    """The whole network by the published formulas, on our weights."""
    rna, gene, protein, keep_gene, keep_protein = cells
    tokens = network.encoder.to_vector(rna[..., None]) + network.encoder.identity(gene)
    bridged = network.bridge(published_stack(network.encoder, tokens, keep_gene))
    decoded = published_stack(network.decoder, bridged + network.decoder.identity(protein), keep_protein)
    return network.decoder.to_out(decoded).squeeze(-1)


@dataclass(frozen=True)
class Setting:
    """What one row of the table measures."""

    dim: int
    genes: int
    batch: int


ALL = (Setting(32, 2000, 4), Setting(128, 2000, 4), Setting(32, 4000, 8), Setting(128, 4000, 8))
NAMES = ("ours, rows in use", "ours, whole", "published")


def main() -> None:
    """Compare the sides, then take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the four settings of the table")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="the first is not counted")
    given = parser.parse_args()
    torch.set_num_threads(2)
    print(
        f"| dim | genes | batch | {', '.join(NAMES)}: median cells/s | ratio, rows in use, by round | median | whole |"
    )
    print("|---|---|---|---|---|---|---|")
    for setting in ALL if given.all else [Setting(given.dim, given.genes, given.batch)]:
        _measure(setting, given.rounds)


def _measure(setting: Setting, rounds: int) -> None:
    torch.manual_seed(0)
    shape = Shape.of(setting.dim, setting.genes, PROTEINS)
    whole = ScTranslator(shape, dropout=0.0, redraw_interval=0).train()
    theirs = copy.deepcopy(whole)
    # One panel for all cells, as a data set has it.
    ids = torch.randperm(shape.vocabulary - 1)[: setting.genes + PROTEINS] + 1
    gene, protein = (part.repeat(setting.batch, 1) for part in ids.split([setting.genes, PROTEINS]))
    rna, keep = torch.rand(gene.shape), torch.rand(gene.shape) > 0.1
    cells = (rna, gene, protein, keep, torch.ones(protein.shape, dtype=torch.bool))
    far = _difference(whole, theirs, cells)
    few = whole.restricted(ids.tolist())
    fused = {"lr": 1e-4, "amsgrad": True, "fused": True}
    sides = (
        (lambda: few(*cells), torch.optim.Adam(few.parameters(), **fused)),
        (lambda: whole(*cells), torch.optim.Adam(whole.parameters(), **fused)),
        (lambda: published(theirs, *cells), torch.optim.Adam(theirs.parameters(), lr=1e-4, amsgrad=True)),
    )
    seconds: list[tuple[float, ...]] = []
    for _ in range(rounds):
        with heap.kept():
            ours = [_step(*side) for side in sides[:2]]
        seconds.append((*ours, _step(*sides[2])))
    counted = seconds[1:]
    speeds = ", ".join(f"{setting.batch / statistics.median(side):.2f}" for side in zip(*counted, strict=True))
    ratios, ratios_whole = ([turn[2] / turn[side] for turn in counted] for side in (0, 1))
    print(
        f"| {setting.dim} | {setting.genes} | {setting.batch} | {speeds} | {', '.join(f'{r:.2f}' for r in ratios)} | "
        f"{statistics.median(ratios):.2f} | {statistics.median(ratios_whole):.2f} |",
        flush=True,
    )
    print(f"<!-- {far}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores -->", flush=True)


def _difference(ours: ScTranslator, theirs: ScTranslator, cells: tuple[Tensor, ...]) -> str:
    """How far outputs and gradients are apart; stops where that is too far."""
    mine, plain = ours(*cells), published(theirs, *cells)
    mine.square().mean().backward()
    plain.square().mean().backward()
    pairs = [
        (a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True) if b.grad is not None
    ]
    far = float((mine - plain).detach().abs().max())
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    apart /= math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    ours.zero_grad()
    theirs.zero_grad()
    told = f"outputs equal within {far:.1e}, gradients within {apart:.1e} of their length"
    if far > 1e-5 or apart > 1e-5:
        raise SystemExit(f"too far apart: {told}")
    return told


def _step(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    forward().square().mean().backward()
    optimizer.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
