"""L2-SP: weights are pulled to where they began, not to zero.

Source: Li, Grandvalet and Davoine 2018, arXiv:1802.01483.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor, nn
    from torch.optim import Optimizer


class Pull:
    """Where weights began, and how strongly they are drawn back.

    The penalty is strength / 2 times the squared distance. Its gradient, strength times the distance, is added to that
    of the mean loss right before each step, after clipping: there is no second graph, and a weight that rests in bf16
    is rounded once.
    """

    def __init__(self, module: nn.Module, strength: float, *, new: Collection[str] = ()) -> None:
        """Keep a copy of everything that moves as it is now.

        Args:
            module: The network before its first step.
            strength: Of the pull.
            new: Names of parameters that no checkpoint held: their beginning was drawn by chance and pulls nobody.
        """
        self._strength = strength
        self._began: dict[Tensor, Tensor] = {
            parameter: parameter.detach().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and name not in new
        }

    def on(self, optimizer: Optimizer) -> None:
        """Pull before each step of this optimizer."""
        optimizer.register_step_pre_hook(self._add)

    @torch.no_grad()
    def _add(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                began = self._began.get(parameter)
                if parameter.grad is not None and began is not None:
                    parameter.grad.add_(parameter - began, alpha=self._strength)
