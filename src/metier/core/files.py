"""Writing files so that a reader sees the old content or the new, never a half, even after a power cut.

What metier writes begins under a staged name beside its place, is synced, and is renamed; what it removes is renamed
away first. So a process that is killed leaves nothing but staged names, and `clean` removes those.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from metier.core.errors import StorageError

Block = bytes | memoryview
"""Some of a file's content."""
BLOCK_BYTES = 1 << 24
"""Most that is written at once, so that whoever writes much can be stopped between two blocks."""
STAGED, REMOVED = ".staged-", ".removed-"
"""How the names begin of what is not there yet, and of what is there no more."""
_numbers = itertools.count()


class Disk:
    """What metier asks of the system when it writes: the only place where a file begins, grows, moves or ends.

    A test puts one of its own into `files.disk`, which fails at an operation, or remembers all of them.
    """

    def create(self, path: Path) -> IO[bytes]:
        """Begin a file that must not be there yet."""
        return path.open("xb", buffering=0)

    def extend(self, path: Path) -> IO[bytes]:
        """Open a file at its end, or begin it."""
        return path.open("ab", buffering=0)

    def write(self, file: IO[bytes], block: memoryview) -> int:
        """Write some of a block; how much of it."""
        return file.write(block)

    def sync(self, file: IO[bytes]) -> None:
        """Make the content of a file durable."""
        os.fsync(file.fileno())

    def make_folder(self, path: Path) -> None:
        """Make one folder, unless it is there."""
        path.mkdir(exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Make what was made, renamed and removed in a folder durable; nothing where folders cannot be opened."""
        if os.name != "posix":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Move a file or folder; a file in its place is replaced."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


disk = Disk()
"""The system, or what stands in its place in a test."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds.

    Attributes:
        bytes: Its size.
        sha256: Hex digest of its content.
    """

    bytes: int
    sha256: str


def write(path: Path, blocks: Iterable[Block]) -> Written:
    """Write a new file block by block, and make it durable.

    Raises:
        OSError: If it is there already, the disk is full, or the folder cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with disk.create(path) as file:
        for block in blocks:
            whole = memoryview(block).cast("B")
            for start in range(0, len(whole), BLOCK_BYTES):
                part = whole[start : start + BLOCK_BYTES]
                digest.update(part)
                size += len(part)
                _write_all(file, part)
        disk.sync(file)
    return Written(size, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically and durably.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    with staged_file(path, synced=True) as staged:
        write(staged, [text.encode("utf-8")])


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON; NaN and infinity are refused, for no JSON reader knows them."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def append(path: Path, text: str) -> None:
    """Add text to the end of a file; `sync` makes it durable.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        with disk.extend(path) as file:
            _write_all(file, memoryview(text.encode("utf-8")))
    except OSError as error:
        raise storage_error(path, error) from error


@contextmanager
def staged_file(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A name for a new file that takes the place of `path` once the block ends well; any library may write it.

    Args:
        path: The place.
        synced: Whether the block itself makes the file durable.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    staged = staged_name(path)
    try:
        make_folder(path.parent)
        try:
            yield staged
            if not synced:
                sync(staged)
            disk.rename(staged, path)
        except BaseException:
            discard(staged)
            raise
        disk.sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A new folder whose entries take their places in `path` once the block ends well; any library may fill it.

    Every file is durable before the first takes its place. A folder in it replaces the one of that name as a whole.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    staged = path / f"{STAGED}{_mark()}"
    try:
        make_folder(staged)
        try:
            yield staged
            sync(staged)
            for entry in sorted(staged.iterdir()):
                place = path / entry.name
                if entry.is_dir() and place.exists():
                    remove(place)
                disk.rename(entry, place)
            disk.sync_folder(path)
        finally:
            discard(staged)
    except OSError as error:
        raise storage_error(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably.

    Raises:
        OSError: If one cannot be made.
    """
    missing = list(itertools.takewhile(lambda folder: not folder.is_dir(), (path, *path.parents)))
    for folder in reversed(missing):
        disk.make_folder(folder)
        disk.sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Make a file durable, or a folder with all that it holds.

    Raises:
        OSError: If the system cannot.
    """
    if not path.is_dir():
        # Not for reading alone: some systems sync only what could be written.
        with path.open("rb+", buffering=0) as file:
            disk.sync(file)
        return
    for entry in sorted(path.iterdir()):
        sync(entry)
    disk.sync_folder(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder that nobody shall meet half removed.

    Raises:
        OSError: If it cannot be removed.
    """
    if not path.is_dir():
        disk.remove(path)
        return
    gone = path.with_name(f"{REMOVED}{path.name}-{_mark()}")
    disk.rename(path, gone)
    _remove_tree(gone)


def discard(path: Path) -> None:
    """Remove what was staged, if it is there and the system lets us: `clean` finds what it does not."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            _remove_tree(path)
        elif path.exists():
            disk.remove(path)


def clean(folder: Path, *, older_seconds: float = 0.0) -> int:
    """Remove what killed processes left in a folder, no deeper; how much that was.

    Args:
        folder: Where to look; it may be missing.
        older_seconds: Leave what is younger, where others may be writing.
    """
    now, found = time.time(), 0
    for entry in sorted(folder.glob(".*")):
        if entry.name.startswith((STAGED, REMOVED)) and now - entry.lstat().st_mtime >= older_seconds:
            discard(entry)
            found += 1
    return found


def staged_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f"{STAGED}{path.name}-{_mark()}")


def _mark() -> str:
    return f"{os.getpid()}-{next(_numbers)}"


def _write_all(file: IO[bytes], block: memoryview) -> None:
    while block:
        block = block[disk.write(file, block) :]


def _remove_tree(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            _remove_tree(entry)
        else:
            disk.remove(entry)
    disk.remove_folder(folder)


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
