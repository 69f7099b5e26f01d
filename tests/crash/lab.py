"""A place where jobs are run, killed and run again, each in a process forked from one that has paid the imports."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cases
import torch
from faults import Deadly, Operation, Recording

import metier
from metier import cli
from metier.core import commits, files
from metier.data import disk as columns
from metier.recipe import dump
from metier.training import checkpoint, course

STEP = re.compile(r"step-\d+")
MARK = re.compile(r"-\d+-\d+(?=/|$)")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; minus the signal that ended it.
        said: What it wrote.
        seconds: CPU time that it took.
    """

    code: int
    said: str
    seconds: float

    @property
    def resumed(self) -> int | None:
        """The step after which it went on."""
        found = re.search(r"resumed after step (\d+)", self.said)
        return int(found[1]) if found else None


@dataclass
class Running:
    """A process at work."""

    pid: int
    log: Path
    said_before: str = ""

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            return float("inf")

    def has_ended(self) -> bool:
        """Whether nothing is left to kill."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    def after(self, seconds: float) -> bool:
        """Wait until it has had so much CPU time; whether it is still there."""
        while not self.has_ended():
            if self.cpu_seconds() >= seconds:
                return True
            time.sleep(0.001)
        return False

    def says(self, text: str) -> bool:
        """Wait until it has said something; whether it has."""
        while not self.has_ended():
            if text in self.log.read_text("utf-8", errors="replace"):
                return True
            time.sleep(0.001)
        return False

    def send(self, number: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> Ended:
        """Wait for its end."""
        _, status, usage = os.wait4(self.pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text("utf-8", errors="replace"), seconds)


@dataclass(frozen=True)
class Reference:
    """What a job gives that nobody interrupts.

    Attributes:
        result: Hash of what it hands over.
        losses: Of every step.
        rows: Which rows met in each step.
        seconds: CPU time of the run.
        operations: How often each kind of file operation was done.
    """

    result: str
    losses: list[tuple[Any, ...]]
    rows: dict[int, tuple[int, ...]]
    seconds: float
    operations: Counter[tuple[str, str]]


@dataclass
class Lab:
    """Models, rows, and runs below one folder."""

    root: Path
    numbers: int = 0
    references: dict[str, Reference] = field(default_factory=dict)

    @cached_property
    def made(self) -> Path:
        """The models and rows."""
        cases.make(self.root)
        # Here, and not in a process of its own: what it imports is paid once for all that are forked.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        metier.train(cases.recipe(self.root, "cells-full-map", self.root / "cells-base"))
        importlib.import_module("peft")
        torch.set_num_threads(threads)
        return self.root

    def bench(self, name: str, **sections: Any) -> Bench:
        """A new run folder for a job."""
        assert self.made
        self.numbers += 1
        return Bench(self, name, folder=self.root / "runs" / f"{name}-{self.numbers}", sections=sections)

    def reference(self, name: str) -> Reference:
        """The job, run once without interruption."""
        if name not in self.references:
            bench = self.bench(name)
            recording = Recording()

            def dump_operations() -> None:
                told = [
                    [one.kind, normal(one.path, bench.folder), normal(one.to, bench.folder)] for one in recording.done
                ]
                bench.notes.with_suffix(".operations").write_text(json.dumps(told))

            done = bench.run(disk=recording, at_end=dump_operations)
            assert done.code == 0, done.said
            told = json.loads(bench.notes.with_suffix(".operations").read_text())
            counted = Counter((kind, f"{path} -> {to}" if to else path) for kind, path, to in told)
            self.references[name] = Reference(
                cases.result(bench.folder), cases.losses(bench.folder), bench.rows(), done.seconds, counted
            )
        return self.references[name]


@dataclass
class Bench:
    """One run folder, and the processes that work in it."""

    lab: Lab
    name: str
    folder: Path
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> Path:
        """The recipe."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def notes(self) -> Path:
        """What the processes note for us: rows of each step, and checkpoints once they are committed."""
        return self.folder.with_name(f"{self.folder.name}.notes")

    def start(
        self,
        *,
        disk: files.Disk | None = None,
        arrange: Callable[[], None] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> Running:
        """Begin `metier train` on the job in a process of its own."""
        self.job.parent.mkdir(parents=True, exist_ok=True)
        recipe = dump(cases.recipe(self.lab.root, self.name, self.folder, **self.sections))
        if not self.job.exists() or self.job.read_text() != recipe:  # another process may be reading it
            self.job.write_text(recipe)
        # Several may work here at once, and each says its own.
        self.lab.numbers += 1
        log = self.folder.with_name(f"{self.folder.name}-{self.lab.numbers}.log")
        log.write_text("")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            _child(self, log, disk, arrange, at_end)
        return Running(pid, log)

    def run(self, **words: Any) -> Ended:
        """Run `metier train` on the job to its end."""
        return self.start(**words).end()

    def rows(self) -> dict[int, tuple[int, ...]]:
        """Which rows met in each step; a step that was taken twice had the same."""
        found: dict[int, tuple[int, ...]] = {}
        for kind, step, rows in self._noted():
            if kind == "rows":
                assert found.setdefault(step, tuple(rows)) == tuple(rows), f"step {step} met other rows the second time"
        return found

    def acknowledged(self) -> int:
        """The newest step whose checkpoint was said to be committed; 0 for none."""
        return max((step for kind, step, _ in self._noted() if kind == "saved"), default=0)

    def check(self, done: Ended) -> None:
        """The run has ended as if nobody had interrupted it, and nothing is left over."""
        wanted = self.lab.reference(self.name)
        assert done.code == 0, done.said[-2000:]
        assert cases.result(self.folder) == wanted.result
        assert cases.losses(self.folder) == wanted.losses
        assert self.rows() == wanted.rows
        assert self.debris() == []

    def debris(self) -> list[str]:
        """What no run folder should hold once it is finished."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob(".*")) + [
            "checkpoints" for _ in range((self.folder / "checkpoints").exists())
        ]

    def usable(self) -> list[int]:
        """Steps of the checkpoints that verify."""
        points = sorted((self.folder / "checkpoints").glob("step-*"))
        return [int(STEP.search(path.name)[0][5:]) for path in points if checkpoint.find_damage(path) is None]  # type: ignore[index]

    def _noted(self) -> list[tuple[str, int, list[int]]]:
        if not self.notes.exists():
            return []
        found = []
        for line in self.notes.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a kill may cut a line
                kind, step, rows = json.loads(line)
                found.append((kind, step, rows))
        return found


def aimed(bench: Bench, operation: tuple[str, str], occurrence: int) -> Deadly:
    """A disk that kills at the n-th operation of a kind."""

    def meant(one: Operation) -> bool:
        path, to = normal(one.path, bench.folder), normal(one.to, bench.folder)
        return (one.kind, f"{path} -> {to}" if to else path) == operation

    return Deadly(meant, occurrence=occurrence)


def normal(path: Path | None, folder: Path) -> str:
    """A path without what differs from run to run."""
    if path is None:
        return ""
    inside = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else "elsewhere"
    return STEP.sub(
        "step-N", re.sub(r"best-\d+", "best-N", MARK.sub("", re.sub(r"\.staged-\d+-\d+", ".staged", inside)))
    )


def _child(
    bench: Bench,
    log: Path,
    disk: files.Disk | None,
    arrange: Callable[[], None] | None,
    at_end: Callable[[], None] | None,
) -> None:
    """Be `metier train`, and end."""
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(out, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        # Threads do not survive a fork; and another number of them would be other bits.
        torch.set_num_threads(1)
        _note_what_happens(bench.notes)
        if "streamed" in bench.name:
            columns.IN_MEMORY_BYTES = 0
        if disk is not None:
            files.disk = disk
        if arrange is not None:
            arrange()
        sys.argv = ["metier", "train", str(bench.job)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if at_end is not None:
            at_end()
    except BaseException:  # noqa: BLE001 - it is told by the exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note_what_happens(notes: Path) -> None:
    handle = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    fit, commit = course.fit, checkpoint.commit

    def note(*what: Any) -> None:
        os.write(handle, (json.dumps(what) + "\n").encode())

    def noted(steps: Any) -> Iterator[Any]:
        for step in steps:
            note("rows", step.number, step.rows)
            yield step

    def watched_fit(module: Any, task: Any, examples: Any, steps: Any, *words: Any, **more: Any) -> Any:
        return fit(module, task, examples, noted(steps), *words, **more)

    def watched_commit(folder: Path, progress: Any, contents: Any, *, keep: int) -> None:
        commit(folder, progress, contents, keep=keep)
        note("saved", progress.step, [])

    course.fit, checkpoint.commit = watched_fit, watched_commit


__all__ = ["Bench", "Ended", "Lab", "Reference", "Running", "aimed", "commits", "normal"]
