"""Only the last blocks and the head move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metier.adapt.adapted import Adapted, finish
from metier.core import RecipeError
from metier.models.structure import blocks, head_names, is_tied, output_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.recipe import FreezeMethod


def adapt(module: nn.Module, method: FreezeMethod, *, new: Sequence[str] = ()) -> Adapted:
    """Freeze the trunk but its last `method.blocks` blocks.

    A head tied to the input embedding stays: moving it would move the first layer as well.

    Raises:
        RecipeError: If the network has fewer blocks than asked for, or nothing would move.
    """
    for parameter in module.parameters():
        parameter.requires_grad = False
    stack = blocks(module)
    count = len(stack) if stack is not None else 0
    if method.blocks > count:
        raise RecipeError(
            f"the network has {count} blocks, {method.blocks} were asked for",
            where="method.blocks",
            hint=f"choose at most {count}" if count else "set it to 0, or use method=lora or method=full",
        )
    moving = list(stack)[count - method.blocks :] if stack is not None and method.blocks else []
    tied = is_tied(module)
    skip = output_layer(module) if tied else None
    moving += [child for name in head_names(module) if (child := module.get_submodule(name)) is not skip]
    for part in moving:
        part.requires_grad_(requires_grad=True)
    for name in new:
        module.get_parameter(name).requires_grad = True
    if not moving and not new:
        why = "the head is tied to the input embedding" if tied else "the network has no head that could be told"
        raise RecipeError(
            f"nothing would move: {why} and no block was asked for",
            where="method.blocks",
            hint="set method.blocks to 1 or more, or use method=full",
        )
    notes = ("the head stays, because it shares its weight with the input embedding",) if tied else ()
    more = "" if tied else " and the head" if head_names(module) else " and what is new" if new else ""
    return finish(module, f"last {method.blocks} of {count} blocks{more}", notes)
