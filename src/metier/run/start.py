"""`metier init`: a first recipe, written from what a model and a data file look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from metier import data, models, tasks
from metier.core import RecipeError
from metier.core.log import note
from metier.data import Look
from metier.data.cells import read_cells
from metier.models import NEW_CELLS
from metier.recipe import DataSection, EvaluateSection, ExportSection, ModelSection, TrainSection, parse
from metier.run.values import CELL_FILES


def draft(model: str, file: str, folder: str = "runs/job") -> str:
    """A commented recipe that runs as it is.

    Args:
        model: What model.base shall be.
        file: The training rows.
        folder: What export.folder shall be.

    Raises:
        MetierError: If the model or the rows cannot be read.
    """
    if Path(file).suffix in CELL_FILES:
        return _cells(model, file, folder)
    look = data.look(file)
    head = models.describe_head(ModelSection(base=model))
    task = _task(look, head)
    note(f"{file}: {look.reason}; {look.rows} rows; task {task['kind']}")
    tree = {
        "model": {"base": model},
        "data": {"train": file, "validation": 0.1, "test": 0.1, **_columns(look)},
        "task": task,
        "method": {"kind": "lora"},
        "train": {"learning_rate": "auto", "epochs": _epochs(look.rows), "batch_size": 16},
        "evaluate": _evaluate(look),
        "export": {"folder": folder},
    }
    parse(tree)  # a draft that does not hold is our mistake, found here
    top = f"# {look.reason}\n# `metier check` shows what the model will see, `metier train` does the work.\n"
    return top + "\n".join(_lines(tree))


def _cells(model: str, file: str, folder: str) -> str:
    """A recipe for cells; the table is read and checked whole."""
    table = read_cells(file)
    panel, new = table.panel, model == NEW_CELLS
    models.load_cells(ModelSection(base=model), panel, seed=0)
    note(f"{file}: {len(table)} cells, {len(panel.genes)} genes, {len(panel.proteins)} proteins; task cells")
    tree = {
        "model": {"base": model},
        "data": {"train": file, "validation": 0.1, "test": 0.1},
        "task": {"kind": "cells"},
        "method": {"kind": "full" if new else "lora"},
        "train": {"learning_rate": "auto", "epochs": 60 if new else 10, "batch_size": 128 if new else 32},
        "evaluate": {"rows": None},
        "export": {"folder": folder},
    }
    top = f"# {len(table):,} cells, {len(panel.genes):,} genes, {len(panel.proteins):,} proteins\n"
    top += "# `metier check` shows what the model will see, `metier train` does the work.\n"
    return top + "\n".join(_lines(tree))


def _task(look: Look, head: str) -> dict[str, Any]:
    for kind in look.tasks:
        section = parse({"model": {"base": "-"}, "data": {"train": "-"}, "task": kind}).task
        try:
            tasks.head_for(section, head)  # type: ignore[arg-type]
        except RecipeError:
            continue
        return {"kind": kind}
    raise RecipeError(
        f"these rows fit {' or '.join(look.tasks)}, which this model cannot learn: its own output is {head}",
        where="metier init",
        hint="use a causal language model for text, any model for classes",
    )


def _columns(look: Look) -> dict[str, Any]:
    """Only the words whose column has another name."""
    renamed = {word: column for word, column in look.mapping.items() if word != column}
    return {"format": look.format, "columns": renamed} if renamed else {}


def _evaluate(look: Look) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": 200}
    if look.answer_marker:
        found["answer_after"] = look.answer_marker
    if look.tests:
        found["run_tests"] = False
    return found


def _epochs(rows: int) -> float:
    """Fewer passes the more rows. Source: judgement, after the field's habit of 1 to 3 passes on large sets."""
    return 5 if rows < 1_000 else 3 if rows < 10_000 else 2 if rows < 100_000 else 1


SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "train": TrainSection,
    "evaluate": EvaluateSection,
    "export": ExportSection,
}


def _lines(tree: Mapping[str, Any]) -> Iterator[str]:
    recipe = parse(tree)
    for name, keys in tree.items():
        section: BaseModel = getattr(recipe, name)
        fields = type(section).model_fields
        yield f"\n{name}:"
        for key, value in keys.items():
            about = fields[key].description or _kinds(name)
            if about:
                yield f"  # {about}"
            yield f"  {key}: {_in_one_line(value)}"
    yield ""


def _in_one_line(value: Any) -> str:
    # In a list, for YAML marks the end of a lone scalar's document.
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000).strip()[1:-1]


def _kinds(name: str) -> str:
    return {"task": "chat, complete, classify, cells or own", "method": "full, freeze or lora"}.get(name, "")
