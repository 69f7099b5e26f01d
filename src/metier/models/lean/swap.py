"""Our own modules in the place of a network's, for as long as it trains."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metier.models.lean.pointwise import Dropout, GatedMLP, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Maker = Callable[[nn.Module], nn.Module | None]

TOLERANCE = 1e-5
"""Largest difference, beside the largest value, between a module and what stands for it, both in float32."""


@contextmanager
def swapped(network: nn.Module, makers: Sequence[Maker]) -> Iterator[None]:
    """Put our modules in while the block runs; parameters and their names stay as they are.

    Args:
        network: What trains.
        makers: Each makes what stands for a module, around the same parameters, or None where it knows no such module.
    """
    places = [(network.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], child)
              for path, child in network.named_modules() if path]  # fmt: skip
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        # Innermost first, so that what stands for an outer module takes over what stands in it by then.
        for holder, name, child in reversed(places):
            for maker in makers:
                made = maker(child)
                if made is not None:
                    undo.append((holder, name, child))
                    setattr(holder, name, made.train(child.training))
                    break
        yield
    finally:
        for holder, name, child in reversed(undo):
            child.train(holder.training)
            setattr(holder, name, child)


class Pointwise:
    """Makes RMSNorm and gated feed-forward parts, whatever a family calls them, where ours answers the same.

    Whether it does is tried once for each class of a network, on random input.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._fits: dict[tuple[type[nn.Module], float], bool] = {}

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """What stands for a module, or None."""
        if type(module) is nn.Dropout and 0.0 < module.p < 1.0:
            return Dropout(module.p)
        for offset in (0.0, 1.0):
            made = _norm(module, offset) or (_gated(module) if not offset else None)
            kind = (type(module), offset)
            if made is not None and kind not in self._fits:
                self._fits[kind] = agree(module, made)
            if made is not None and self._fits[kind]:
                return made
        return None


def _norm(module: Any, offset: float) -> RMSNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, nn.Parameter) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    return RMSNorm(weight, eps, offset)


def _gated(module: Any) -> GatedMLP | None:
    names = {name for name, _ in module.named_children()}
    wanted = {"gate_proj", "up_proj", "down_proj"}
    if (
        not wanted <= names
        or len(names - wanted) > 1
        or "silu" not in type(getattr(module, "act_fn", None)).__name__.lower()
    ):
        return None
    return GatedMLP(module.gate_proj, module.up_proj, module.down_proj)


@torch.no_grad()
def agree(module: nn.Module, other: nn.Module, *, size: float = 1.0, **more: Any) -> bool:
    """Whether two modules answer alike on random states, first of all; what raises does not agree.

    Args:
        module: What is there.
        other: What is to stand for it.
        size: Standard deviation of the states.
        more: What both are given beside the states.
    """
    first = next(module.parameters())
    width = first.shape[-1]
    drawn = size * torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    states = drawn.to(first.device, first.dtype)
    modes = module.training, other.training
    try:
        wanted, found = (
            answer[0] if isinstance(answer, tuple) else answer
            for answer in (module.eval()(states, **more), other.eval()(states, **more))
        )
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        module.train(modes[0])
        other.train(modes[1])
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor) or wanted.shape != found.shape:
        return False
    room = TOLERANCE if first.dtype == torch.float32 else 0.02
    return bool((wanted - found).abs().max() <= room * wanted.abs().max().clamp(min=1e-6))
