"""A small network from the RNA of a cell to its proteins: it reads expressed genes only, and tunes to a panel at once.

A cell is a bag of the genes that it expresses. Values are standardised gene by gene, exactly, though zeros are never
touched: what every zero would add is one vector for the panel. In pretraining each batch sees a random part of the
genes, so that the state of a cell means the same on other panels. On new cells `calibrate` solves the head in closed
form, and all that it finds lies in ordinary parameters, from which full tuning or LoRA goes on: a slope and a shift for
each protein that the network knows, and a kernel over the state and the leading components of the new cells for what
remains. Far from those cells the kernel fades and the pretrained answer stays.
"""

from metier.models.cellnet.calibration import calibrate
from metier.models.cellnet.files import load, save
from metier.models.cellnet.network import CellNet, new
from metier.models.cellnet.panels import CellConfig, CellReader, TransformName, gene_key, origins, protein_keys

__all__ = [
    "CellConfig",
    "CellNet",
    "CellReader",
    "TransformName",
    "calibrate",
    "gene_key",
    "load",
    "new",
    "origins",
    "protein_keys",
    "save",
]
