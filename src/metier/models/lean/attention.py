"""Attention over a pack, as one more function in transformers' table of attention functions.

The pack travels through the network as its attention mask, which every architecture hands on untouched when it has
four dimensions.

Shapes: T tokens of the pack, S nodes, H heads, K key heads, D width of a head, L tokens of a piece.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from metier.models.lean.numbers import exact, working
from metier.models.lean.on_device import flash, flashes, flexible
from metier.models.lean.pack import Attending, Pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from metier.models.lean.pack import Node

NAME = "metier_packed"
"""The function's name in transformers' table."""

_known: Any = WeakTensorKeyDictionary()
"""What was prepared for a pack's mask, so that it is read once and not in every layer."""


def pack_of(mask: Any) -> Pack | None:
    """The pack that an attention mask stands for; None where it is an ordinary mask, or no tensor at all."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.int64 or mask.ndim != 4:
        return None
    prepared = _known.setdefault(mask, {})
    if "pack" not in prepared:
        prepared["pack"] = Pack.of(mask)
    pack: Pack = prepared["pack"]
    return pack


def register() -> None:
    """Enter `attention` into transformers' table, with SDPA's own masks for everything that is no pack."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let a compiler pass over attention over packs: its work depends on what the pack holds, not on sizes alone."""
    with _instead(torch.compiler.disable(attention)):
        yield


@contextmanager
def overheard() -> Iterator[dict[str, Any]]:
    """What a layer that is called inside the block asks of its attention function beside tensors and dropout."""
    heard: dict[str, Any] = {}

    def listen(*given: Any, dropout: float = 0.0, **asked: Any) -> Any:
        heard.update(asked)
        module, query, key, value, mask = given
        return attention(module, query, key, value, mask, dropout, **asked)

    with _instead(listen):
        yield heard


@contextmanager
def _instead(function: Callable[..., Any]) -> Iterator[None]:
    """Another function under the name, until the block ends."""
    from transformers import AttentionInterface

    before = AttentionInterface().get(NAME, attention)
    AttentionInterface.register(NAME, function)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, before)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' SDPA attention, and attention over packs.

    Args:
        module: The layer that asks.
        query: Shape (B, H, T, D).
        key: Shape (B, K, T, D).
        value: Shape (B, K, T, D).
        attention_mask: A pack's mask, or whatever SDPA takes.
        dropout: Share of dropped attention.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        more: `is_causal`, `sliding_window` and what else the architecture says.

    Returns:
        The mixed values, shape (B, T, H, D), and None.

    Raises:
        NotImplementedError: If the architecture asks for something that a pack cannot give.
    """
    pack = pack_of(attention_mask)
    if pack is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return plain
    asked = [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if more.get(name) is not None]
    if asked or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"packed attention with {', '.join(asked) or 'a cache'}")
    prepared = _known[attention_mask]
    causal = more.get("is_causal")
    how = Attending(
        pack,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        more.get("sliding_window"),
    )
    query, key, value = (x.to(working(x)) for x in (query, key, value))
    if flashes(query, value, how, dropout):
        return flash(query, key, value, how, dropout, prepared), None
    if dropout:
        return _dropped(query, key, value, how, dropout, prepared), None
    if query.device.type == "cpu":
        mixed: Tensor = _Blocks.apply(query, key, value, how)  # type: ignore[no-untyped-call]
        return mixed, None
    return flexible(query, key, value, how, prepared), None


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the kernel behind SDPA,
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 - for its log-sum-exp


class _Blocks(torch.autograd.Function):
    """Attention block by block with the CPU's flash kernel; blocks of one query are joined by their log-sum-exp.

    Joining is exact: a softmax over two sets of keys is the mean of the two softmaxes, weighted by their sums of
    exponentials. The kernel's gradient takes the joined output and log-sum-exp and so gives each block's share.
    Source: the same identity carries ring attention, Liu et al. 2023, arXiv:2310.01889.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        q_THD, k_TKD, v_TKD = (x.detach().transpose(1, 2)[0] for x in (query, key, value))
        mixed_THD, total_TH = torch.empty_like(q_THD), torch.empty(q_THD.shape[:2], dtype=exact(q_THD.dtype))
        for block in _blocks(how, q_THD):
            part, sums = _forward(
                block.queries(q_THD), block.keys(k_TKD), block.keys(v_TKD), 0.0, block.causal,
                attn_mask=block.mask, scale=how.scale,
            )  # fmt: skip
            block.join(mixed_THD, total_TH, _flat(part), _flat(sums[..., None])[..., 0])
        ctx.save_for_backward(query, key, value, mixed_THD, total_TH)
        ctx.how = how
        return mixed_THD[None]

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, mixed_THD, total_TH = ctx.saved_tensors
        q_THD, k_TKD, v_TKD = (x.transpose(1, 2)[0] for x in (query, key, value))
        slopes = [torch.empty(x.shape, dtype=x.dtype) for x in (q_THD, k_TKD, v_TKD)]
        for block in _blocks(ctx.how, q_THD):
            parts = _backward(
                block.queries(given[0]), block.queries(q_THD), block.keys(k_TKD), block.keys(v_TKD),
                block.queries(mixed_THD), block.queries(total_TH[..., None])[..., 0].contiguous(), 0.0, block.causal,
                attn_mask=block.mask, scale=ctx.how.scale,
            )  # fmt: skip
            for slope, part, place in zip(slopes, parts, (block.rows, block.columns, block.columns), strict=True):
                if block.is_first:
                    slope[place] = _flat(part)
                else:
                    slope[place] += _flat(part)
        dq, dk, dv = (slope[None].transpose(1, 2) for slope in slopes)
        return dq, dk, dv, None


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries that meet keys: `count` pieces of equal length, each with itself, or all that goes on from a node.

    Attributes:
        rows: Tokens that ask.
        columns: Tokens that are seen.
        count: Pieces.
        causal: Whether a token sees only what stands before it.
        mask: What a window hides, as something to add, shape (rows, columns); None for nothing.
        is_first: Whether the tokens meet nothing before this block.
        blind: Rows that see nothing of this block, shape (rows,); None where there are none.
    """

    rows: slice
    columns: slice
    count: int = 1
    causal: bool = False
    mask: Tensor | None = None
    is_first: bool = True
    blind: Tensor | None = None

    def queries(self, x: Tensor) -> Tensor:
        """The asking part of (T, H, D) as (count, H, L, D)."""
        return self._pieces(x[self.rows])

    def keys(self, x: Tensor) -> Tensor:
        """The seen part of (T, K, D) as (count, K, L, D)."""
        return self._pieces(x[self.columns])

    def _pieces(self, x: Tensor) -> Tensor:
        pieces: Tensor = x.unflatten(0, (self.count, -1))  # type: ignore[no-untyped-call]
        return pieces.transpose(1, 2)

    def join(self, mixed_THD: Tensor, total_TH: Tensor, part: Tensor, sums: Tensor) -> None:
        """Take this block's answer into what the tokens have so far."""
        if self.is_first:
            mixed_THD[self.rows], total_TH[self.rows] = part, sums
            return
        if self.blind is not None:
            part, sums = part.clone(), sums.clone()
            part[self.blind], sums[self.blind] = 0.0, float("-inf")
        joined = torch.logaddexp(total_TH[self.rows], sums)
        mixed_THD[self.rows] *= (total_TH[self.rows] - joined).exp_()[..., None].to(part.dtype)
        mixed_THD[self.rows] += part * (sums - joined).exp_()[..., None].to(part.dtype)
        total_TH[self.rows] = joined


def _flat(x: Tensor) -> Tensor:
    """(count, H, L, D) as (count * L, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _blocks(how: Attending, like: Tensor) -> Iterator[_Block]:
    """Every block; those of the pieces with themselves come first and touch each token once."""
    parents = [node for node in how.pack.nodes if node.reach > node.end]
    if how.narrow:
        yield from _narrow_blocks(how, parents, like)
        return
    for start, count, length in how.pack.runs():
        tokens = slice(start, start + count * length)
        yield _Block(tokens, tokens, count, how.causal, None, is_first=True)
    for node in parents:
        yield _Block(slice(node.end, node.reach), slice(node.start, node.end), is_first=False)


def _narrow_blocks(how: Attending, parents: Sequence[Node], like: Tensor) -> Iterator[_Block]:
    """The same where a window hides what stands too far before."""
    for node in how.pack.nodes:
        tokens = slice(node.start, node.end)
        hidden = _hidden(how, tokens, tokens)
        if how.causal:
            hidden |= torch.ones_like(hidden).triu_(1)
        yield _Block(tokens, tokens, mask=_added(hidden, like), is_first=True)
    for node in parents:
        rows, columns = slice(node.end, node.reach), slice(node.start, node.end)
        hidden = _hidden(how, rows, columns)
        yield _Block(rows, columns, mask=_added(hidden, like), is_first=False, blind=hidden.all(dim=1))


def _hidden(how: Attending, rows: slice, columns: slice) -> Tensor:
    """What a sliding window hides, shape (rows, columns), bool."""
    position = how.pack.positions
    window = how.pack.tokens if how.window is None else how.window
    return position[rows, None] - position[None, columns] >= window


def _added(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _dropped(
    query: Tensor, key: Tensor, value: Tensor, how: Attending, dropout: float, prepared: dict[Any, Any]
) -> Tensor:
    """With attention dropout, which no flash kernel of the CPU does: rows of like length padded to one another."""
    if how.pack.shares or how.narrow:
        raise NotImplementedError("attention dropout with a shared beginning or a sliding window")
    if "like" not in prepared:
        prepared["like"] = [_Like.of(nodes, query.device) for nodes in _like_lengths(how.pack)]
    parts = []
    for like in prepared["like"]:
        q, k, v = (like.pad(x[0].transpose(0, 1)) for x in (query, key, value))
        mask = like.real_SL[:, None, None, :]
        if how.causal:
            longest = like.real_SL.shape[1]
            mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=mask.device).tril()
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=how.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(like.unpad(mixed))
    return torch.cat(parts)[None]


MOST_PADDED = 1.25
"""Longest row beside the shortest of those that are padded to one another, where attention drops. Judgement."""


def _like_lengths(pack: Pack) -> Iterator[list[Node]]:
    """The rows of a pack in neighbours of like length."""
    group: list[Node] = []
    for node in pack.nodes:
        lengths = [node.length, *(other.length for other in group)]
        if group and max(lengths) > MOST_PADDED * min(lengths) + 2:
            yield group
            group = []
        group.append(node)
    yield group


@dataclass(frozen=True, slots=True)
class _Like:
    """Neighbouring rows of like length, end to end and padded.

    Attributes:
        tokens: Where they stand in the pack.
        place_P: For each padded place the token that stands there, counted from the first; padding names the last one.
        back_T: For each token its padded place.
        real_SL: Which padded places hold tokens.
    """

    tokens: slice
    place_P: Tensor
    back_T: Tensor
    real_SL: Tensor

    @classmethod
    def of(cls, nodes: Sequence[Node], device: torch.device) -> _Like:
        first, longest = nodes[0].start, max(node.length for node in nodes)
        length_S1 = torch.tensor([[node.length] for node in nodes])
        start_S1 = torch.tensor([[node.start - first] for node in nodes])
        step_L = torch.arange(longest)
        real_SL = step_L < length_S1
        place_SL = start_S1 + torch.minimum(step_L, length_S1 - 1)
        back_T = real_SL.flatten().nonzero()[:, 0]
        return cls(slice(first, nodes[-1].end), place_SL.flatten().to(device), back_T.to(device), real_SL.to(device))

    def pad(self, x_THD: Tensor) -> Tensor:
        """(T, H, D) of the pack as (S, H, L, D)."""
        flat = x_THD[self.tokens].flatten(1)
        padded: Tensor = _Pad.apply(flat, self)  # type: ignore[no-untyped-call]
        return padded.view(*self.real_SL.shape, *x_THD.shape[1:]).transpose(1, 2)

    def unpad(self, x_SHLD: Tensor) -> Tensor:
        """(S, H, L, D) as (T, H, D)."""
        x_SLHD = x_SHLD.transpose(1, 2)
        tokens: Tensor = _Unpad.apply(x_SLHD.flatten(0, 1).flatten(1), self)  # type: ignore[no-untyped-call]
        return tokens.view(-1, *x_SLHD.shape[2:])


class _Pad(torch.autograd.Function):
    """A gather both ways: padding has no slope, for nothing sees it."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, like: _Like) -> Tensor:
        ctx.like = like
        return tokens.index_select(0, like.place_P)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope.index_select(0, ctx.like.back_T), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, like: _Like) -> Tensor:
        ctx.like = like
        return padded.index_select(0, like.back_T)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        padded = slope.index_select(0, ctx.like.place_P)
        return padded.mul_(ctx.like.real_SL.flatten()[:, None]), None
