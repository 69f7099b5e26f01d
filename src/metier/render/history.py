"""What `metier runs` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from metier.core import MetierError
from metier.core.evidence import Evidence
from metier.recipe import Recipe
from metier.render.screen import screen
from metier.report import Voice, plain
from metier.run.folder import Point, RunFolder, find_runs, points
from metier.run.lock import holder


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
    row: dict[str, Any] = dict.fromkeys(("task", "method", "base", "result", "next", "checkpoints"))
    row["run"] = str(run.path)
    try:
        recipe = run.recipe()
    except MetierError as error:
        return {**row, "state": "unreadable", "next": str(error)}
    row |= {"task": recipe.task.kind, "method": recipe.method.kind, "base": recipe.model.base}
    if run.is_finished():
        return {**row, "state": "finished", "result": _result(run)}
    who = holder(run.lock)
    found = points(run)
    row["checkpoints"] = [{"step": p.step, "of": p.total, "damage": p.damage} for p in found]
    if who is not None:
        said = f"process {who.get('pid', '?')} on {who.get('host', '?')} works on it now"
        return {**row, "state": "running", "next": said}
    return {**row, "state": "unfinished", "next": _how_to_go_on(run, recipe, found)}


def _how_to_go_on(run: RunFolder, recipe: Recipe, found: Sequence[Point]) -> str:
    """The command, from where it goes on, and why not from a later step."""
    damaged = [f"step {p.step} is passed over: {p.damage}" for p in found if p.damage]
    whole = next((p for p in found if p.damage is None), None)
    missing = [f"{name} is not there any more" for name in (recipe.data.train,) if not Path(name).exists()]
    at = f"after step {whole.step} of {whole.total}" if whole else "from the start: no checkpoint can be used"
    if not found:
        at = "from the start: no checkpoint was written yet"
    command = f"metier train {run.resolved} {'cannot go on' if missing else f'goes on {at}'}"
    return "; ".join([command, *missing, *damaged])


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
