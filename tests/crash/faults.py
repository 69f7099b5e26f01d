"""Disks that fail, kill and remember: what stands in the place of `metier.core.files.disk`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from metier.core.files import Disk

OPERATIONS = ("create", "extend", "write", "sync", "make_folder", "sync_folder", "rename", "remove", "remove_folder")


@dataclass(frozen=True)
class Operation:
    """One call of the file layer.

    Attributes:
        kind: Name of the method.
        path: The file or folder; of a rename, what is renamed.
        to: Where a rename goes.
        content: What a write wrote.
    """

    kind: str
    path: Path
    to: Path | None = None
    content: bytes = b""


class Watched(Disk):
    """A disk that tells of every operation before it is done."""

    def __init__(self, before: Callable[[Operation], None]) -> None:
        self._before = before

    def create(self, path: Path) -> IO[bytes]:
        self._before(Operation("create", path))
        return super().create(path)

    def extend(self, path: Path) -> IO[bytes]:
        self._before(Operation("extend", path))
        return super().extend(path)

    def write(self, file: IO[bytes], block: memoryview) -> int:
        self._before(Operation("write", Path(file.name), content=bytes(block)))
        return super().write(file, block)

    def sync(self, file: IO[bytes]) -> None:
        self._before(Operation("sync", Path(file.name)))
        super().sync(file)

    def make_folder(self, path: Path) -> None:
        self._before(Operation("make_folder", path))
        super().make_folder(path)

    def sync_folder(self, path: Path) -> None:
        self._before(Operation("sync_folder", path))
        super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._before(Operation("rename", old, to=new))
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._before(Operation("remove", path))
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._before(Operation("remove_folder", path))
        super().remove_folder(path)


class Recording(Watched):
    """Remembers every operation."""

    def __init__(self) -> None:
        self.done: list[Operation] = []
        super().__init__(self.done.append)


class Failing(Watched):
    """Fails at the n-th operation, once; a write fails half done, as on a disk that has just become full."""

    def __init__(self, at: int, number: int) -> None:
        self._at, self._number, self.count, self.hit = at, number, 0, ""
        super().__init__(self._count)

    def _count(self, operation: Operation) -> None:
        self.count += 1
        if self.count == self._at:
            self.hit = f"{operation.kind} {operation.path.name}"
            if operation.kind == "write":
                with operation.path.open("ab") as file:
                    file.write(operation.content[: len(operation.content) // 2])
            raise OSError(self._number, os.strerror(self._number), str(operation.path))


class Deadly(Watched):
    """Kills its own process with SIGKILL at an operation that is meant; a write is killed half done."""

    def __init__(self, meant: Callable[[Operation], bool], *, occurrence: int) -> None:
        self._meant, self._left = meant, occurrence
        super().__init__(self._judge)

    def _judge(self, operation: Operation) -> None:
        if not self._meant(operation):
            return
        self._left -= 1
        if self._left == 0:
            if operation.kind == "write":
                with operation.path.open("ab") as file:
                    file.write(operation.content[: len(operation.content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ a power cut


@dataclass
class _File:
    """Content as the processes see it, and as the disk has it."""

    seen: bytes = b""
    kept: bytes = b""


@dataclass
class Simulated:
    """A disk with a memory in front of it: what is left after a power cut, by the operations that were done.

    Content that was not synced is lost, to nothing. Names that were not synced may be lost or kept: both are tried.
    """

    root: Path
    """The folder that was there before."""
    seen: dict[Path, _File | None] = field(default_factory=dict)
    """Names as the processes see them; None for folders."""
    kept: dict[Path, _File | None] = field(default_factory=dict)
    """Names as the disk has them."""

    def do(self, operation: Operation) -> None:
        """Apply an operation."""
        path = operation.path
        match operation.kind:
            case "create":
                self.seen[path] = _File()
            case "extend":
                self.seen.setdefault(path, _File())
            case "write":
                self._file(path).seen += operation.content
            case "sync":
                self._file(path).kept = self._file(path).seen
            case "make_folder":
                self.seen.setdefault(path, None)
            case "rename":
                assert operation.to is not None
                self._move(path, operation.to)
            case "remove" | "remove_folder":
                del self.seen[path]
            case "sync_folder":
                self.kept = {p: f for p, f in self.kept.items() if p.parent != path}
                self.kept |= {p: f for p, f in self.seen.items() if p.parent == path}

    def left(self, *, names: str) -> dict[Path, bytes | None]:
        """What a power cut leaves, with the names that the disk has ("kept") or that were seen ("seen")."""
        tree = {"kept": self.kept, "seen": self.seen}[names]
        found = {path: None if file is None else file.kept for path, file in tree.items()}
        # A name below a folder that is not there is not there either.
        return {
            path: content
            for path, content in found.items()
            if all(folder in found for folder in path.parents if self.root in folder.parents)
        }

    def _file(self, path: Path) -> _File:
        file = self.seen[path]
        assert file is not None
        return file

    def _move(self, old: Path, new: Path) -> None:
        for path in [p for p in self.seen if p == old or old in p.parents]:
            self.seen[new / path.relative_to(old)] = self.seen.pop(path)
        # What stands in a folder goes where the folder goes; on the disk it shows there once the folder's name does.
        for path, file in [(p, f) for p, f in self.kept.items() if old in p.parents]:
            self.kept[new / path.relative_to(old)] = file


def write_tree(tree: dict[Path, bytes | None], old: Path, new: Path) -> None:
    """Make what is left on a simulated disk real, with `new` in the place of `old`."""
    for path, content in sorted(tree.items()):
        place = new / path.relative_to(old)
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
