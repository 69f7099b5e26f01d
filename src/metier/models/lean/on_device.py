"""Attention over a pack on a device: the flash kernel where it can, else torch's FlexAttention.

Shapes: T tokens of the pack, S nodes, H heads, K key heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from metier.models.lean.pack import Attending, Pack

WIDEST = 256
"""Most numbers of a head that the flash kernel takes. Source: Dao 2023, arXiv:2307.08691."""

NARROWEST = 16
"""Fewest numbers of a head that FlexAttention's kernel takes. Source: its own refusal, torch 2.11."""


def flashes(query: Tensor, value: Tensor, how: Attending, dropout: float) -> bool:
    """Whether the flash kernel can do it: half precision, a card that has it, and masks that lengths can tell."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in {torch.bfloat16, torch.float16}
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= WIDEST
        and not (how.narrow and (how.pack.shares or not how.causal))
        and not (dropout and how.pack.shares)
        and _has_flash(query.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def flash(
    query: Tensor, key: Tensor, value: Tensor, how: Attending, dropout: float, prepared: dict[Any, Any]
) -> Tensor:
    """Each node with itself in one call of the kernel, and one more for all that goes on from a node.

    Args:
        query: Shape (1, H, T, D).
        key: Shape (1, K, T, D).
        value: Shape (1, K, T, D).
        how: The pack, and who sees whom.
        dropout: Share of dropped attention.
        prepared: Keeps what the layers of a network have in common.

    Returns:
        The mixed values, shape (1, T, H, D).
    """
    if "calls" not in prepared:
        prepared["calls"] = _calls(how.pack, query.device)
    mixed: Tensor = _Flash.apply(query, key, value, how, dropout, prepared["calls"])  # type: ignore[no-untyped-call]
    return mixed


@dataclass(frozen=True, slots=True)
class _Call:
    """Queries and keys of one call of the kernel.

    Attributes:
        rows: Tokens that ask.
        columns: Tokens that are seen.
        query_ends: Where each piece begins among `rows`, and where the last one ends, shape (pieces + 1,), int32.
        key_ends: The same among `columns`.
        most: Tokens of the longest piece that asks, and of the longest that is seen.
        itself: Whether each piece meets itself, and so nothing before.
    """

    rows: slice
    columns: slice
    query_ends: Tensor
    key_ends: Tensor
    most: tuple[int, int]
    itself: bool

    def settings(self, how: Attending) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What forward and backward of the kernel take alike."""
        left = how.window - 1 if how.narrow and how.window is not None else None
        return (self.query_ends, self.key_ends, *self.most), {"scale": how.scale, "window_size_left": left}


def _calls(pack: Pack, device: torch.device) -> Sequence[_Call]:
    def ends(*places: int) -> Tensor:
        return torch.tensor(places, dtype=torch.int32).to(device, non_blocking=True)

    nodes = pack.nodes
    all_ends = ends(0, *(node.end for node in nodes))
    longest = max(node.length for node in nodes)
    found = [_Call(slice(None), slice(None), all_ends, all_ends, (longest, longest), itself=True)]
    for node in nodes:
        if node.reach > node.end:
            after = node.reach - node.end
            rows, columns = slice(node.end, node.reach), slice(node.start, node.end)
            found.append(_Call(rows, columns, ends(0, after), ends(0, node.length), (after, node.length), itself=False))
    return found


class _Flash(torch.autograd.Function):
    """What several calls say of one query is joined by their log-sum-exp, as on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: Attending, dropout: float, calls: Sequence[_Call]
    ) -> Tensor:
        q_THD, k_TKD, v_TKD = (x.detach().transpose(1, 2)[0] for x in (query, key, value))
        for call in calls:
            ends, settings = call.settings(how)
            part, sums_HT, *chances = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - the kernel behind SDPA,
                q_THD[call.rows], k_TKD[call.columns], v_TKD[call.columns], *ends,
                dropout, call.itself and how.causal, return_debug_mask=False, **settings,
            )[:4]  # fmt: skip
            if call.itself:
                mixed_THD, total_HT, ctx.chances = part, sums_HT, chances
            else:
                _join_(mixed_THD[call.rows], total_HT[:, call.rows], part, sums_HT)
        ctx.save_for_backward(query, key, value, mixed_THD, total_HT)
        ctx.how, ctx.dropout, ctx.calls = how, dropout, calls
        answer: Tensor = mixed_THD[None]
        return answer

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mixed_THD, total_HT = ctx.saved_tensors
        q_THD, k_TKD, v_TKD = (x.transpose(1, 2)[0] for x in (query, key, value))
        for call in ctx.calls:
            ends, settings = call.settings(ctx.how)
            parts = torch.ops.aten._flash_attention_backward(  # noqa: SLF001 - for its log-sum-exp
                given[0, call.rows], q_THD[call.rows], k_TKD[call.columns], v_TKD[call.columns],
                mixed_THD[call.rows], total_HT[:, call.rows].contiguous(), *ends,
                ctx.dropout, call.itself and ctx.how.causal, *ctx.chances, **settings,
            )  # fmt: skip
            if call.itself:
                slopes = parts
                continue
            for slope, part, place in zip(slopes, parts, (call.rows, call.columns, call.columns), strict=True):
                slope[place] += part
        dq, dk, dv = (slope[None].transpose(1, 2) for slope in slopes)
        return dq, dk, dv, None, None, None


def _join_(mixed_THD: Tensor, total_HT: Tensor, part: Tensor, sums_HT: Tensor) -> None:
    """Take a further answer into what the tokens have so far, in place."""
    joined = torch.logaddexp(total_HT, sums_HT)
    kept, new = ((x - joined).exp_().T[..., None] for x in (total_HT, sums_HT))
    mixed_THD.copy_(mixed_THD * kept + part * new)
    total_HT.copy_(joined)


def flexible(query: Tensor, key: Tensor, value: Tensor, how: Attending, prepared: dict[Any, Any]) -> Tensor:
    """Torch's FlexAttention, which skips the blocks of a mask that hide everything; arguments as for `flash`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kind = (how.causal, how.window)
    if kind not in prepared:
        start, reach = (x.to(query.device) for x in how.pack.bounds)
        position, tokens = how.pack.positions.to(query.device), how.pack.tokens

        def seen(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            first = column if how.causal else start[column]
            found = (row >= first) & (row < reach[column])
            return found if how.window is None else found & (position[row] - position[column] < how.window)

        prepared[kind] = create_block_mask(seen, None, None, tokens, tokens, device=query.device)
    run, width = flex_attention, value.shape[-1]
    if query.device.type == "cuda":
        run = _compiled(flex_attention)
        # Zeros change neither a score nor what is mixed.
        query, key, value = (F.pad(x, (0, max(0, NARROWEST - x.shape[-1]))) for x in (query, key, value))
    mixed: Tensor = run(
        query, key, value, block_mask=prepared[kind], scale=how.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed[..., :width].transpose(1, 2)


@cache
def _compiled(function: Any) -> Any:
    """FlexAttention is a kernel only when compiled; once for all layers and packs."""
    return torch.compile(function, dynamic=True)
