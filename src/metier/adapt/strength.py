"""How much of what was learnt is used: the weights on the straight line from the base to the tuned network.

A little less of the update often keeps most of what was gained and much more of what the base could do.
Source: Wortsman et al. 2022, arXiv:2109.01903 (weights of base and tuned model interpolated).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from metier.adapt.adapted import moving_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor, nn

    Weights = Callable[[str], Tensor]

_WRAPPED = re.compile(r"^base_model\.model\.|\.modules_to_save\.\w+(?=\.)")
"""What peft puts around the name of a parameter that moves whole."""


@torch.no_grad()
def set_strength(module: nn.Module, share: float, *, start: Weights, end: Weights, new: Collection[str] = ()) -> None:
    """Give everything that moved its value at `share` of the update, in place and one tensor at a time.

    At 1 the weights are those of `end`, at 0 the network answers as it did at the start, both to the last bit. Of a
    LoRA layer A stays and B, which begins at zero, is scaled, so that the update is; what is new has no base to go
    back to and stays as it is tuned. A number that counts, such as the steps of a running mean, stays as well.

    Args:
        module: The network, as it was adapted; for LoRA wrapped by peft, not merged.
        share: Of the update; 0 to 1, and a little more is allowed.
        start: The weights before training by name (see `moving_weights`), such as the `get_tensor` of an open
            safetensors file: no second copy of the network is held.
        end: The tuned ones, likewise.
        new: Names, in the bare network, of parameters that no checkpoint held.
    """
    for name, tensor in moving_weights(module).items():
        tuned = end(name)
        stays = ".lora_A." in name or _WRAPPED.sub("", name) in new or not tensor.is_floating_point()
        tensor.copy_(tuned if stays else _between(start, name, tuned, share))


def _between(start: Weights, name: str, tuned: Tensor, share: float) -> Tensor:
    # W0 + 1 (W - W0) is not W in floating point, so the ends are taken as they are.
    if share == 1:
        return tuned
    first = start(name)
    return first if share == 0 else torch.lerp(first.float(), tuned.float(), share)
