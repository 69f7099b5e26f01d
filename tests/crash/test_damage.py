"""A checkpoint that is not what was written is noticed, named and passed over."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import small
import torch

from metier.core import commits
from metier.recipe import AdamW, Linear
from metier.training import Origin, build_optimizer, build_schedule, checkpoint
from metier.training.checkpoint import Progress

FILES = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE, commits.MANIFEST, "best", "best manifest")
ROUNDS = 9


def flip(path: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def zero(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, other: Path, chance: random.Random) -> None:
    path.unlink()


def append(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 99)))


def swap(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(other.read_bytes())


WAYS = (flip, truncate, zero, delete, append, swap)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", FILES)
def test_the_one_before_is_taken(tmp_path, counts, whole, capsys, name, way):
    for number in range(ROUNDS if whole else 1):
        chance = random.Random(f"{name} {way.__name__} {number}")
        folder = tmp_path / str(number)
        older, newer, places = _two(folder)
        counts["damaged"] += 1
        best = checkpoint.best_folder(folder, 4)
        target = {"best": best / checkpoint.WEIGHTS, "best manifest": best / commits.MANIFEST}.get(name, newer / name)
        other = {"best": places[0] / checkpoint.WEIGHTS, "best manifest": places[0] / commits.MANIFEST}.get(
            name, older / name
        )
        before = target.read_bytes()
        way(target, other, chance)
        assert not target.exists() or target.read_bytes() != before
        capsys.readouterr()
        progress, module, wanted = _restored(folder)
        assert progress.step == 3
        assert small.bits(module) == wanted
        said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        (warning,) = [line["text"] for line in said if line["event"] == "warning"]
        assert newer.name in warning
        assert "passed over" in warning
        shutil.rmtree(folder)
        counts["damaged: held"] += 1


def _two(folder: Path) -> tuple[Path, Path, list[Path]]:
    """Checkpoints of steps 3 and 5, with the best weights of steps 2 and 4."""
    for step, best in ((3, 2), (5, 4)):
        made = _learner(step)
        checkpoint.commit_best(folder, best, checkpoint.take_weights(_learner(best)[0], copied=False))
        progress = Progress(step=step, total=9, best_step=best, best_loss=1.0 / best)
        checkpoint.commit(folder, progress, checkpoint.take(*made, progress, Origin(), copied=False), keep=2)
    return folder / "step-00000003", folder / "step-00000005", [checkpoint.best_folder(folder, 2)]


def _learner(steps: int):
    module = small.fresh()
    optimizer = build_optimizer(AdamW(), module, learning_rate=0.1, adapters=False)
    schedule = build_schedule(Linear(), optimizer, total_steps=9, steps_per_epoch=3)
    torch.manual_seed(1)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    return module, optimizer, schedule


def _restored(folder: Path):
    module, optimizer, schedule = _learner(1)
    progress = checkpoint.load_newest(folder, module, optimizer, schedule, Origin())
    return progress, module, small.bits(_learner(3)[0])
