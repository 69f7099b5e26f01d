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
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

DROPPED_BITS = 16
"""Bits of a float32 that bf16 does not have."""
MOST_IN_ONE_PASS = 1 << 31
"""Numbers of a parameter that the GPU's kernel can tell apart."""
ALIGNED = 16
"""Bytes at whose multiples the kernel's tensors begin."""


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
            together: dict[tuple[torch.device, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._begun(parameter, group)
                if _by_kernel(parameter, group):
                    together.setdefault((parameter.device, state["step"]), []).append(parameter)
                else:
                    self._move(parameter, group)
            for parameters in together.values():
                self._move_together(parameters, group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore, with the moments in float32; torch by itself would cast them to the parameters' format."""
        super().load_state_dict(dict(state_dict))
        for place, parameter in enumerate(self._moving()):
            for name, value in state_dict["state"].get(place, {}).items():
                kept = value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
                self.state[parameter][name] = kept

    def _moving(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _begun(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's moments, with this step counted."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
            state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}, step=0)
        state["step"] += 1
        return state

    def _move(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        weight = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        weight -= _update(parameter.grad, self.state[parameter], group)  # type: ignore[arg-type]
        if parameter.dtype == torch.bfloat16:
            weight = rounded(weight, torch.Generator(parameter.device).manual_seed(self._chance(parameter)))
        parameter.copy_(weight)

    def _move_together(self, parameters: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """One call for all that have taken as many steps: a call takes the processor longer than the GPU needs."""
        from metier.training.rounded_kernel import move

        states = [self.state[parameter] for parameter in parameters]
        (fast, slow), step = group["betas"], states[0]["step"]
        move(
            parameters, [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
            [self._chance(parameter) for parameter in parameters],
            keep=1 - group["lr"] * group["weight_decay"], fast=1 - fast, slow=1 - slow,
            root=math.sqrt(1 - slow**step), eps=group["eps"], rate=group["lr"] / (1 - fast**step),
        )  # fmt: skip

    def _chance(self, parameter: nn.Parameter) -> int:
        return derive(self._seed, self.state[parameter]["step"], self._places[parameter])


def _by_kernel(parameter: nn.Parameter, group: Mapping[str, Any]) -> bool:
    """Whether the GPU's kernel can move it."""
    gradient = parameter.grad
    return (
        parameter.device.type == "cuda"
        and parameter.dtype == torch.bfloat16
        and gradient is not None
        and all(x.is_contiguous() and x.data_ptr() % ALIGNED == 0 for x in (parameter, gradient))
        and parameter.numel() < MOST_IN_ONE_PASS
        and not group["amsgrad"]
        and has_triton()
    )


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
