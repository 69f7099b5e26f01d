"""Writing files so that a reader sees the old content or the new, never a half."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from metier.core.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically and durably.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(staged).chmod(0o644)
            Path(staged).replace(path)
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; NaN and infinity are refused, for no JSON reader knows them."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def storage_error(path: Path, error: OSError) -> StorageError:
    """The operating system's refusal, in our words."""
    return StorageError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        hint="free some space or name another folder with export.folder=...; what was saved before is intact",
    )


def cache_root() -> Path:
    """Where metier keeps what can be made again; METIER_CACHE names another place."""
    import platformdirs

    named = os.environ.get("METIER_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("metier"))
