"""A training of a second, without the story around it: for faults that are tried by the hundred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metier.core import Loss, files
from metier.recipe import TrainSection
from metier.tasks import Shown
from metier.training import Origin, Outcome, Places, checkpoint, run
from metier.training.precision import Precision

SECTION = TrainSection(epochs=2, batch_size=3, evaluations=3, learning_rate=0.1, seed=3)
"""Six steps over nine rows, three evaluations."""
STEPS = 6


class Net(nn.Module):
    """Dropout, a norm with running statistics, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.dropout, self.outer = nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        return self.outer(self.dropout(torch.relu(self.norm(self.inner(x_BF)))))


class Fit:
    """Learns two numbers from four."""

    unit = "value"

    def size(self, row: int) -> int:
        return 1

    def show(self, row: int) -> Shown:
        return Shown(f"row {row}", ((str(row), True),))

    def read(self, rows: Any) -> int:
        return len(rows)

    def cut(self, rows: Any, most: int) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(len(rows))),)

    def collate(self, rows: Any) -> dict[str, torch.Tensor]:
        x_BF = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(row)) for row in rows])
        return {"x": x_BF, "y": x_BF[:, :2] * 2}

    def loss(self, module: nn.Module, batch: Any) -> Loss:
        total_B = (module(batch["x"]) - batch["y"]).square().sum(dim=1)
        return Loss(total_B, torch.full_like(total_B, 2.0))


def fresh() -> Net:
    """The network as every run begins with it."""
    torch.manual_seed(0)
    return Net()


def train(folder: Path, *, keep: int = 2, minutes: float = 1e-9, module: Net | None = None) -> tuple[Net, Outcome]:
    """Train in a folder, with a checkpoint after every step; goes on where it was left."""
    files.clean(folder)  # as the story does, under its lock
    module = module or fresh()

    def validate() -> float:
        module.eval()
        with torch.no_grad():
            loss = Fit().loss(module, Fit().collate(range(100, 108)))
        return float(loss.total_B.sum() / loss.weight_B.sum())

    outcome = run(
        module,
        Fit(),  # type: ignore[arg-type]
        range(9),
        SECTION,
        learning_rate=0.1,
        adapters=False,
        precision=Precision("fp32", torch.device("cpu")),
        validate=validate,
        places=Places(folder / "metrics.jsonl", folder / "checkpoints", keep=keep, minutes=minutes),
        origin=Origin({"the rows": "nine"}),
    )
    return module, outcome


def bits(module: nn.Module) -> dict[str, bytes]:
    """Every number of the network."""
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def log(folder: Path) -> list[tuple[Any, ...]]:
    """The steps and validations, without clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def debris(folder: Path) -> list[str]:
    """What a save that failed left over."""
    return sorted(path.name for path in folder.rglob(".*"))


def newest(folder: Path) -> int:
    """The newest step that can be gone on from."""
    points = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    whole = next((path for path in points if checkpoint.find_damage(path) is None), None)
    return int(whole.name[5:13]) if whole else 0


__all__ = ["STEPS", "Net", "bits", "debris", "fresh", "log", "newest", "train"]
