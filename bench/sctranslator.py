"""Training speed of our scTranslator beside the published formulas, step by step in one interleaved run.

The published side is a plain restatement, written here from the description of the network: numerator and normaliser
of the attention as two products, the projection repeated for every cell, every ratio multiplied out, Adam as its
script calls it. Both sides hold the same weights and see the same cells; their outputs are compared first.

    python bench/sctranslator.py --genes 2000 --batch 4

Shapes: B cells, G genes, P proteins, N tokens, D width, H heads, K head width, F random features.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

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


def main() -> None:
    """Compare the outputs, then take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.manual_seed(0)
    shape = Shape.of(given.dim, given.genes, PROTEINS)
    ours = ScTranslator(shape, dropout=0.0, redraw_interval=0).train()
    theirs = copy.deepcopy(ours)
    cells = (
        torch.rand(given.batch, given.genes),
        torch.randint(1, shape.vocabulary, (given.batch, given.genes)),
        torch.randint(1, shape.vocabulary, (given.batch, PROTEINS)),
        torch.rand(given.batch, given.genes) > 0.1,
        torch.ones(given.batch, PROTEINS, dtype=torch.bool),
    )
    with torch.no_grad():
        far = float((ours(*cells) - published(theirs, *cells)).abs().max())
    if far > 1e-5:
        raise SystemExit(f"the outputs differ by {far:g}")
    mine = torch.optim.Adam(ours.parameters(), lr=1e-4, amsgrad=True, fused=True)
    plain = torch.optim.Adam(theirs.parameters(), lr=1e-4, amsgrad=True)
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(given.rounds):
        with heap.kept():
            seconds["ours"].append(_step(lambda: ours(*cells), mine))
        seconds["published"].append(_step(lambda: published(theirs, *cells), plain))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True)][1:]
    speeds = {name: ", ".join(f"{given.batch / s:.2f}" for s in found[1:]) for name, found in seconds.items()}
    print("| dim | genes | batch | ours, cells/s | published formulas, cells/s | ratio by round | median |")
    print("|---|---|---|---|---|---|---|")
    told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"| {given.dim} | {given.genes} | {given.batch} | {speeds['ours']} | {speeds['published']} | {told} | "
        f"{statistics.median(ratios):.2f} |"
    )
    print(f"\noutputs equal within {far:.1e}; {torch.get_num_threads()} threads; the first round is not counted")


def _step(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    forward().square().mean().backward()
    optimizer.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
