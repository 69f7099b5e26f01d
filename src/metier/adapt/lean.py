"""LoRA layers while they train: one pass over the inputs and outputs where peft makes several.

Shapes: T tokens, t tokens of one update, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.models.lean import Pointwise, Store, agree, remembered, rotary, swapped, working

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MERGE_FROM = 0.5
"""Tokens beside inputs x outputs / (inputs + outputs) from which adding the update to the weight costs less than adding
it to inputs and outputs: both are passes over memory, of that many numbers each."""


@contextmanager
def lean(module: nn.Module, store: Store | None = None) -> Iterator[Store | None]:
    """Let our modules stand for the network's while the block runs: the same answers, gradients and names.

    Args:
        module: What trains.
        store: Where states below everything that moves are kept, for several runs on one base; None keeps them for
            this block alone.

    Yields:
        The store, or None where something moves in every block.
    """
    with remembered(module, store) as kept, swapped(module, (LoRALayers(), Pointwise(), rotary)):
        yield kept


class LoRALinear(nn.Module):
    """base(x) + scaling * B(A(x)) for a frozen linear layer, around the layers that peft made.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, base: nn.Linear, lora_A: nn.ModuleDict, lora_B: nn.ModuleDict, scaling: float) -> None:
        """Take over the layers under their names."""
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, lora_A, lora_B
        self._scaling = scaling
        (self._adapter,) = lora_A.keys()

    @property
    def weight(self) -> Tensor:
        """The frozen weight: T5's feed-forward part asks its layer for its number format."""
        return self.base_layer.weight

    def forward(self, given: Tensor) -> Tensor:
        """The layer's answer."""
        down, up = (layers[self._adapter].get_parameter("weight") for layers in (self.lora_A, self.lora_B))
        whole = Update(0, given.shape[:-1].numel(), self._scaling, down, up)
        return updated(self.base_layer, given, (whole,))


class Update(NamedTuple):
    """A low-rank update of a layer, and the tokens that meet it.

    Attributes:
        start: First token.
        end: One past the last token.
        scaling: Factor of the update.
        a_RI: What makes an input small.
        b_OR: What makes it an output again.
    """

    start: int
    end: int
    scaling: float
    a_RI: Tensor
    b_OR: Tensor


def updated(layer: nn.Linear, given: Tensor, updates: Sequence[Update]) -> Tensor:
    """What a frozen linear layer answers, shape (..., O), where each update is added for its own tokens."""
    dtype = working(given)
    parts = tuple(update[:3] for update in updates)
    factors = (factor for update in updates for factor in update[3:])
    answer: Tensor = _LoRA.apply(  # type: ignore[no-untyped-call]
        given.to(dtype), layer.weight.to(dtype), layer.bias, parts, *factors
    )
    return answer


class _LoRA(torch.autograd.Function):
    """The gradient of the updates alone; the frozen weight has none, and the input only where something below moves."""

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        parts: Sequence[tuple[int, int, float]],
        *factors: Tensor,
    ) -> Tensor:
        x_TI, dtype = given.reshape(-1, given.shape[-1]), given.dtype
        # With one update for all, adding it to the weight may cost less.
        merges = len(parts) == 1 and parts[0][:2] == (0, len(x_TI)) and _merges(len(x_TI), weight_OI)
        inners, cast = [], [factor.to(dtype) for factor in factors]
        with torch.autocast(given.device.type, enabled=False):
            bias = None if bias_O is None else bias_O.to(dtype)
            answer_TO = None if merges else F.linear(x_TI, weight_OI, bias)
            for (start, end, scaling), a, b in zip(parts, cast[::2], cast[1::2], strict=True):
                inners.append(x_TI[start:end] @ a.T)
                if answer_TO is None:
                    answer_TO = F.linear(x_TI, torch.addmm(weight_OI, b, a, alpha=scaling), bias)
                else:
                    answer_TO[start:end].addmm_(inners[-1], b.T, alpha=scaling)
        ctx.save_for_backward(x_TI, weight_OI, *inners, *cast)
        ctx.parts, ctx.shape, ctx.merges = parts, given.shape, merges
        return answer_TO.view(*given.shape[:-1], -1)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, weight_OI, *kept = ctx.saved_tensors
        inners, factors = kept[: len(ctx.parts)], kept[len(ctx.parts) :]
        slope_TO = slope.reshape(-1, slope.shape[-1])
        of_x = slope_TO @ weight_OI if ctx.needs_input_grad[0] and not ctx.merges else None
        of_factors = []
        for (start, end, scaling), inner_tR, a, b in zip(ctx.parts, inners, factors[::2], factors[1::2], strict=True):
            x_tI, slope_tO = x_TI[start:end], slope_TO[start:end]
            # Thin products go through the transposed one that matrix libraries do several times faster.
            through_tR = (slope_tO @ b.T.contiguous().T).mul_(scaling)
            # Autograd gives them the factors' own format.
            of_factors += [through_tR.T @ x_tI, (inner_tR.T @ slope_tO).mul_(scaling).T]
            if of_x is not None:
                of_x[start:end].addmm_(through_tR, a)
            elif ctx.needs_input_grad[0]:
                of_x = slope_TO @ torch.addmm(weight_OI, b, a, alpha=scaling)
        return None if of_x is None else of_x.view(ctx.shape), None, None, None, *of_factors


def _merges(tokens: int, weight_OI: Tensor) -> bool:
    outputs, inputs = weight_OI.shape
    return weight_OI.dtype == torch.float32 and tokens * (inputs + outputs) > MERGE_FROM * 2 * inputs * outputs


class LoRALayers:
    """Makes what stands for peft's plain LoRA layers on frozen linear ones; every other kind goes peft's own way."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._fits: bool | None = None

    def __call__(self, module: Any) -> nn.Module | None:
        """What stands for a module, or None."""
        if not hasattr(module, "lora_A") or not is_plain(module):
            return None
        (name,) = module.lora_A.keys()
        made = LoRALinear(module.base_layer, module.lora_A, module.lora_B, float(module.scaling[name]))
        if self._fits is None:
            self._fits = agree(module, made)
        return made if self._fits else None


def is_plain(layer: Any) -> bool:
    """Whether a peft layer is one undropped adapter on a frozen linear layer."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.merged or layer.disable_adapters:
        return False
    names = list(layer.lora_A.keys())
    return (
        len(names) == 1
        and list(layer.active_adapters) == names
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and all(layers[names[0]].bias is None for layers in (layer.lora_A, layer.lora_B))
    )
