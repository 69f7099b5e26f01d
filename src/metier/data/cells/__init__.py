"""Cells in, tables out: RNA and proteins joined by name and checked whole, split by donor, predictions written back."""

from metier.data.cells.genes import check_ids, overlap, read_id_table
from metier.data.cells.matrix import Rows
from metier.data.cells.parts import Words
from metier.data.cells.predictions import PREDICTED, write_predictions
from metier.data.cells.splits import rank_rows, split_cells
from metier.data.cells.table import CellTable, read_cells
from metier.data.cells.transforms import Transform, TransformName, log_normalise

__all__ = [
    "PREDICTED",
    "CellTable",
    "Rows",
    "Transform",
    "TransformName",
    "Words",
    "check_ids",
    "log_normalise",
    "overlap",
    "rank_rows",
    "read_cells",
    "read_id_table",
    "split_cells",
    "write_predictions",
]
