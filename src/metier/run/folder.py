"""The run folder: the only truth about a run, and whom it belongs to while it is written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.core import BusyError, ModelError, RecipeError, StorageError
from metier.core.files import storage_error, write_json, write_text
from metier.recipe import Recipe, dump, load

FREE_TO_CHANGE = (
    ("export", "language"),
    ("export", "license"),
    ("export", "checkpoints"),
    ("export", "checkpoint_minutes"),
    ("compare",),
)
"""What may differ when a run is resumed or its report is made anew: nothing that training or measuring reads."""


FACTS = frozenset({"base", "base_fingerprint", "head", "labels"})
"""What every finished run knows of itself."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names of the files in a run folder."""

    path: Path

    @property
    def given(self) -> Path:
        """The recipe as the user wrote it."""
        return self.path / "job.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with every default written out."""
        return self.path / "job.resolved.yaml"

    @property
    def facts(self) -> Path:
        """What later commands must know: base, head, labels; written once the result is whole."""
        return self.path / "metier.json"

    @property
    def metrics(self) -> Path:
        """The log of steps."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints and best weights; removed when the run is finished."""
        return self.path / "checkpoints"

    @property
    def evidence(self) -> Path:
        """Every measured number."""
        return self.path / "evidence.json"

    @property
    def adapter(self) -> Path:
        """Peft's folder, for LoRA."""
        return self.path / "adapter"

    @property
    def fitted(self) -> Path:
        """Beside an adapter: what was fitted in closed form before tuning, in place of the base's tensors."""
        return self.path / "fitted.safetensors"

    @property
    def lock(self) -> Path:
        """Names the process that writes."""
        return self.path / ".lock"

    def is_finished(self) -> bool:
        """Whether the run ended and was measured."""
        return self.facts.exists() and self.evidence.exists()

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            RecipeError: If this is no run folder, or its recipe was damaged.
        """
        if not self.resolved.is_file():
            raise RecipeError("not a run folder", where=str(self.path), hint="`metier runs` lists the runs there are")
        return load(self.resolved)

    def read_facts(self) -> dict[str, Any]:
        """The facts of a finished run.

        Raises:
            RecipeError: If the run is not finished.
            ModelError: If the file is damaged.
        """
        if not self.facts.exists():
            raise RecipeError(
                "this run has not finished",
                where=str(self.path),
                hint=f"go on with: metier train {self.resolved}",
            )
        try:
            found = json.loads(self.facts.read_text("utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict) or not found.keys() >= FACTS:
            what = "is damaged, so nobody knows what the run ended with"
            raise ModelError(what, where=str(self.facts), hint="copy the run folder again, or train again")
        return found


@contextmanager
def claim(folder: RunFolder) -> Iterator[None]:
    """Hold the folder while writing to it; a lock left by a dead process of this machine is taken over.

    Raises:
        BusyError: If another process holds it.
    """
    if folder.path.exists() and not folder.path.is_dir():
        hint = "choose another export.folder"
        raise RecipeError("is a file, not a folder", where=f"export.folder: {folder.path}", hint=hint)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _take(folder.lock)
    except OSError as error:
        raise storage_error(folder.path, error) from error
    try:
        yield
    finally:
        folder.lock.unlink(missing_ok=True)


def _take(lock: Path) -> None:
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    for _ in range(2):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = _holder(lock)
            pid = holder.get("pid")
            if holder.get("host") == mine["host"] and isinstance(pid, int) and not _is_alive(pid):
                lock.unlink(missing_ok=True)
                continue
            raise BusyError(
                f"process {holder.get('pid', '?')} on {holder.get('host', '?')} writes to this run folder",
                where=str(lock.parent),
                hint="wait for it, choose another export.folder, or delete .lock if that process is gone",
            ) from None
        with os.fdopen(handle, "w") as file:
            json.dump(mine, file)
        return
    raise BusyError("the run folder is fought over", where=str(lock.parent), hint="start one run at a time")


def _holder(lock: Path) -> dict[str, Any]:
    try:
        found = json.loads(lock.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def enter(folder: RunFolder, recipe: Recipe, given: str | None) -> None:
    """Write the recipe into a new folder, or make sure that an old one belongs to the same recipe.

    Raises:
        RecipeError: If the folder holds a run of another recipe; the message shows what differs.
        StorageError: If the folder is in use for something else.
    """
    if folder.resolved.exists():
        changed = differences(folder.recipe(), recipe)
        if changed:
            shown = "; ".join(changed[:6]) + (" ..." if len(changed) > 6 else "")
            raise RecipeError(
                f"the folder holds a run of another recipe: {shown}",
                where=f"export.folder: {folder.path}",
                hint="choose another export.folder, or delete this one",
            )
        return
    strangers = [p.name for p in folder.path.iterdir() if p.name not in {".lock", "README.md"} and p.name[0] != "."]
    if strangers:
        raise StorageError(
            f"the folder is not empty and no run: {', '.join(sorted(strangers)[:5])}",
            where=f"export.folder: {folder.path}",
            hint="choose another export.folder",
        )
    write_text(folder.given, given if given is not None else dump(recipe))
    write_text(folder.resolved, dump(recipe))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys on which two recipes differ, as `key: old -> new`, but for those that change nothing learnt or measured."""
    left, right = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{'.'.join(key)}: {left.get(key)} -> {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if not any(key[: len(free)] == free for free in FREE_TO_CHANGE) and left.get(key) != right.get(key)
    ]


def _flat(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, (*above, str(key)))
        else:
            flat[(*above, str(key))] = value
    return flat


def write_facts(folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Say that the result is whole, and what it is."""
    write_json(folder.facts, dict(facts))


def find_runs(root: Path) -> list[RunFolder]:
    """Run folders at or below `root`, at most three levels deep, newest first."""
    found = [RunFolder(p.parent) for depth in range(4) for p in root.glob("*/" * depth + "job.resolved.yaml")]
    return sorted(found, key=lambda run: run.resolved.stat().st_mtime, reverse=True)
