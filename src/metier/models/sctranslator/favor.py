"""FAVOR+ attention, part by part and cell by cell, each part on one thread from beginning to end.

Shapes: B cells, G genes, P proteins, N tokens (genes or proteins), D width, H heads, K head width, F random features,
V = K + 1 for a head's values with a column that carries the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-4
"""What is added to every random feature. Source: the published network."""
PART = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Random features that a part of the attention holds at once: what a CPU's cache keeps, what fills a GPU."""
Part = TypeVar("Part")
Result = TypeVar("Result")
Place = tuple[slice, slice]
"""Some cells and some of their heads."""


class Favor(torch.autograd.Function):
    """Attention by random features, part by part: nothing of N times F numbers outlives its part.

    With E the exponentials of a feature map, its features are E + EPSILON. The constant never touches them: it comes
    into every product as EPSILON times a sum over the other factor. The backward pass computes E again.

    Source: Choromanski et al. 2021, arXiv:2009.14794, equations 4 and 5.
    """

    @staticmethod
    def forward(  # noqa: D102 - torch names it and its arguments
        ctx: Any, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, times_N1: Tensor, projection_FK: Tensor
    ) -> Tensor:
        feature_count, width = projection_FK.shape
        scaled_FK = projection_FK * width**-0.25
        out_BHNK, normaliser_BHN1 = torch.empty_like(q_BHNK), torch.empty_like(q_BHNK[..., :1])
        context_BHFV = q_BHNK.new_empty(*q_BHNK.shape[:2], feature_count, width + 1)

        def compute(part: Place) -> None:
            valued_BHNV = _with_column(v_BHNK[part], times_N1)
            context = _exponentials(k_BHNK[part], scaled_FK, over=(-1, -2)).mT @ valued_BHNV
            context += EPSILON * valued_BHNV.sum(-2, keepdim=True)
            mixed_BHNV = _exponentials(q_BHNK[part], scaled_FK, over=(-1,)) @ context
            mixed_BHNV += EPSILON * context.sum(-2, keepdim=True)
            # The last column is the normaliser: what the weights of a token sum to.
            context_BHFV[part], normaliser_BHN1[part] = context, mixed_BHNV[..., -1:]
            out_BHNK[part] = mixed_BHNV[..., :-1].div_(mixed_BHNV[..., -1:])

        _side_by_side(compute, _parts(q_BHNK, feature_count))
        ctx.save_for_backward(q_BHNK, k_BHNK, v_BHNK, times_N1, scaled_FK, out_BHNK, normaliser_BHN1, context_BHFV)
        return out_BHNK

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BHNK: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102 - torch names it
        q_BHNK, k_BHNK, v_BHNK, times_N1, scaled_FK, out_BHNK, normaliser_BHN1, context_BHFV = ctx.saved_tensors
        to_q_BHNK, to_k_BHNK, to_v_BHNK = (torch.empty_like(x_BHNK) for x_BHNK in (q_BHNK, k_BHNK, v_BHNK))

        def compute(part: Place) -> None:
            to_out_BHNK = grad_BHNK[part] / normaliser_BHN1[part]
            to_normaliser_BHN1 = (to_out_BHNK * out_BHNK[part]).sum(-1, keepdim=True).neg_()
            to_mixed_BHNV = torch.cat([to_out_BHNK, to_normaliser_BHN1], dim=-1)
            q_BHNF = _exponentials(q_BHNK[part], scaled_FK, over=(-1,))
            to_context_BHFV = q_BHNF.mT @ to_mixed_BHNV
            to_context_BHFV += EPSILON * to_mixed_BHNV.sum(-2, keepdim=True)
            q_BHNF *= to_mixed_BHNV @ context_BHFV[part].mT
            to_q_BHNK[part] = _through_features(q_BHNK[part], q_BHNF, scaled_FK)
            k_BHNF = _exponentials(k_BHNK[part], scaled_FK, over=(-1, -2))
            to_value_BHFK = to_context_BHFV[..., :-1]
            to_v_BHNK[part] = k_BHNF @ to_value_BHFK + EPSILON * to_value_BHFK.sum(-2, keepdim=True)
            k_BHNF *= _with_column(v_BHNK[part], times_N1) @ to_context_BHFV.mT
            to_k_BHNK[part] = _through_features(k_BHNK[part], k_BHNF, scaled_FK)

        _side_by_side(compute, _parts(q_BHNK, scaled_FK.shape[0]))
        return to_q_BHNK, to_k_BHNK, to_v_BHNK, None, None


def _exponentials(x_BHNK: Tensor, scaled_FK: Tensor, *, over: tuple[int, ...]) -> Tensor:
    """Positive features without their constant; their products estimate the softmax kernel.

    A factor that cancels out is left away. The largest exponent is a constant to the gradient, as published.
    """
    dash_BHNF = x_BHNK @ scaled_FK.T
    half_BHN1 = x_BHNK.square().sum(-1, keepdim=True) * (x_BHNK.shape[-1] ** -0.5 / 2)
    return dash_BHNF.sub_(half_BHN1 + dash_BHNF.amax(dim=over, keepdim=True)).exp_()


def _through_features(x_BHNK: Tensor, weighted_BHNF: Tensor, scaled_FK: Tensor) -> Tensor:
    """The gradient of what went into the features; `weighted` is the exponentials times the gradient of each."""
    from_half_BHN1 = weighted_BHNF.sum(-1, keepdim=True) * x_BHNK.shape[-1] ** -0.5
    return (weighted_BHNF @ scaled_FK).sub_(x_BHNK * from_half_BHN1)


def _with_column(v_BHNK: Tensor, times_N1: Tensor) -> Tensor:
    return torch.cat([v_BHNK, times_N1.expand(*v_BHNK.shape[:2], -1, -1)], dim=-1)


def _parts(x_BHNK: Tensor, features: int) -> list[Place]:
    """Cells and heads cut so that a part's features fit where they are worked on; the cut never depends on threads."""
    cells, heads, tokens, _ = x_BHNK.shape
    most = PART.get(x_BHNK.device.type, PART["cuda"])
    tall, wide = max(1, most // (heads * tokens * features)), max(1, min(heads, most // (tokens * features)))
    return [(slice(b, b + tall), slice(h, h + wide)) for b in range(0, cells, tall) for h in range(0, heads, wide)]


def _side_by_side(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """What the work makes of every part, each on one thread from beginning to end.

    Threads that share every single operation wait for each other at its end; where others use the machine too, many
    short operations become mostly waiting. Measured: bench/results/sctranslator.md.
    """
    threads = torch.get_num_threads()
    if min(threads, len(parts)) < 2:
        return [work(part) for part in parts]

    def alone() -> None:
        torch.get_num_threads()  # Torch sets a thread up at its first use, which would undo the next line.
        torch.set_num_threads(1)

    try:
        with ThreadPoolExecutor(min(threads, len(parts)), initializer=alone) as pool:
            return list(pool.map(torch.set_grad_enabled(torch.is_grad_enabled())(work), parts))
    finally:
        torch.set_num_threads(threads)  # For threads that begin later; this one still has its number.


class CellByCell(torch.autograd.Function):
    """Blocks over cells side by side, in both passes: tokens of two cells never meet, so each cell has its own graph.

    Not only the attention but every operation of a block then runs without waiting for other threads.
    """

    @staticmethod
    def forward(  # noqa: D102 - torch names it
        ctx: Any, through: Callable[[Tensor, slice], Tensor], x_BND: Tensor, *weights: Tensor
    ) -> Tensor:
        def compute(cell: slice) -> tuple[list[Tensor], Tensor]:
            with torch.enable_grad():
                x_1ND = x_BND[cell].detach().requires_grad_(ctx.needs_input_grad[1])
                moving = [tensor for tensor in (x_1ND, *weights) if tensor.requires_grad]
                return moving, through(x_1ND, cell)

        ctx.graphs = _side_by_side(compute, [slice(b, b + 1) for b in range(len(x_BND))])
        return torch.cat([y_1ND.detach() for _, y_1ND in ctx.graphs])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102 - torch names it
        def compute(cell: int) -> tuple[Tensor, ...]:
            moving, y_1ND = ctx.graphs[cell]
            return torch.autograd.grad(y_1ND, moving, grad_BND[cell : cell + 1], materialize_grads=True)  # type: ignore[no-any-return]

        by_tensor = zip(*_side_by_side(compute, range(len(ctx.graphs))), strict=True)
        to_x_BND = torch.cat(next(by_tensor)) if ctx.needs_input_grad[1] else None
        return None, to_x_BND, *(torch.stack(to_weight).sum(0) for to_weight in by_tensor)


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
