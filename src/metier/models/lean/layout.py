"""How a network of transformers reads best, found out by trying and not by its name.

Shapes: T tokens, V vocabulary, H width.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from metier.models.lean.attention import NAME, register
from metier.models.lean.head import Finish
from metier.models.lean.pack import lay
from metier.models.lean.trunk import drops, trunk_depth
from metier.models.structure import head_names, output_layer, wrapped_base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from metier.models.lean.pack import Packed

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Names that configurations give to the cap of the scores."""
ROOM = 2e-3
"""Largest difference beside the largest score: far above what the order of sums does in float32, far below what a leak
or a wrong position does."""
ROOM_HALF = 0.08
"""The same in bf16 and fp16. Measured in bf16 with SmolLM2-135M and with 28 blocks of random weights: the order of sums
makes up to 0.036, a leak 0.18 to 1.3."""
TRIED = (19, 23, 4)
"""Lengths of the rows that are tried; the first two begin with the same 17 tokens."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows are put before a network.

    Attributes:
        packed: Whether rows stand end to end in one sequence; else each is padded to the longest.
        shares: Whether what rows begin with alike is computed once.
        first_position: Position of a row's first token; RoBERTa counts from behind its padding token.
        finish: What happens to scores after the head, where that is known: then they never exist whole.
        why_not: Why rows are not packed, for people.
    """

    packed: bool = False
    shares: bool = False
    first_position: int = 0
    finish: Finish | None = None
    why_not: str = ""


PADDED = Layout()
"""What every network reads."""


def revised(known: Layout, module: nn.Module) -> Layout:
    """The layout of a network that was tried before and now has an adapter: adapters change nothing but what may share.

    Args:
        known: What was found out without the adapter.
        module: The network as it trains.
    """
    shares = known.shares and not drops(module) and not trunk_depth(module)
    return replace(known, shares=shares)


@torch.no_grad()
def layout(module: nn.Module) -> Layout:
    """Try packing, sharing and the head of a network on a few random rows; its attention is set to match.

    What answers otherwise than row by row, or raises, is not done. Dropout forbids sharing: a beginning computed once
    would be dropped alike for every row; and where the lower blocks stand still, rows are kept whole instead.

    Args:
        module: The network, bare or with an adapter around it.
    """
    network: Any = wrapped_base(module)
    config = getattr(network, "config", None)
    if config is None or not callable(getattr(network, "set_attn_implementation", None)):
        return Layout(why_not="the network is none of transformers'")
    rows = _rows(network)
    with _calm(module):
        plain = [_answer(module, {"input_ids": torch.tensor([row])}) for row in rows]
        finish = _finish(module, network, rows[0]) if output_layer(network) is not None else None
        packed, why_not = Layout(packed=True, finish=finish), ""
        for first in (0, (getattr(config, "pad_token_id", None) or 0) + 1):
            packed = replace(packed, first_position=first)
            why_not = _try(module, network, rows, plain, packed)
            if not why_not:
                break
        if why_not:
            return Layout(finish=finish, why_not=why_not)
        shared = replace(packed, shares=True)
        if finish is None or drops(network) or _try(module, network, rows, plain, shared):
            return packed
        return revised(shared, module)


def inputs(rows: Sequence[Sequence[int]], packed: Packed, form: Layout) -> dict[str, Tensor]:
    """A pack of rows as a network takes it, by the names of its arguments."""
    ids = [token for row, begin, end in packed.pieces for token in rows[row][begin:end]]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": packed.pack.positions[None] + form.first_position,
        "attention_mask": packed.pack.mask(),
    }


@contextmanager
def at_first_tokens(module: nn.Module, start_B: Tensor) -> Iterator[None]:
    """Let poolers and classification heads see the first token of each packed row, as rows of one token."""
    network: Any = wrapped_base(module)
    trunk = getattr(network, getattr(network, "base_model_prefix", ""), network)
    outside = [network.get_submodule(name) for name in head_names(network)]
    inside = [trunk.pooler] if isinstance(getattr(trunk, "pooler", None), nn.Module) else []

    def choose(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = given[0]
        if not isinstance(states, torch.Tensor) or states.ndim != 3 or states.shape[0] != 1:
            return None
        return (states[0, start_B][:, None], *given[1:])

    def leave(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
        if isinstance(getattr(out, "last_hidden_state", None), torch.Tensor):
            out["last_hidden_state"] = out.last_hidden_state[0, start_B][:, None]

    hooks = [part.register_forward_pre_hook(choose) for part in (*inside, *outside)]
    if trunk is not network:
        hooks.append(trunk.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hidden_states(module: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the output layer is given, shape (B * T, H), and the network's scores of the first place, shape (V,).

    Args:
        module: A language model, bare or with an adapter around it.
        given: Its arguments by name.
    """
    head = output_layer(wrapped_base(module))
    if head is None:
        raise AssertionError("no output layer")
    seen: list[Tensor] = []

    def take(_: nn.Module, states: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(states[0])
        return (states[0][:1, :1], *states[1:])

    hook = head.register_forward_pre_hook(take)
    try:
        scores = module(**given, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0].flatten(0, 1), scores[0, 0]


def _try(module: nn.Module, network: Any, rows: list[list[int]], plain: list[Tensor], form: Layout) -> str:
    """Why the rows cannot be laid so; empty where they can."""
    before = network.config._attn_implementation  # noqa: SLF001 - there is no other way to ask
    if before not in {"sdpa", NAME}:
        return f"its attention is {before}"
    packed = lay(rows, [len(row) - 1 for row in rows] if form.shares else None)
    register()
    network.set_attn_implementation(NAME)
    said = "it answers otherwise in a pack"
    room = ROOM_HALF if network.dtype in {torch.bfloat16, torch.float16} else ROOM
    try:
        found = _answer(module, inputs(rows, packed, form), torch.tensor(packed.begins))
        if plain[0].ndim == 2:
            fits = all(
                _close(found[begin + len(row) - 2 : begin + len(row)], wanted[-2:], room)
                for row, begin, wanted in zip(rows, packed.begins, plain, strict=True)
            )
        else:
            fits = _close(found, torch.stack(plain), room)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError) as error:
        fits, said = False, f"in a pack it raises {type(error).__name__}"
    if fits:
        return ""
    network.set_attn_implementation(before)
    return said


def _answer(module: nn.Module, given: Mapping[str, Tensor], start_B: Tensor | None = None) -> Tensor:
    """Scores of every place, shape (T, V); of a classifier those of its one row, (K,), or of rows by start, (B, K)."""
    device = next(module.parameters()).device
    there = {name: value.to(device) for name, value in given.items()}
    if output_layer(wrapped_base(module)) is not None:
        return module(**there, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
    if start_B is None:
        return module(**there).logits[0].float()  # type: ignore[no-any-return]
    with at_first_tokens(module, start_B.to(device)):
        return module(**there).logits.float()  # type: ignore[no-any-return]


def _finish(module: nn.Module, network: Any, row: list[int]) -> Finish | None:
    """How the network's scores follow from its output layer, where that is a plain one and we can follow."""
    head = output_layer(network)
    if type(head) is not nn.Linear:
        return None
    ids = torch.tensor([row], device=head.weight.device)
    states, wanted = hidden_states(module, {"input_ids": ids})
    raw = F.linear(states[0], head.weight, head.bias)
    text = network.config.get_text_config()
    cap = next((float(value) for name in CAPS if (value := getattr(text, name, None))), None)
    scale = 1.0 if cap is not None else float((raw * wanted).sum() / raw.square().sum().clamp(min=1e-30))
    scale = 1.0 if abs(scale - 1.0) < 1e-4 else float(f"{scale:.6g}")
    finish = Finish(scale, cap)
    return finish if _close(finish(raw.float()), wanted.float()) else None


def _rows(network: Any) -> list[list[int]]:
    """Random rows of ordinary tokens."""
    vocabulary = int(network.get_input_embeddings().weight.shape[0])
    drawn = torch.randint(
        min(10, vocabulary - 1), vocabulary, (sum(TRIED),), generator=torch.Generator().manual_seed(0)
    )
    first, second, third = (part.tolist() for part in drawn.split(TRIED))
    # What follows the common beginning must differ, whatever was drawn.
    second[:17] = first[:17]
    if second[17] == first[17]:
        second[17] = first[17] - 1 if first[17] > 1 else first[17] + 1
    return [first, second, third]


@contextmanager
def _calm(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _close(found: Tensor, wanted: Tensor, share: float = ROOM) -> bool:
    room = share * wanted.abs().max().clamp(min=1e-6)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= room)
