"""Tuned models whose answers are numbers: proteins for cells, and the targets of a user's own task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metier import evaluation, models, tasks, training
from metier.core import RecipeError
from metier.core.log import note
from metier.core.panel import Panel
from metier.data import cells
from metier.data.cells import CellTable
from metier.data.records import Cells, Columns
from metier.evaluation import value_suite
from metier.run.cell_data import check_proteins, read_splits, without_annotations
from metier.run.folder import RunFolder
from metier.run.job import measured_rows
from metier.run.specialist import Specialist
from metier.run.values import cell_task
from metier.tasks.cells import CellTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metier.core.evidence import Measure
    from metier.models import Model
    from metier.recipe import CellsTask, ModelSection, Recipe
    from metier.tasks import ValueTask

CELLS_AT_ONCE = 8192
"""Cells read, predicted and written together."""
KEY = "protein_predicted"
"""Where predictions stand in `obsm`."""


@dataclass(frozen=True)
class OwnSpecialist(Specialist):
    """A tuned network of a user's own."""

    task: ValueTask[Any]

    def predict(
        self,
        questions: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,  # noqa: ARG002 - numbers have no length
    ) -> list[Any]:
        """The targets of each row: a number, or with several targets a mapping from name to number.

        Raises:
            DataError: With every row that the task cannot read.
        """
        # The task reads its targets out of the rows, and who asks does not have them.
        unknown = dict.fromkeys(self.task.names, float("nan"))
        rows = [Columns(f"row {i}", {**unknown, **question}) for i, question in enumerate(questions, 1)]
        found_BP = tasks.predict(self.task, self.module, self.task.encode(rows, training=False))
        if len(self.task.names) == 1:
            return [float(value) for value in found_BP[:, 0]]
        return [dict(zip(self.task.names, map(float, row), strict=True)) for row in found_BP]

    def evaluate(self, file: str | None = None) -> tuple[Measure, ...]:
        """The figures on the run's test rows, or on those of another file."""
        return _measured(self, self.task, self._rows(file), ("target", "row"))


@dataclass(frozen=True)
class CellSpecialist(Specialist):
    """A network tuned to predict the proteins of cells."""

    task: CellTask

    @property
    def proteins(self) -> tuple[str, ...]:
        """What it predicts, in order."""
        return self.task.names

    def predict(self, questions: Any, *, max_new_tokens: int | None = None) -> Any:  # noqa: ARG002
        """The table with its proteins.

        Args:
            questions: AnnData or MuData in memory, or a file of cells.
            max_new_tokens: Not used; numbers have no length.

        Returns:
            A copy of an AnnData or MuData in memory, or for a file a new AnnData with its cells' names and annotations.
            `obsm["protein_predicted"]`, shape (cells, proteins), has the predictions on the scale that the run was
            tuned on; `uns["metier"]` has the names of the proteins and that scale.

        Raises:
            DataError: If the table cannot be read, or its genes are not those of the model.
        """
        import anndata

        table = self._table(questions)
        found_BP = np.concatenate([values for _, values in self._blocks(table)])
        if hasattr(questions, "obs_names") and hasattr(questions, "layers"):
            out = questions.copy()
        else:
            import pandas

            out = anndata.AnnData(obs=pandas.DataFrame(dict(table.obs), index=list(table.names)))
        out.obsm[KEY] = found_BP
        out.uns["metier"] = self.facts()
        return out

    def predict_file(self, source: Path, output: Path) -> int:
        """Stream a file of cells into an h5ad with its predictions; how many cells there were.

        Raises:
            DataError: If the table cannot be read, or its genes are not those of the model.
            StorageError: If the output cannot be written.
        """
        table = self._table(str(source))
        written = ((table.source_rows(rows), values) for rows, values in self._blocks(table))
        cells.write_predictions(str(source), written, self.proteins, output, self.facts())
        return len(table)

    @property
    def history(self) -> Any:
        """Every step and validation of the run, as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(training.read_metrics(RunFolder(self.folder).metrics))

    def facts(self) -> dict[str, Any]:
        """What stands beside predictions in `uns["metier"]`."""
        return {"proteins": list(self.proteins), "transform": self.task.transform.name, "run": str(self.folder)}

    def evaluate(self, file: str | None = None) -> tuple[Measure, ...]:
        """The figures on the run's test cells, or on all cells of another file with the same proteins."""
        if file is None:
            splits = read_splits(self.recipe, self.task.section)
            test = measured_rows(splits.test, self.recipe.evaluate.rows, self.recipe.data.seed)
            return _measured(self, self.task, test, ("protein", "cell"))
        columns = without_annotations(self.recipe.data.columns)
        table = cells.read_cells(file, columns=columns, organism=self.task.section.organism)
        self._check(table)
        for text in check_proteins(self.proteins, table, "the file"):
            note(text)
        return _measured(self, self.task, Cells(table, np.arange(len(table))), ("protein", "cell"))

    def _table(self, questions: Any) -> CellTable:
        named = without_annotations(self.recipe.data.columns)
        columns = {word: name for word, name in named.items() if not word.startswith("protein") and word != "mask"}
        organism = self.task.section.organism
        table = cells.read_cells(questions, columns=columns, with_proteins=False, organism=organism)
        self._check(table)
        return table

    def _check(self, table: CellTable) -> None:
        """The genes must be those of the run, as far as `task.overlap` says.

        Raises:
            DataError: If they are not.
        """
        known, at_least = self.task.panel.genes, self.task.section.overlap
        note(cells.overlap(table.panel, set(known), at_least=at_least, where=table.where))

    def _blocks(self, table: CellTable) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        try:
            for begin in range(0, len(table), CELLS_AT_ONCE):
                rows = np.arange(begin, min(begin + CELLS_AT_ONCE, len(table)))
                encoded = self.task.encode(Cells(table, rows), training=False)
                yield rows, tasks.predict(self.task, self.module, encoded).astype(np.float32)
        finally:
            self.task.forget(table)


def _measured(specialist: Specialist, task: ValueTask[Any], test: Any, nouns: tuple[str, str]) -> tuple[Measure, ...]:
    recipe = specialist.recipe
    section = recipe.evaluate.model_copy(update={"baselines": False})
    encoded = task.encode(test, training=False)
    scene = value_suite.Scene(task, encoded, (), section, nouns, None, recipe.data.seed)
    measured = value_suite.measure(scene, specialist.module, base=None, new=False)
    return evaluation.compare(None, measured, section.confidence)


def load_cells(
    recipe: Recipe, section: CellsTask, model: ModelSection, facts: Mapping[str, Any]
) -> tuple[Model, CellTask]:
    """The network of a run, and the task on the panel that it was tuned on.

    Raises:
        RecipeError: If the run does not say which panel that was.
    """
    if "panel" not in facts:
        raise RecipeError("the run does not name its genes and proteins", where="metier.json", hint="tune again")
    panel = Panel(**{name: tuple(values) for name, values in facts["panel"].items()})
    loaded = models.load_cells(model, panel, seed=recipe.train.seed, redraw=section.redraw)
    return loaded, cell_task(section, loaded.module, panel, seed=recipe.train.seed)
