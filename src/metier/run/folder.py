"""The run folder: the only truth about a run, and whom it belongs to while it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.core import ModelError, RecipeError, StorageError, commits
from metier.core.files import write_json, write_text
from metier.recipe import Recipe, dump, load

FREE_TO_CHANGE = (
    ("export", "folder"),
    ("export", "language"),
    ("export", "license"),
    ("export", "checkpoints"),
    ("export", "checkpoint_minutes"),
    ("compare",),
)
"""What may differ when a run is resumed or its report is made anew: nothing that training or measuring reads. A folder
may have been moved, to a larger disk say."""


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


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint of a run.

    Attributes:
        step: Steps taken.
        total: Steps planned.
        damage: Why nothing can go on from it, or None.
    """

    step: int
    total: int
    damage: str | None


def points(folder: RunFolder, *, verified: bool = True) -> list[Point]:
    """The checkpoints of a run, newest first; no torch is needed.

    Args:
        folder: The run.
        verified: Read every byte of them; else nobody waits, and damage is not seen.
    """
    return [_point(path, verified=verified) for path in sorted(folder.checkpoints.glob("step-*"), reverse=True)]


def _point(path: Path, *, verified: bool) -> Point:
    damage = commits.find_damage(path) if verified else None
    try:
        progress = json.loads((path / "state.json").read_text("utf-8"))["progress"]
        best = path.parent / f"best-{progress['best_step']:08d}"
        if verified and damage is None and progress["best_loss"] != "inf":
            worse = commits.find_damage(best)
            damage = f"the best weights that it refers to, {best.name}: {worse}" if worse else None
        return Point(progress["step"], progress["total"], damage)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Point(int("".join(filter(str.isdigit, path.name)) or 0), 0, damage or f"incomplete ({error})")


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
        if not folder.is_finished() and folder.recipe() != recipe:
            write_text(folder.resolved, dump(recipe))
        return
    # A process that was killed here may have written the first of the two recipes.
    ours = {"README.md", folder.given.name}
    strangers = [p.name for p in folder.path.iterdir() if p.name not in ours and p.name[0] != "."]
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
    left, right = settings(old), settings(new)
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def settings(recipe: Recipe) -> dict[str, str]:
    """Every setting that changes what is learnt or measured, by dotted key."""
    flat = _flat(recipe.model_dump(mode="json"))
    return {
        ".".join(key): str(value)
        for key, value in flat.items()
        if not any(key[: len(free)] == free for free in FREE_TO_CHANGE)
    }


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
