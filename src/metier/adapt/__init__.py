"""Which parameters move. One file per method; this door is the only place that names them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from metier.adapt import freeze, full, lora
from metier.adapt.abreast import Lanes, in_one_pass, own_what_moves, twin, why_apart
from metier.adapt.adapted import Adapted, moving_weights
from metier.adapt.lean import lean
from metier.adapt.lora import load_adapter, merged, save_adapter, shape_of_linears, switched_off
from metier.adapt.several import Blend, blend, load_adapters, switch
from metier.adapt.strength import set_strength
from metier.models.structure import output_layer, wrapped_base
from metier.recipe import FreezeMethod, FullMethod, LoRAMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.recipe import MethodSection

__all__ = [
    "Adapted",
    "Blend",
    "Lanes",
    "adapt",
    "beside",
    "blend",
    "check",
    "in_one_pass",
    "lean",
    "load_adapter",
    "load_adapters",
    "merged",
    "moving_weights",
    "output_layer",
    "save_adapter",
    "set_strength",
    "shape_of_linears",
    "switch",
    "switched_off",
    "why_apart",
    "wrapped_base",
]


def adapt(
    module: nn.Module,
    method: MethodSection,
    *,
    head: str | None = None,
    base_name: str = "",
    new: Sequence[str] = (),
) -> Adapted:
    """Prepare `module` for `method`, in place.

    Args:
        module: Any network, float32.
        method: Which parameters move.
        head: Kind of head ("causal", "seq2seq", "classifier"); None for a plain module.
        base_name: What an adapter's file names as its base.
        new: Parameters that no checkpoint held; they move with every method.

    Raises:
        RecipeError: If the method does not fit the network.
    """
    match method:
        case FullMethod():
            return full.adapt(module)
        case FreezeMethod():
            return freeze.adapt(module, method, new=new)
        case LoRAMethod():
            return lora.adapt(module, method, head=head, base_name=base_name, new=new)
        case _:
            assert_never(method)


def beside(
    module: nn.Module,
    method: MethodSection,
    *,
    head: str | None = None,
    base_name: str = "",
    new: Sequence[str] = (),
) -> Adapted:
    """Prepare a network of its own for `method`, beside `module`, which keeps every bit and may serve others.

    What stays is shared with `module` and costs no memory; what moves is a copy.

    Args:
        module: Any network, where it will train and in the format in which its weights rest.
        method: Which parameters move.
        head: As for `adapt`.
        base_name: As for `adapt`.
        new: As for `adapt`.

    Raises:
        RecipeError: If the method does not fit the network.
    """
    adapted = adapt(twin(module), method, head=head, base_name=base_name, new=new)
    own_what_moves(adapted.module, module)
    return adapted


def check(module: nn.Module, method: MethodSection) -> None:
    """Refuse a method that does not fit a network, before there are weights; the network is of no further use.

    Args:
        module: The network, which needs no storage.
        method: Which parameters would move.

    Raises:
        RecipeError: If a layer is not there, a rank is too large, or there are too few blocks.
    """
    match method:
        case FullMethod():
            pass
        case FreezeMethod():
            freeze.adapt(module, method)
        case LoRAMethod():
            lora.check(module, method)
        case _:
            assert_never(method)
