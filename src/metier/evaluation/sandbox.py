"""Running the unit tests of a row against what a model wrote, in a process of its own with tight limits.

The limits stop accidents: endless loops, memory, large files, output, other processes, the network, and files outside a
folder that is thrown away. What holds where is said in `launcher.py`; where Python alone stands guard it is no wall
against hostile code, so the recipe must ask for it with `evaluate.run_tests`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_FILE_BYTES = 1 << 20
REACHED_END = 86
"""Exit status of a program that came to its end; one that leaves early, before its tests, ends otherwise."""


LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one row's tests may use: CPU and wall seconds, and megabytes of address space."""

    seconds: float
    megabytes: int


def program(question: str, answer: str, extras: Mapping[str, Any]) -> str:
    """The row's program: prompt and answer (or the answer alone, where it repeats the definition), then the tests.

    Rows carry `test` (code, with `check(candidate)` and `entry_point` as HumanEval has it) or `tests` (assertions).
    """
    tests = extras.get("test", extras.get("tests", ""))
    tests = "\n".join(map(str, tests)) if isinstance(tests, list | tuple) else str(tests)
    entry = extras.get("entry_point")
    call = f"\ncheck({entry})\n" if entry and "def check(" in tests else ""
    return f"{_code(question, answer)}\n\n{tests}\n{call}\n__import__('os')._exit({REACHED_END})\n"


def passes(question: str, answer: str, extras: Mapping[str, Any], limits: Limits) -> bool:
    """Whether the row's program ends without an error within the limits; a row without tests does not pass."""
    if not extras.get("test") and not extras.get("tests"):
        return False
    with tempfile.TemporaryDirectory(prefix="metier-test-") as folder:
        path = Path(folder) / "program.py"
        # A model may write half of a surrogate pair, which no file can hold.
        path.write_text(program(question, answer, extras), "utf-8", errors="replace")
        try:
            return _exit_status(path, limits) == REACHED_END
        except OSError:
            return False


def _code(question: str, answer: str) -> str:
    """The answer's code, after the prompt's where the prompt is the beginning of a function."""
    begins = re.search(r"^\s*(async )?def ", question, re.MULTILINE) and question.rstrip().endswith((":", '"""', "'''"))
    whole = "```" in answer or re.match(r"(async )?def |import |from |@", answer.lstrip("\r\n"))
    if not begins:
        return _unfenced(answer)
    if not whole:
        return f"{question}{answer}"
    # A prompt that ends in a docstring is a function already: the answer defines it anew and keeps its imports.
    head = "" if question.rstrip().endswith(":") else f"{question.rstrip()}\n\n"
    return f"{head}{_unfenced(answer)}"


def _exit_status(path: Path, limits: Limits) -> int | None:
    """How the program ended; None where the wall clock stopped it. Nothing it started outlives it."""
    most = (max(1, round(limits.seconds)), limits.megabytes << 20, MOST_FILE_BYTES)
    running = subprocess.Popen(  # noqa: S603 - the recipe asked for it, and the process is limited
        [sys.executable, "-I", "-S", "-B", str(LAUNCHER), str(path), *map(str, most)],
        cwd=path.parent,
        env={"PATH": "", "HOME": str(path.parent), "TMPDIR": str(path.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return running.wait(limits.seconds + 2)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(running)


def _end_group(running: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.pid, signal.SIGKILL)
    else:
        running.kill()
    running.wait()


def _unfenced(answer: str) -> str:
    """The code inside a Markdown fence, where there is one."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    body = rest.partition("```")[0]
    first, newline, code = body.partition("\n")
    return code if newline and first.strip().lower() in {"", "python", "py"} else body
