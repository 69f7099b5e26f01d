"""Mutants of honest files, by the hundred thousand, for every parser: each must end in a value or in one of our errors.

Mutants are read in a child process, a thousand at a time, which may take 10 CPU seconds for one and 512 MiB more memory
than it began with; a child that dies counts as not caught and is told with the mutant's number. With a number,
`tests/mutants.py` makes the same mutant again.

An h5ad file is looked through by a process with limits before it is read; here that process is forked for each mutant,
with the same limits, instead of begun anew, which saves its imports.

    python bench/fuzz.py --count 100000
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from mmap import mmap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import mutants  # noqa: E402

from metier.data.cells import looking  # noqa: E402

BATCH, SECONDS, ROOM = 1000, 10, 512 << 20
RESULTS = ROOT / "bench" / "results" / "fuzz.md"


def in_child(parser: mutants.Parser, numbers: range, folder: Path) -> collections.Counter[str]:
    """What became of a batch; a mutant that ends the child is told and skipped."""
    told: collections.Counter[str] = collections.Counter()
    start, shared = numbers.start, mmap(-1, 8)
    while start < numbers.stop:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            _child(parser, range(start, numbers.stop), folder, shared, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told.update(json.loads(line)[1] for line in pipe)
        _, status = os.waitpid(child, 0)
        at = int.from_bytes(shared[:8], "little")
        if status:
            too_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
            what = f"took {SECONDS} CPU seconds" if too_long else f"died with status {status}"
            told[f"not caught: {parser.name} {at}: {what}"] += 1
        start = at + 1
    return told


def _child(parser: mutants.Parser, numbers: range, folder: Path, shared: mmap, writing: int) -> None:
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def began(number: int) -> None:
        shared[:8] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)

    with os.fdopen(writing, "w") as pipe:
        for number, said in mutants.outcomes(parser, numbers, folder, began):
            named = f"not caught: {parser.name} {number}{said.removeprefix('not caught')}" if "caught" in said else said
            pipe.write(json.dumps([number, named]) + "\n")
            pipe.flush()
    os._exit(0)


class Forked:
    """A process that looks through an HDF5 file, as `metier.core.children.begin` gives it, but forked."""

    def __init__(self, _: Path, *arguments: Any) -> None:
        """Begin it."""
        from metier.data.cells import hdf5_worker

        self._reading, writing = os.pipe()
        self._child = os.fork()
        if not self._child:
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.dup2(writing, 1)
            try:
                hdf5_worker.main(*arguments)
            finally:
                os._exit(0)
        os.close(writing)

    def communicate(self, timeout: float) -> tuple[bytes, bytes]:
        """What it says before it ends."""
        if not select.select([self._reading], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("look", timeout)
        return os.read(self._reading, 1 << 16), b""

    def kill(self) -> None:
        """End it."""
        os.kill(self._child, signal.SIGKILL)

    def wait(self) -> None:
        """See it end."""
        os.close(self._reading)
        os.waitpid(self._child, 0)


def main() -> None:
    """Read the mutants of every parser and write the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--count", type=int, default=100_000)
    words.add_argument("--parsers", nargs="*", default=[parser.name for parser in mutants.PARSERS])
    words.add_argument("--out", type=Path, default=RESULTS)
    given = words.parse_args()
    warnings.simplefilter("ignore")
    looking.begin = Forked
    lines = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder = Path(place)
        for parser in (parser for parser in mutants.PARSERS if parser.name in given.parsers):
            began, told = time.process_time() + _children(), collections.Counter[str]()
            parser.seeds()
            list(mutants.outcomes(parser, range(1), folder))  # imports once, for all children
            for start in range(0, given.count, BATCH):
                told += in_child(parser, range(start, min(given.count, start + BATCH)), folder)
                print(f"{parser.name} {sum(told.values()):,}", end="\r", flush=True)
            seconds = time.process_time() + _children() - began
            lines.append(_line(parser.name, told, seconds))
            print(lines[-1])
            for said in told:
                if said.startswith("not caught"):
                    print(f"  {said}")
            given.out.write_text(_page(lines, given.count), "utf-8")


def _line(name: str, told: collections.Counter[str], seconds: float) -> str:
    bad = sum(count for said, count in told.items() if said.startswith("not caught"))
    ours = sorted(said for said in told if said.isidentifier() and said.endswith("Error"))
    refused = ", ".join(f"{told[said]:,} {said}" for said in ours)
    return f"| {name} | {sum(told.values()):,} | {told['read']:,} | {refused} | {bad} | {seconds:,.0f} |"


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _page(lines: list[str], count: int) -> str:
    head = (Path(__file__).read_text("utf-8").split('"""')[1]).split("\n\n")
    return "\n".join(
        [
            "# Mutants of honest files\n",
            f"```bash\npython bench/fuzz.py --count {count}\n```\n",
            f"{head[0]}\n\n{head[1]}\n\n{head[2]}\n",
            f"Python {platform.python_version()}, {platform.system()}, one process, other work beside it.\n",
            "| parser | mutants | read | refused | not caught | CPU seconds |",
            "|---|---:|---:|---|---:|---:|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
