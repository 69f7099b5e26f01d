"""Saving a run in the middle, so that the same command goes on with the same bits.

A checkpoint is a folder that is written beside its place, verified by a manifest of sizes and hashes, and renamed:
it is there whole or not at all. Loading takes the newest one whose manifest verifies.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metier.adapt import moving_weights
from metier.core import StorageError
from metier.core.files import sha256, storage_error, sync_folder, write_json
from metier.core.log import warn

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.pt", "state.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the run stands, beyond weights and optimizer.

    Attributes:
        step: Steps taken.
        best_step: Step with the lowest validation loss so far; 0 for none.
        best_loss: That loss; infinity for none.
        stale: Evaluations since then.
        seconds: Wall time of the training steps so far.
        tokens: Tokens trained on so far.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0


def save_weights(module: nn.Module, path: Path) -> None:
    """Write what moves to `path`, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staged = path.with_name(f".{path.name}.staged")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous().cpu() for name, t in moving_weights(module).items()}, staged)
        staged.replace(path)
    except (OSError, SafetensorError) as error:
        staged.unlink(missing_ok=True)
        raise storage_error(path, error if isinstance(error, OSError) else OSError(str(error))) from error


@torch.no_grad()
def load_weights(module: nn.Module, path: Path) -> None:
    """Put the weights of `path` back, in place."""
    from safetensors.torch import load_file

    saved = load_file(path)
    for name, tensor in moving_weights(module).items():
        tensor.copy_(saved[name])


def save(
    folder: Path, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, *, keep: int
) -> None:
    """Commit a checkpoint and drop all but the newest `keep`.

    Raises:
        StorageError: If the disk is full; older checkpoints are intact.
    """
    final = folder / f"step-{progress.step:08d}"
    staged = folder / f".staged-{final.name}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_weights(module, staged / WEIGHTS)
        _save_optimizer(optimizer, staged / OPTIMIZER)
        write_json(staged / STATE, _state(schedule, progress))
        names = (WEIGHTS, OPTIMIZER, STATE)
        files = {name: {"bytes": (staged / name).stat().st_size, "sha256": sha256(staged / name)} for name in names}
        write_json(staged / MANIFEST, {"files": files})
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise storage_error(final, error) from error
    except StorageError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _save_optimizer(optimizer: Optimizer, path: Path) -> None:
    try:
        dice = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        torch.save({"optimizer": optimizer.state_dict(), **dice}, path)
    except RuntimeError as error:  # torch's writer does not say otherwise that the disk is full
        raise OSError(str(error).splitlines()[0]) from error


def load_newest(folder: Path, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress | None:
    """Restore the newest checkpoint that verifies; damaged ones are named and passed over; None where there is none."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        damage = find_damage(candidate)
        if damage:
            warn(f"checkpoint {candidate} is passed over: {damage}")
            continue
        load_weights(module, candidate / WEIGHTS)
        # Tensors and plain containers only: weights_only reads nothing that could run.
        blob = torch.load(candidate / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(blob["optimizer"])
        torch.set_rng_state(blob["torch"])
        torch.cuda.set_rng_state_all(blob["cuda"])
        state = json.loads((candidate / STATE).read_text("utf-8"))
        schedule.load_state_dict(state["schedule"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        progress = state["progress"]
        return Progress(**{**progress, "best_loss": float(progress["best_loss"])})
    return None


def find_damage(candidate: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files: dict[str, Any] = json.loads((candidate / MANIFEST).read_text("utf-8"))["files"]
        if set(files) != {WEIGHTS, OPTIMIZER, STATE}:
            return f"{MANIFEST} does not name its files"
        for name, facts in files.items():
            path = candidate / name
            if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"
    return None


def _state(schedule: LRScheduler, progress: Progress) -> dict[str, Any]:
    schedule_state = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    fields = {name: getattr(progress, name) for name in Progress.__slots__}
    return {
        "schedule": {**schedule_state, "lr_lambdas": [None]},
        "python": random.getstate(),
        # JSON has no infinity; text keeps it exactly.
        "progress": {**fields, "best_loss": repr(progress.best_loss)},
    }


def spare_bytes(folder: Path, needed: int) -> int:
    """Free bytes beyond `needed` on the disk of `folder`; negative when it is too small."""
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free - needed


def estimated_bytes(module: nn.Module) -> int:
    """Size of one checkpoint: what moves, and two moments of it, which rest in fp32 at least."""
    sizes = ((t.numel(), t.element_size()) for t in moving_weights(module).values())
    return sum(count * (size + 2 * max(4, size)) for count, size in sizes) + np.dtype(np.int64).itemsize
