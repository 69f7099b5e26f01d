"""What `metier runs` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from metier.core import MetierError
from metier.core.evidence import Evidence
from metier.render.screen import screen
from metier.report import Voice, plain
from metier.run.folder import RunFolder, find_runs


def rows(root: Path) -> list[dict[str, Any]]:
    """One entry for each run below `root`, newest first."""
    return [_row(run) for run in find_runs(root)]


def show(found: Sequence[dict[str, Any]], root: Path) -> None:
    """A table; runs that can go on come with the command."""
    console = screen()
    if not found:
        console.print(f"no runs below {root}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "task", "method", "base", "result"):
        table.add_column(title, overflow="fold" if title == "run" else "ellipsis", no_wrap=title != "run")
    for row in found:
        table.add_row(*(str(row[key] or "") for key in ("run", "state", "task", "method", "base", "result")))
    console.print(table)
    for row in found:
        if row["next"]:
            console.print(f"{row['run']}: {row['next']}", markup=False)


def _row(run: RunFolder) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(("task", "method", "base", "result", "next"))
    row["run"] = str(run.path)
    try:
        recipe = run.recipe()
    except MetierError as error:
        return {**row, "state": "unreadable", "next": str(error)}
    row |= {"task": recipe.task.kind, "method": recipe.method.kind, "base": recipe.model.base}
    if run.is_finished():
        return {**row, "state": "finished", "result": _result(run)}
    points = sorted(path.name for path in run.checkpoints.glob("step-*"))
    at = f"from {points[-1]}" if points else "from the start: no checkpoint was written yet"
    return {**row, "state": "unfinished", "next": f"metier train {run.resolved} goes on {at}"}


def _result(run: RunFolder) -> str:
    """The figure that decides, before and after."""
    try:
        evidence = Evidence.model_validate_json(run.evidence.read_text("utf-8"))
    except (OSError, ValueError):
        return "evidence.json is damaged"
    voice = Voice("en")
    main = next(measure for measure in evidence.measures if measure.name == evidence.primary)
    before = f"{voice.amount(main.before.value, main.unit)} -> " if main.before else ""
    return plain(f"{voice.measure(main)} {before}{voice.amount(main.after.value, main.unit)}")
