"""What `metier predict` writes: rows with their answers, or a file of cells with their proteins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from metier.core import RecipeError
from metier.run.value_specialist import CellSpecialist

if TYPE_CHECKING:
    from metier.run import Specialist


def reads_cells(specialist: Specialist) -> TypeGuard[CellSpecialist]:
    """Whether it predicts cells, and not rows."""
    return isinstance(specialist, CellSpecialist)


def cells(specialist: CellSpecialist, data: Path, output: Path | None) -> dict[str, Any]:
    """Predict a file of cells into another; what was written.

    Raises:
        RecipeError: If one of the files is not named as what it is.
    """
    if data.suffix not in {".h5ad", ".h5mu"}:
        hint = "name an h5ad or h5mu file"
        raise RecipeError(f"{data} is no file of cells, which this run predicts", where="--data", hint=hint)
    if output is not None and output.suffix != ".h5ad":
        raise RecipeError(f"{output} would be written as h5ad", where="--output", hint="let its name end in .h5ad")
    if output is None:
        raise RecipeError("cells are written to a file", where="command line", hint="name it with --output FILE.h5ad")
    count = specialist.predict_file(data, output)
    return {"cells": count, "proteins": list(specialist.proteins), "file": str(output)}


def rows(specialist: Specialist, questions: Sequence[Any], max_new_tokens: int | None) -> list[dict[str, Any]]:
    """Every question with its answer under `prediction`."""
    answers = specialist.predict(questions, max_new_tokens=max_new_tokens)
    return [
        {**(row if isinstance(row, dict) else {"text": row}), "prediction": answer}
        for row, answer in zip(questions, answers, strict=True)
    ]
