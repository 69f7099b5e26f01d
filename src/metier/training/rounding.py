"""Adam on weights that rest in bf16, where what rounding would lose is kept by chance.

A bf16 number has 8 significant bits: an update of less than 1/512 of a weight is lost entirely when the sum is rounded
to the nearest. Rounded up or down with chances that make the mean exact, small updates move weights as far as they
should.

Source: Gupta et al. 2015, arXiv:1502.02551; for bf16 weights, Zamirai et al. 2020, arXiv:2010.06192.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from metier.core.rng import derive
from metier.models.lean import has_triton

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

DROPPED_BITS = 16
"""Bits of a float32 that bf16 does not have."""
MOST_IN_ONE_PASS = 1 << 31
"""Numbers of a parameter that the GPU's kernel can tell apart."""


class RoundedAdam(Optimizer):
    """Adam with decoupled weight decay: moments and arithmetic in float32, bf16 weights rounded by chance.

    The chances follow from seed, step and place of a parameter, so that nothing of them has to be saved.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; amsgrad: Reddi et al. 2018, arXiv:1904.09237.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        seed: int,
        amsgrad: bool = False,
    ) -> None:
        """Take over what moves; a group may set its own `weight_decay`."""
        super().__init__(
            groups,
            {"lr": learning_rate, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": amsgrad},
        )
        self._seed = seed
        self._places = {parameter: place for place, parameter in enumerate(self._moving())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Raises:
            TypeError: If a closure is given: there is no line search here.
        """
        if closure is not None:
            raise TypeError("a closure is not evaluated")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore, with the moments in float32; torch by itself would cast them to the parameters' format."""
        super().load_state_dict(dict(state_dict))
        for place, parameter in enumerate(self._moving()):
            for name, value in state_dict["state"].get(place, {}).items():
                kept = value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
                self.state[parameter][name] = kept

    def _moving(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
            state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}, step=0)
        state["step"] += 1
        if _in_one_pass(parameter, group):
            _move_in_one_pass(parameter, state, group, derive(self._seed, state["step"], self._places[parameter]))
            return
        weight = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        weight -= _update(parameter.grad, state, group)  # type: ignore[arg-type]
        if parameter.dtype == torch.bfloat16:
            seed = derive(self._seed, state["step"], self._places[parameter])
            weight = rounded(weight, torch.Generator(parameter.device).manual_seed(seed))
        parameter.copy_(weight)


def _in_one_pass(parameter: nn.Parameter, group: Mapping[str, Any]) -> bool:
    """Whether the GPU's kernel can move it."""
    gradient = parameter.grad
    return (
        parameter.device.type == "cuda"
        and parameter.dtype == torch.bfloat16
        and gradient is not None
        and gradient.is_contiguous()
        and parameter.is_contiguous()
        and parameter.numel() < MOST_IN_ONE_PASS
        and not group["amsgrad"]
        and has_triton()
    )


def _move_in_one_pass(parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], seed: int) -> None:
    from metier.training.rounded_kernel import move

    fast, slow = group["betas"]
    move(
        parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"],  # type: ignore[arg-type]
        seed=seed, keep=1 - group["lr"] * group["weight_decay"], fast=1 - fast, slow=1 - slow,
        root=math.sqrt(1 - slow ** state["step"]), eps=group["eps"], rate=group["lr"] / (1 - fast ** state["step"]),
    )  # fmt: skip


def _update(gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """What Adam takes off the weights; the moments move."""
    gradient = gradient.float()
    fast, slow = group["betas"]
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(gradient, 1 - fast)
    second.mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
    if group["amsgrad"]:
        second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
    spread = second.sqrt().div_(math.sqrt(1 - slow ** state["step"])).add_(group["eps"])
    update: Tensor = (first / spread).mul_(group["lr"] / (1 - fast ** state["step"]))
    return update


def rounded(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 numbers as bf16, up or down by chance, so that the mean of many roundings is the number itself.

    Sixteen random bits are added below those that bf16 keeps, and then dropped: the carry rounds up as often as what
    was dropped is large. A sign stands apart from the magnitude, so this holds on both sides of zero.
    """
    bits = exact.contiguous().view(torch.int32)
    chance = torch.randint(1 << DROPPED_BITS, bits.shape, dtype=torch.int32, device=exact.device, generator=generator)
    return chance.add_(bits).bitwise_and_(-1 << DROPPED_BITS).view(torch.float32).bfloat16()
