"""What decides between full tuning and LoRA, on small networks whose shift is known: the rate, and the rank of the shift.

A network is taken for pretrained; the domain is the same network with its weights moved, by matrices of rank 1, or by
ones of the same length whose singular values fall as 1, 1/2, 1/3 ... Figures are the share of the shift that is learnt,
on rows that were not trained on.

Shapes: N rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metier.adapt import adapt
from metier.recipe import FullMethod, LoRAMethod, TrainSection
from metier.tasks.values import Placed, ValueTask
from metier.training import batches, build_optimizer, build_schedule, choose
from metier.training.loop import fit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from metier.recipe import MethodSection

WIDTH, TRAINED, HELD, NOISE = 64, 512, 1024, 0.05
LENGTH = 0.5
"""Of the shift, beside the weights."""
METHODS: Mapping[str, MethodSection] = {"full": FullMethod(), "lora": LoRAMethod(rank=16)}
RATES = {"full": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)}
SAME = 3e-4
SEED = 0
RANKS = (1, WIDTH)
"""Of the shift: low and full."""


class Mapped(ValueTask[int]):
    """Rows of a table."""

    names = tuple(f"y{i}" for i in range(WIDTH))

    def __init__(self, x_N: Tensor, y_N: Tensor) -> None:
        self.x_N, self.y_N = x_N, y_N

    def example(self, row: Mapping[str, object]) -> int:
        return int(str(row["place"]))

    def batch(self, contents: Sequence[int]) -> tuple[Mapping[str, Tensor], Tensor]:
        chosen = torch.tensor(contents)
        return {"input": self.x_N[chosen]}, self.y_N[chosen]


class Residual(nn.Module):
    """Two residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the batch's name
        hidden = input + torch.tanh(self.first(input))
        return hidden + self.second(hidden)


@dataclass(frozen=True)
class Domain:
    """A base, and rows of what it is to become."""

    base: Residual
    train: Mapped
    held: Mapped


@cache
def domain(rank: int) -> Domain:
    torch.manual_seed(SEED)
    base = Residual()
    moved = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (moved.first, moved.second):
            left, _ = torch.linalg.qr(torch.randn(WIDTH, rank))
            right, _ = torch.linalg.qr(torch.randn(WIDTH, rank))
            shift = left / torch.arange(1, rank + 1) @ right.T
            layer.weight += LENGTH * layer.weight.norm() * shift / shift.norm()
        x = torch.randn(TRAINED + HELD, WIDTH)
        y = moved(x)
        y[:TRAINED] += NOISE * torch.randn(TRAINED, WIDTH)
    return Domain(base, Mapped(x[:TRAINED], y[:TRAINED]), Mapped(x[TRAINED:], y[TRAINED:]))


@cache
def learnt(rank: int, method: str, rate: float) -> float:
    """Share of the shift that is learnt: 0 for the base, 1 for the domain itself."""
    found = domain(rank)
    section = TrainSection(epochs=8, batch_size=32, micro_batch_tokens=64, seed=SEED)
    torch.manual_seed(SEED)
    module = adapt(copy.deepcopy(found.base), METHODS[method]).module
    optimizer = build_optimizer(section.optimizer, module, learning_rate=rate, adapters=method == "lora")
    total = section.total_steps(TRAINED)
    schedule = build_schedule(section.schedule, optimizer, total_steps=total, steps_per_epoch=TRAINED // 32)
    examples = [Placed(f"{i}", {}, i) for i in range(TRAINED)]
    steps = batches.steps(TRAINED, section, last=total)
    precision = choose(section, torch.device("cpu"))
    for _ in fit(module, found.train, examples, steps, optimizer, schedule, precision=precision, section=section):
        pass
    with torch.no_grad():
        left = (module(found.held.x_N) - found.held.y_N).square().mean()
        all_of_it = (found.base(found.held.x_N) - found.held.y_N).square().mean()
    return float(1 - left / all_of_it)


def tuned(rank: int, method: str) -> float:
    return max(learnt(rank, method, rate) for rate in RATES[method])


def test_at_the_same_rate_full_tuning_wins_by_far():
    for rank in RANKS:
        assert learnt(rank, "full", SAME) > learnt(rank, "lora", SAME) + 0.15


def test_each_at_its_own_rate_they_are_within_a_few_points():
    for rank in RANKS:
        assert tuned(rank, "full") > 0.93
        assert abs(tuned(rank, "lora") - tuned(rank, "full")) < 0.03


def test_which_is_ahead_follows_the_rank_of_the_shift():
    low, high = RANKS
    assert tuned(low, "lora") > tuned(low, "full") + 0.005
    assert tuned(high, "full") > tuned(high, "lora") + 0.005
