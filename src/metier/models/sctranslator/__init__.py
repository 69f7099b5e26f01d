"""scTranslator, a network from the RNA of a cell to the abundance of its proteins, as a clean family.

Source: its published code and checkpoints (Liu et al. 2023, bioRxiv 2023.07.04.547619). A token is a gene or a protein:
its value and the embedding of its id. An encoder reads the genes, a bridge maps the axis of genes to the axis of
proteins, a decoder reads the proteins. Attention is FAVOR+ with positive random features.
"""

from metier.models.sctranslator.favor import EPSILON, CellByCell, Favor, orthogonal_features
from metier.models.sctranslator.files import (
    CONFIG,
    WEIGHTS,
    export_original,
    from_original,
    load,
    read,
    save,
    to_original,
)
from metier.models.sctranslator.network import Attention, Block, Bridge, Rows, ScTranslator, Stack
from metier.models.sctranslator.panels import CellReader, Longer
from metier.models.sctranslator.shape import Shape, check_panels

__all__ = [
    "CONFIG",
    "EPSILON",
    "WEIGHTS",
    "Attention",
    "Block",
    "Bridge",
    "CellByCell",
    "CellReader",
    "Favor",
    "Longer",
    "Rows",
    "ScTranslator",
    "Shape",
    "Stack",
    "check_panels",
    "export_original",
    "from_original",
    "load",
    "orthogonal_features",
    "read",
    "save",
    "to_original",
]
