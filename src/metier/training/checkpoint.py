"""Saving a run in the middle, so that the same command goes on with the same bits.

A checkpoint is a committed folder (`metier.core.commits`): weights that move, optimizer, and a state that tells the
rest. The best weights stand in a folder of their own, to which checkpoints refer. Loading takes the newest checkpoint
that verifies together with the best weights that it refers to. No file of it is a pickle.

Taking a checkpoint and writing it are two functions: the first one runs between two steps, the second one anywhere.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.adapt import moving_weights
from metier.core import RecipeError, StorageError, commits, files, rng
from metier.core.log import warn
from metier.models import blocks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
WHOLE, FINISHED = frozenset({WEIGHTS, OPTIMIZER, STATE}), frozenset({STATE})
"""Files of a checkpoint to go on from, and of the last one, which needs but the best weights."""
Contents = Mapping[str, Iterable[files.Block]]
"""What the files of a folder will hold."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the run stands, beyond weights and optimizer.

    Attributes:
        step: Steps taken.
        total: Steps planned.
        evaluated: The last step after which the validation loss was taken; -1 for none.
        best_step: Step with the lowest validation loss so far; 0 for none.
        best_loss: That loss; infinity for none.
        first_loss: Validation loss before the first step.
        stale: Evaluations since the best one.
        seconds: Wall time of the training steps so far.
        tokens: Tokens trained on so far.
        most_tokens: Most tokens in one forward pass, lowered where memory ran out; 0 for what the recipe says.
        finished: Whether no step is left to take.
    """

    step: int = 0
    total: int = 0
    evaluated: int = -1
    best_step: int = 0
    best_loss: float = math.inf
    first_loss: float = math.nan
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0
    most_tokens: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run is made of; each checkpoint keeps it.

    Attributes:
        bound: What must be the same when the run goes on, such as base and rows, by name.
        noted: What may differ but could change bits, such as versions and threads, by name.
    """

    bound: Mapping[str, str] = field(default_factory=dict)
    noted: Mapping[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ taking


def take(
    module: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    progress: Progress,
    origin: Origin,
    *,
    copied: bool,
) -> Contents:
    """The contents of a checkpoint.

    Args:
        module: What moves in it is kept.
        optimizer: With its moments.
        schedule: Of the rate.
        progress: Where the run stands.
        origin: What it is made of.
        copied: Whether training may go on while the contents are written.
    """
    tensors, numbers = _taken_apart(optimizer)
    state = {"optimizer": numbers, **_state(schedule, progress, origin)}
    return {
        **take_weights(module, copied=copied),
        OPTIMIZER: blocks(_copies(tensors) if copied else tensors),
        STATE: [files.as_json(state).encode()],
    }


def take_weights(module: nn.Module, *, copied: bool) -> Contents:
    """What moves, for a folder of weights alone."""
    weights = moving_weights(module)
    return {WEIGHTS: blocks(_copies(weights) if copied else weights)}


def take_end(schedule: LRScheduler, progress: Progress, origin: Origin) -> Contents:
    """The contents of the last checkpoint of a run, which needs but the best weights."""
    return {STATE: [files.as_json(_state(schedule, progress, origin)).encode()]}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def unsound(module: nn.Module, optimizer: Optimizer) -> str | None:
    """Name of a moving weight, or of a moment of the optimizer, that is not finite; None where all are."""
    for name, tensor in moving_weights(module).items():
        if not _finite(tensor):
            return name
    for state in optimizer.state.values():
        for name, value in state.items():
            if hasattr(value, "isfinite") and not _finite(value):
                return f"the optimizer's {name}"
    return None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _taken_apart(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors by `place.name`, and what JSON keeps."""
    state = optimizer.state_dict()
    entries = [(f"{place}.{name}", value) for place, entry in state["state"].items() for name, value in entry.items()]
    return (
        {name: value for name, value in entries if isinstance(value, torch.Tensor)},
        {
            "groups": state["param_groups"],
            "numbers": {name: value for name, value in entries if not isinstance(value, torch.Tensor)},
        },
    )


def _put_together(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What `_taken_apart` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers["numbers"].items()]:
        place, name = key.split(".", 1)
        state.setdefault(int(place), {})[name] = value
    return {"state": state, "param_groups": numbers["groups"]}


def _state(schedule: LRScheduler, progress: Progress, origin: Origin) -> dict[str, Any]:
    schedule_state = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    # JSON has no infinity; text keeps every float exactly.
    said = {name: repr(float(value)) if isinstance(value, float) else value for name, value in asdict(progress).items()}
    return {
        "progress": said,
        "schedule": {**schedule_state, "lr_lambdas": [None]},
        "chance": rng.state(),
        "origin": {"bound": dict(origin.bound), "noted": dict(origin.noted)},
    }


# ------------------------------------------------------------------------------------------------ writing


def commit(folder: Path, progress: Progress, contents: Contents, *, keep: int) -> None:
    """Commit a checkpoint, and drop all but the newest `keep` and the best weights that they refer to.

    Raises:
        StorageError: If the disk is full; older checkpoints are intact.
    """
    final = folder / f"step-{progress.step:08d}{'-end' if progress.finished else ''}"
    commits.commit(final, contents)
    upto = [point for point in _points(folder) if point.name <= final.name]
    # What is newer was found to be damaged, or this run would stand behind it.
    _drop_all_but(folder, upto[-keep:], progress.best_step)


def commit_best(folder: Path, step: int, contents: Contents) -> None:
    """Commit the best weights so far, and drop those to which no checkpoint refers.

    Raises:
        StorageError: If the disk is full; what was there is intact.
    """
    commits.commit(best_folder(folder, step), contents)
    _drop_all_but(folder, _points(folder), step)


def best_folder(folder: Path, step: int) -> Path:
    """Where the best weights stand that were found after a step."""
    return folder / f"best-{step:08d}"


def _drop_all_but(folder: Path, points: list[Path], best_step: int) -> None:
    bests = {best_folder(folder, step).name for step in (best_step, *map(_best_step, points))}
    kept = {point.name for point in points} | bests
    for old in [*_points(folder), *sorted(folder.glob("best-*"))]:
        if old.name not in kept:
            commits.drop(old)


def _points(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}(-end)?", path.name))


def _best_step(point: Path) -> int:
    try:
        return int(json.loads((point / STATE).read_text("utf-8"))["progress"]["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1  # a damaged one refers to nothing


# ------------------------------------------------------------------------------------------------ reading


def load_newest(
    folder: Path, module: nn.Module, optimizer: Optimizer, schedule: LRScheduler, origin: Origin
) -> Progress | None:
    """Restore the newest checkpoint that verifies; damaged ones are named and passed over; None where there is none.

    Raises:
        RecipeError: If it was made from another base or other rows.
    """
    for candidate in reversed(_points(folder)):
        damage = find_damage(candidate)
        if damage:
            warn(f"checkpoint {candidate} is passed over: {damage}")
            continue
        state = _read_state(candidate)
        _check_origin(candidate, state, origin)
        progress = _progress(state)
        _restore(candidate, state, progress, module, optimizer, schedule)
        return progress
    return None


def load_best(folder: Path, step: int, module: nn.Module) -> None:
    """Put the best weights back, in place.

    Raises:
        StorageError: If they are not what was written.
    """
    place = best_folder(folder, step)
    damage = commits.find_damage(place)
    if damage:
        raise StorageError(
            f"the best weights cannot be read back: {damage}",
            where=str(place),
            hint="the same command trains again from the checkpoint before them",
        )
    load_weights(module, place / WEIGHTS)


def check_origin(folder: Path, origin: Origin) -> None:
    """Refuse what `load_newest` would refuse, without reading a weight.

    Raises:
        RecipeError: If the newest checkpoint was made from another base or other rows.
    """
    for candidate in reversed(_points(folder)):
        # What is damaged is named by `load_newest`.
        if commits.find_damage(candidate, only=STATE) is None:
            _check_bound(candidate, _read_state(candidate)["origin"]["bound"], origin)
            return


def find_damage(candidate: Path) -> str | None:
    """What is wrong with a checkpoint, or None; the best weights that it refers to are a part of it."""
    damage = commits.find_damage(candidate)
    if damage:
        return damage
    try:
        progress = _progress(_read_state(candidate))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"another version of metier wrote it ({error})"
    if commits.names(candidate) != (FINISHED if progress.finished else WHOLE):
        return f"{commits.MANIFEST} does not name its files"
    if math.isfinite(progress.best_loss):
        best = best_folder(candidate.parent, progress.best_step)
        damage = commits.find_damage(best)
        if damage:
            return f"the best weights so far, {best.name}, are damaged: {damage}"
    return None


def _read_state(candidate: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((candidate / STATE).read_text("utf-8"))
    return found


def _progress(state: Mapping[str, Any]) -> Progress:
    said: dict[str, Any] = dict(state["progress"])
    floats = {one.name: float(said[one.name]) for one in fields(Progress) if one.type == "float"}
    return Progress(**(said | floats))


def _check_origin(candidate: Path, state: Mapping[str, Any], origin: Origin) -> None:
    before = state["origin"]
    _check_bound(candidate, before["bound"], origin)
    for text in _differences(before["noted"], origin.noted):
        warn(f"resumed under other conditions, which may change the last bits: {text}")


def _check_bound(candidate: Path, before: Mapping[str, Any], origin: Origin) -> None:
    changed = _differences(before, origin.bound)
    if changed:
        raise RecipeError(
            f"the run was begun with something else: {'; '.join(changed)}",
            where=str(candidate.parent.parent),
            hint="put it back as it was, or choose another export.folder",
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _restore(
    candidate: Path,
    state: Mapping[str, Any],
    progress: Progress,
    module: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
) -> None:
    from safetensors.torch import load_file

    if not progress.finished:
        load_weights(module, candidate / WEIGHTS)
        optimizer.load_state_dict(_put_together(load_file(candidate / OPTIMIZER), state["optimizer"]))
    schedule.load_state_dict(dict(state["schedule"]))
    rng.restore(state["chance"])


@torch.no_grad()
def load_weights(module: nn.Module, path: Path) -> None:
    """Put the weights of a file back, in place."""
    from safetensors.torch import load_file

    saved = load_file(path)
    for name, tensor in moving_weights(module).items():
        tensor.copy_(saved[name])


# ------------------------------------------------------------------------------------------------ space


def spare_bytes(folder: Path, needed: int) -> int:
    """Free bytes beyond `needed` on the disk of `folder`; negative when it is too small."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free - needed


def weights_bytes(module: nn.Module) -> int:
    """Size of what moves."""
    return sum(tensor.numel() * tensor.element_size() for tensor in moving_weights(module).values())


def estimated_bytes(module: nn.Module) -> int:
    """Size of one checkpoint: what moves, and two moments of it, which rest in fp32 at least."""
    sizes = ((t.numel(), t.element_size()) for t in moving_weights(module).values())
    return sum(count * (size + 2 * max(4, size)) for count, size in sizes)
