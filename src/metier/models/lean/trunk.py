"""What stands below everything that moves gives the same states in every epoch: they are computed once and kept.

Shapes: T tokens of a pack, L tokens of a row, H hidden.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from metier.models.lean.attention import pack_of
from metier.models.structure import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metier.models.lean.pack import Pack

CHUNK_TOKENS = 1 << 14
"""Tokens whose states are allocated at once."""
IN_MEMORY_BYTES = 1 << 30
"""States that are kept in memory before further ones go to a file. Judgement."""


class Store:
    """States of rows by what the rows say: in memory first, then in a file that vanishes with the store.

    One store may serve several runs on one base: other seeds, other rates, other adapters above the same depth.
    """

    def __init__(self, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        """Nothing is kept yet."""
        self._room = in_memory_bytes
        self._places: dict[int, tuple[int, int, int]] = {}  # row -> (chunk, first token, tokens)
        self._chunks: list[Tensor] = []
        self._used = CHUNK_TOKENS
        self.in_file_bytes = 0
        self.served = 0

    def knows(self, pack: Pack) -> bool:
        """Whether every row of a pack is kept."""
        return all(node.row in self._places for node in pack.nodes)

    def take(self, pack: Pack) -> Tensor:
        """The states of a pack's rows, shape (1, T, H)."""
        self.served += pack.tokens
        parts = []
        for node in pack.nodes:
            chunk, first, count = self._places[node.row]
            parts.append(self._chunks[chunk][first : first + count])
        return torch.cat(parts)[None]

    def keep(self, pack: Pack, states: Tensor) -> None:
        """Keep the states, shape (1, T, H), of the rows that are not kept yet."""
        # What is made while measuring could not be used in training: it would be marked as never to be differentiated.
        with torch.inference_mode(mode=False), torch.no_grad():
            for node in pack.nodes:
                if node.row not in self._places:
                    chunk, first = self._place(node.length, states)
                    self._chunks[chunk][first : first + node.length].copy_(states[0, node.start : node.end])
                    self._places[node.row] = (chunk, first, node.length)

    def _place(self, tokens: int, like: Tensor) -> tuple[int, int]:
        if not self._chunks or self._used + tokens > len(self._chunks[-1]):
            self._chunks.append(self._allocate(max(tokens, CHUNK_TOKENS), like))
            self._used = 0
        first, self._used = self._used, self._used + tokens
        return len(self._chunks) - 1, first

    def _allocate(self, tokens: int, like: Tensor) -> Tensor:
        size = tokens * like.shape[-1] * like.element_size()
        if size <= self._room or like.device.type != "cpu":
            self._room -= size
            return torch.empty(tokens, like.shape[-1], dtype=like.dtype, device=like.device)
        self.in_file_bytes += size
        with tempfile.TemporaryFile(prefix="metier-states-") as file:  # the map outlives the name and the handle
            file.truncate(size)
            raw = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
        return torch.from_numpy(raw).view(like.dtype).view(tokens, like.shape[-1])


def trunk_depth(module: nn.Module) -> int:
    """Blocks below everything that moves; 0 where something in or before the first one moves, or is dropped."""
    stack = blocks(module)
    if stack is None or drops(module) or not any(p.requires_grad for p in module.parameters()):
        return 0
    inside = {id(p) for block in stack for p in block.parameters()}
    depth = 0
    for block in stack:
        if any(p.requires_grad for p in block.parameters()):
            break
        depth += 1
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
    embeds = any("embed" in name or name.split(".")[-2:-1] in (["wte"], ["wpe"]) for name in names)
    return 0 if embeds or (depth == len(stack) and not names) else depth


def drops(module: nn.Module) -> bool:
    """Whether anything is dropped in training."""
    config: Any = getattr(module, "config", None)
    rates = [getattr(config, name, 0.0) or 0.0 for name in ("attention_dropout", "attn_pdrop")]
    return any(rates) or any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


@contextmanager
def remembered(module: nn.Module, store: Store | None = None) -> Iterator[Store | None]:
    """Keep what the lower blocks say of each packed row while the block runs; None where they move as well."""
    depth, stack = trunk_depth(module), blocks(module)
    if depth == 0 or stack is None:
        yield None
        return
    kept = Store() if store is None else store
    before = [stack[place] for place in range(depth)]
    for place, block in enumerate(before):
        stack[place] = _Below(block, kept, is_last=place == depth - 1)
    try:
        yield kept
    finally:
        for place, block in enumerate(before):
            stack[place] = block.train(stack[place].training)


class _Below(nn.Module):
    """A block below everything that moves: hands states on untouched where the last of them knows what comes out."""

    def __init__(self, block: nn.Module, store: Store, *, is_last: bool) -> None:
        super().__init__()
        self.block = block
        self._store, self._is_last = store, is_last

    def forward(self, states: Tensor, *more: Any, **words: Any) -> Any:
        pack = _pack_among((*more, *words.values()))
        if pack is not None and self._store.knows(pack):
            return self._store.take(pack) if self._is_last else states
        out = self.block(states, *more, **words)
        if pack is not None and self._is_last and isinstance(out, Tensor):
            self._store.keep(pack, out)
        return out

    def __getattr__(self, name: str) -> Any:
        # Some networks ask their blocks for what they are, such as their attention's type.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _pack_among(given: tuple[Any, ...]) -> Pack | None:
    """The pack that is among a block's arguments, where its nodes are whole rows."""
    for value in given:
        pack = pack_of(value)
        if pack is not None:
            return None if pack.shares else pack
    return None
