"""What a person or a program reads while metier works, always on stderr.

On a terminal, notes are plain sentences and a step is a progress bar; piped, every event is one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_state = {"quiet": False}


def set_quiet(*, quiet: bool) -> None:
    """Silence `note`; warnings and errors stay."""
    _state["quiet"] = quiet


def is_terminal() -> bool:
    """Whether somebody is looking at stderr."""
    return sys.stderr.isatty()


def note(text: str, **facts: Any) -> None:
    """Say one thing that happened; `facts` travel along in the JSON form only."""
    if not _state["quiet"]:
        _emit("note", text, facts)


def warn(text: str, **facts: Any) -> None:
    """Say one thing that the user should know and may want to change."""
    _emit("warning", text, facts)


def event(kind: str, **facts: Any) -> None:
    """One machine-readable line; shown only when nobody looks at stderr."""
    if not is_terminal() and not _state["quiet"]:
        sys.stderr.write(json.dumps({"event": kind, **facts}, ensure_ascii=False) + "\n")
        sys.stderr.flush()


def _emit(kind: str, text: str, facts: dict[str, Any]) -> None:
    if is_terminal():
        sys.stderr.write(f"{'warning: ' if kind == 'warning' else ''}{text}\n")
    else:
        sys.stderr.write(json.dumps({"event": kind, "text": text, **facts}, ensure_ascii=False) + "\n")
    sys.stderr.flush()


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left on a terminal, nothing when piped; call it with (steps done, what to show)."""
    if not is_terminal() or _state["quiet"]:
        yield lambda _done, _text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(title, total=total, completed=done, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)
