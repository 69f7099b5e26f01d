"""LoRA layers while they train: one pass over the inputs and outputs where peft makes several.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metier.models.lean import Pointwise, Store, agree, remembered, swapped, working

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    with remembered(module, store) as kept, swapped(module, (LoRALayers(), Pointwise())):
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
        down, up = (layers[self._adapter].weight for layers in (self.lora_A, self.lora_B))
        dtype = working(given)
        answer: Tensor = _LoRA.apply(  # type: ignore[no-untyped-call]
            given.to(dtype), self.base_layer.weight.to(dtype), self.base_layer.bias, down, up, self._scaling
        )
        return answer


class _LoRA(torch.autograd.Function):
    """The gradient of the update alone; the frozen weight has none, and the input only where something below moves."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_TI, dtype = given.reshape(-1, given.shape[-1]), given.dtype
        with torch.autocast(given.device.type, enabled=False):
            a, b = a_RI.to(dtype), b_OR.to(dtype)
            bias = None if bias_O is None else bias_O.to(dtype)
            inner_TR = x_TI @ a.T
            merges = _merges(len(x_TI), weight_OI)
            if merges:
                answer_TO = F.linear(x_TI, torch.addmm(weight_OI, b, a, alpha=scaling), bias)
            else:
                answer_TO = F.linear(x_TI, weight_OI, bias).addmm_(inner_TR, b.T, alpha=scaling)
        ctx.save_for_backward(x_TI, inner_TR, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.shape, ctx.merges = scaling, given.shape, merges
        return answer_TO.view(*given.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, inner_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        slope_TO = slope.reshape(-1, slope.shape[-1])
        a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        # Thin products go through the transposed one that matrix libraries do several times faster.
        through_TR = (slope_TO @ b.T.contiguous().T).mul_(ctx.scaling)
        of_b = (inner_TR.T @ slope_TO).mul_(ctx.scaling).T.to(b_OR.dtype)
        of_a = (through_TR.T @ x_TI).to(a_RI.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            if ctx.merges:
                of_x = slope_TO @ torch.addmm(weight_OI, b, a, alpha=ctx.scaling)
            else:
                of_x = (slope_TO @ weight_OI).addmm_(through_TR, a)
            of_x = of_x.view(ctx.shape)
        return of_x, None, None, of_a, of_b, None


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
        if not hasattr(module, "lora_A") or not _is_plain(module):
            return None
        (name,) = module.lora_A.keys()
        made = LoRALinear(module.base_layer, module.lora_A, module.lora_B, float(module.scaling[name]))
        if self._fits is None:
            self._fits = agree(module, made)
        return made if self._fits else None


def _is_plain(layer: Any) -> bool:
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
