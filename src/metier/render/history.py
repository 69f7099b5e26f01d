"""What `metier runs` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from metier import experiment
from metier.core import MetierError
from metier.core.comparison import Comparison, Interference
from metier.core.evidence import Evidence
from metier.recipe import Recipe
from metier.render.screen import screen
from metier.report import Voice, plain
from metier.run.folder import Point, RunFolder, find_runs, points
from metier.run.lock import holder

if TYPE_CHECKING:
    from metier.experiment import ExperimentFolder


def rows(root: Path) -> list[dict[str, Any]]:
    """One entry for each run below `root`, then for each comparison; newest first."""
    runs, comparisons = find_runs(root), experiment.find_comparisons(root)
    return [*map(_row, runs), *map(_compared_row, comparisons)]


def show(found: Sequence[dict[str, Any]], root: Path) -> None:
    """A table; runs that can go on come with the command."""
    console = screen()
    if not found:
        console.print(f"no runs below {root}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "task", "method", "base", "result"):
        # A run's path and what came of it may be long, and are given on more lines; the rest keeps to one.
        is_long = title in {"run", "result"}
        table.add_column(
            title,
            overflow="fold" if is_long else "ellipsis",
            no_wrap=not is_long,
            min_width=10 if is_long else None,
            max_width=24 if title == "method" else None,
        )
    for row in found:
        table.add_row(*(str(row[key] or "") for key in ("run", "state", "task", "method", "base", "result")))
    console.print(table)
    for row in found:
        if row["next"]:
            console.print(f"{row['run']}: {row['next']}", markup=False)


def _row(run: RunFolder) -> dict[str, Any]:
    row, recipe = _begun(run)
    if recipe is None:
        return row
    row["method"] = recipe.method.kind
    if run.is_finished():
        return {**row, "state": "finished", "result": _result(run)}
    found = points(run)
    row["checkpoints"] = [{"step": p.step, "of": p.total, "damage": p.damage} for p in found]
    return {**row, **_open(run, _how_to_go_on(run, recipe, found))}


def _compared_row(folder: ExperimentFolder) -> dict[str, Any]:
    row, recipe = _begun(folder)
    if recipe is None:
        return row
    row["method"] = "tasks" if folder.holds_tasks else ", ".join(recipe.compare.methods)
    if folder.is_compared():
        return {**row, "state": "finished", "result": _answer(folder)}
    made = f"trainings that are made: {folder.trainings()}"
    again = "metier compare with the same recipes" if folder.holds_tasks else f"metier compare {folder.resolved}"
    return {**row, **_open(folder, f"{again} goes on; {made}")}


def _begun(run: RunFolder) -> tuple[dict[str, Any], Recipe | None]:
    """What is known before anybody looks at what was made; no recipe where it cannot be read."""
    row: dict[str, Any] = dict.fromkeys(("task", "method", "base", "result", "next", "checkpoints"))
    row["run"] = str(run.path)
    try:
        recipe = run.recipe()
    except MetierError as error:
        return {**row, "state": "unreadable", "next": str(error)}, None
    return {**row, "task": recipe.task.kind, "base": recipe.model.base}, recipe


def _open(run: RunFolder, how_to_go_on: str) -> dict[str, Any]:
    """Whether somebody works on it, else how it goes on."""
    who = holder(run.lock)
    if who is None:
        return {"state": "unfinished", "next": how_to_go_on}
    return {"state": "running", "next": f"process {who.get('pid', '?')} on {who.get('host', '?')} works on it now"}


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


def _answer(folder: ExperimentFolder) -> str:
    """The first line of a comparison's verdict; of several tasks, how many there are."""
    try:
        if folder.holds_tasks:
            found = Interference.model_validate_json(folder.interference.read_text("utf-8"))
            return f"{len(found.tasks)} tasks, see interference.html"
        return plain(Comparison.model_validate_json(folder.comparison.read_text("utf-8")).verdict[0])
    except (OSError, ValueError, IndexError):
        return "its file of figures is damaged"


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
