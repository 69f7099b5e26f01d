"""Predicting the proteins of single cells from their RNA; batches are cut out of sparse tables with arrays alone.

Shapes: B cells, G genes of the panel, P proteins of the panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metier.core import Batch, DataError, Loss
from metier.core.panel import Panel
from metier.core.rng import derive
from metier.core.words import first_few
from metier.data.cells import CellTable, Transform, log_normalise
from metier.data.records import Cell, Cells
from metier.tasks.protocol import Shown
from metier.tasks.values import TARGET, ValueTask, over_measured, predicted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import nn

    from metier.data.records import Record
    from metier.recipe import CellsTask

MOST_CALIBRATED = 20_000
"""Cells that the output layer is fitted on at most; a closed form gains little from more. Judgement."""
SPREAD_FLOOR = 1e-6
"""Below this a cell's proteins do not differ and have no correlation."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """A table that a task has met.

    Attributes:
        table: The table; kept, so that its id stays its own.
        reader: How the network reads it.
        columns_P: Where it has each protein, -1 for nowhere.
    """

    table: CellTable
    reader: CellReader
    columns_P: NDArray[np.int64]


class CellReader(Protocol):
    """How a network reads the cells of one panel."""

    @property
    def width(self) -> int:
        """What one cell costs, in the unit of `train.micro_batch_tokens`."""
        ...

    def inputs(self, counts: Any) -> dict[str, Tensor]:
        """The network's arguments for a sparse table of counts, shape (B, G)."""
        ...


class CellTask(ValueTask[Any]):
    """RNA in, proteins out, for one network and one panel of proteins; tables may differ in their genes.

    Attributes:
        panel: The genes that the network was made ready for, and the proteins that it predicts.
        names: The proteins.
        transform: From protein counts to targets.
    """

    kind = "cells"
    unit = "value"

    def __init__(
        self, section: CellsTask, panel: Panel, make_reader: Callable[[Panel], CellReader], transform: Transform
    ) -> None:
        """Bind the recipe's task to a panel and to the network's way of reading one."""
        self.section, self.panel, self.names, self.transform = section, panel, panel.proteins, transform
        self._make_reader = make_reader
        self._bound: dict[int, _Bound] = {}

    def example(self, row: Mapping[str, Any]) -> Any:
        """Cells come from tables, never from rows of columns."""
        raise ValueError(f"no cell, but a row with the columns {', '.join(row)}")

    def batch(self, contents: Sequence[Any]) -> tuple[Mapping[str, Tensor], Tensor]:
        """The arguments and targets of cells of one table."""
        table, rows = _table_and_rows(contents)
        return self.bound(table).reader.inputs(table.rna(rows)), self.targets_of(table, rows)

    def collate(self, examples: Sequence[Any]) -> Batch:
        """The arguments and targets in one batch."""
        inputs, target_BP = self.batch(examples)
        return {**inputs, TARGET: target_BP}

    def bound(self, table: CellTable) -> _Bound:
        """How the network reads this table, and where the table has the task's proteins."""
        found = self._bound.get(id(table))
        if found is None:
            here = table.panel
            panel = Panel(here.genes, self.names, here.gene_ids, self.panel.protein_ids)
            at = {name: column for column, name in enumerate(here.proteins)}
            columns_P = np.array([at.get(name, -1) for name in self.names])
            found = self._bound[id(table)] = _Bound(table, self._make_reader(panel), columns_P)
        return found

    def forget(self, table: CellTable) -> None:
        """Let go of a table that will not be asked for again."""
        self._bound.pop(id(table), None)

    def ids(self) -> list[frozenset[int]]:
        """The published ids that the tables met so far use, where the network reads by id."""
        return [getattr(bound.reader, "ids", frozenset()) for bound in self._bound.values()]

    def targets_of(self, table: CellTable, rows: NDArray[np.int64]) -> Tensor:
        """The targets of some cells, NaN for a protein that the table does not have; shape (B, P)."""
        columns_P = self.bound(table).columns_P
        if not table.measured or (columns_P < 0).all():
            return torch.full((len(rows), len(self.names)), float("nan"))
        counts_BP = table.proteins(rows)[:, columns_P]
        counts_BP[:, columns_P < 0] = np.nan
        return torch.from_numpy(self.transform.apply(counts_BP))

    def encode(self, records: Sequence[Record], *, training: bool) -> Cells:  # noqa: ARG002
        """The cells themselves: nothing is read before a batch is cut.

        Raises:
            DataError: If they are no cells of one table.
            ModelError: If the network cannot read the table.
        """
        found = records if isinstance(records, Cells) else _of_one_table(records)
        self.bound(found.table)
        return found

    def size(self, example: Any) -> int:
        """What the network pays for a cell."""
        return self.bound(example.table).reader.width

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Squared or Huber error over measured values, with the terms that the recipe adds for each cell."""
        target_BP, section = batch[TARGET], self.section
        found_BP, wanted_BP = predicted(model, batch), torch.nan_to_num(target_BP)
        if section.loss == "huber":
            error_BP = F.huber_loss(found_BP, wanted_BP, reduction="none", delta=section.huber_delta)
        else:
            error_BP = (found_BP - wanted_BP).square()
        loss = over_measured(error_BP, target_BP)
        keep_BP = ~target_BP.isnan()
        extra_B = torch.zeros_like(loss.total_B)
        if section.correlation:
            extra_B = extra_B + section.correlation * (1 - likeness(found_BP, wanted_BP, keep_BP, centred=True))
        if section.cosine:
            extra_B = extra_B + section.cosine * (1 - likeness(found_BP, wanted_BP, keep_BP, centred=False))
        # The term of a cell counts as often as it has values, so that sums over cells divide exactly.
        return Loss(loss.total_B + extra_B * loss.weight_B, loss.weight_B)

    def features(self, contents: Sequence[Any]) -> Any:
        """Log-normalised RNA of the genes that the task was bound to, shape (B, G), sparse."""
        table, rows = _table_and_rows(contents)
        return log_normalise(table.rna(rows))

    def groups(self, records: Sequence[Record]) -> Mapping[str, NDArray[np.str_]]:
        """Donor, cell type and their like of each cell."""
        cells = self.encode(records, training=False)
        return {name: values[cells.rows] for name, values in cells.table.obs.items()}

    def calibrate(self, module: nn.Module, examples: Sequence[Any], seed: int) -> tuple[str, ...]:
        """Fit in closed form what the network can so fit; its output layer too, unless the recipe forbids it."""
        fit = getattr(module, "fit", None)
        if not callable(fit):
            return ()
        chance = np.random.default_rng(derive(seed, "cells"))
        chosen = np.sort(chance.permutation(len(examples))[:MOST_CALIBRATED])
        batch = self.collate([examples[int(i)] for i in chosen])
        inputs = {name: value for name, value in batch.items() if name != TARGET}
        # The closed form is small and in double precision, which not every device has.
        device = next(module.parameters()).device
        module.cpu()
        try:
            return tuple(fit(inputs, batch[TARGET], seed=seed, head=self.section.calibrate))
        finally:
            module.to(device)

    def show(self, example: Cell) -> Shown:
        """The most expressed genes, and the proteins as what is learnt."""
        rows = np.array([example.row])
        counts_G = example.table.rna(rows).toarray()[0]
        top = [g for g in np.argsort(-counts_G, kind="stable")[:8] if counts_G[g] > 0]
        genes = ", ".join(f"{example.table.panel.genes[g]} {counts_G[g]:g}" for g in top)
        target_P = self.targets_of(example.table, rows)[0].tolist()
        proteins = first_few([f"{name} {value:.2f}" for name, value in zip(self.names, target_P, strict=True)], 8)
        found = int((counts_G > 0).sum())
        return Shown(example.where, ((f"{found} of {len(counts_G)} genes: {genes} ... -> ", False), (proteins, True)))


def _table_and_rows(cells: Sequence[Any]) -> tuple[CellTable, NDArray[np.int64]]:
    return cells[0].table, np.fromiter((cell.row for cell in cells), np.int64, len(cells))


def _of_one_table(records: Sequence[Record]) -> Cells:
    cells = [record for record in records if isinstance(record, Cell)]
    if not cells or len(cells) < len(records) or len({id(cell.table) for cell in cells}) > 1:
        raise DataError("these are no cells of one table", where="data", hint="name an h5mu or h5ad file")
    return Cells(cells[0].table, np.array([cell.row for cell in cells]))


def likeness(found_BP: Tensor, wanted_BP: Tensor, keep_BP: Tensor, *, centred: bool) -> Tensor:
    """Cosine similarity of each cell's measured proteins, or with `centred` their Pearson correlation; shape (B,).

    A cell whose measured proteins do not differ has none; it scores 1, so that it teaches nothing.
    """
    count_B1 = keep_BP.sum(dim=1, keepdim=True).clamp(min=1)
    found_BP, wanted_BP = found_BP * keep_BP, wanted_BP * keep_BP
    if centred:
        found_BP = (found_BP - found_BP.sum(dim=1, keepdim=True) / count_B1) * keep_BP
        wanted_BP = (wanted_BP - wanted_BP.sum(dim=1, keepdim=True) / count_B1) * keep_BP
    has_B = wanted_BP.norm(dim=1) > SPREAD_FLOOR
    like_B = F.cosine_similarity(found_BP, wanted_BP, dim=1, eps=SPREAD_FLOOR)
    return torch.where(has_B, like_B, torch.ones_like(like_B))
