"""Folders that are there whole or not at all, and that can tell whether they still are what was written.

A commit writes its files into a staged folder, syncs each, writes a manifest of their sizes and hashes, syncs it,
renames the folder to its place and syncs the folder above. Reading believes a folder only if its manifest verifies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from metier.core import files
from metier.core.log import warn

MANIFEST = "manifest.json"


def commit(final: Path, contents: Mapping[str, Iterable[files.Block]]) -> None:
    """Write a folder of files, durably, in place of one of that name.

    Args:
        final: The folder.
        contents: The content of each file, in blocks.

    Raises:
        StorageError: If the disk is full or the folder cannot be written; nothing is there then that was not before.
    """
    staged = files.staged_name(final)
    try:
        try:
            files.make_folder(staged)
            facts = {name: asdict(files.write(staged / name, blocks)) for name, blocks in contents.items()}
            files.write(staged / MANIFEST, [files.as_json({"files": facts}).encode()])
            files.disk.sync_folder(staged)
            if final.exists():
                files.remove(final)
            files.disk.rename(staged, final)
        except BaseException:
            files.discard(staged)
            raise
        files.disk.sync_folder(final.parent)
    except OSError as error:
        raise files.storage_error(final, error) from error


def find_damage(folder: Path, *, only: str | None = None) -> str | None:
    """What is wrong with a committed folder, or None.

    Args:
        folder: The folder.
        only: Read this file alone; without, every byte is read.
    """
    try:
        text = (folder / MANIFEST).read_text("utf-8")
        manifest = json.loads(text)
        facts = manifest["files"]
        # One manifest has one text, so that no bit of it can change unseen.
        if text != files.as_json(manifest) or not facts:
            return f"{MANIFEST} is not what was written"
        for name, wanted in facts.items():
            path = folder / name
            if only not in {None, name}:
                continue
            if path.stat().st_size != wanted["bytes"] or files.sha256(path) != wanted["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"
    return None


def names(folder: Path) -> frozenset[str]:
    """The files that the manifest of a folder names; `find_damage` must have found none."""
    return frozenset(json.loads((folder / MANIFEST).read_text("utf-8"))["files"])


def drop(folder: Path) -> None:
    """Remove a committed folder; where that fails, say so and go on, for nothing depends on it."""
    try:
        files.remove(folder)
    except OSError as error:
        warn(f"{folder} cannot be removed: {error.strerror or error}")
