"""A network and a task that no formula knows, for `bench/planner.py`: a perceptron that learns a sum of sines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from metier import ValueTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, INPUTS = 2048, 64


class Perceptron(torch.nn.Sequential):
    """Four hidden layers, 12.7 million numbers."""

    def __init__(self) -> None:
        """Begin from nothing."""
        hidden = [layer for _ in range(3) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]
        super().__init__(torch.nn.Linear(INPUTS, WIDTH), torch.nn.GELU(), *hidden, torch.nn.Linear(WIDTH, 1))


class Sines(ValueTask):
    """From a row with `x`, a list of numbers, and `y` to the network's input and a target."""

    names = ("y",)

    def example(self, row: Mapping[str, Any]) -> Any:
        """The numbers as they are."""
        return torch.tensor(row["x"]), float(row["y"])

    def batch(self, contents: Sequence[Any]) -> tuple[dict[str, Any], Any]:
        """Rows below one another."""
        return {"input": torch.stack([x for x, _ in contents])}, torch.tensor([y for _, y in contents])
