"""A network for cells, out to a folder and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from metier.core import Fault, ModelError
from metier.core.files import write_json
from metier.models import safetensors_file
from metier.models.cellnet.network import CellNet
from metier.models.cellnet.panels import CellConfig
from metier.models.tensors import write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(network: CellNet, folder: Path) -> None:
    """Write model.safetensors and config.json.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    write_tensors(network.state_dict(), folder / WEIGHTS)
    write_json(folder / CONFIG, {"architectures": ["CellNet"], **asdict(network.config)})


def load(folder: Path) -> CellNet:
    """What `save` wrote, in evaluation mode.

    Raises:
        ModelError: If a file is missing or damaged, or tensors are missing, left over or misshapen.
    """
    try:
        network = CellNet(CellConfig.read(json.loads((folder / CONFIG).read_text("utf-8"))))
        tensors = safetensors_file.load(folder / WEIGHTS)
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"the network cannot be read: {' '.join(str(error).split())[:200]}",
            where=str(folder),
            hint=f"the folder needs {CONFIG} and {WEIGHTS} as they were saved",
        ) from error
    own = network.state_dict()
    wrong = [name for name in sorted(own.keys() | tensors.keys())
             if name not in own or name not in tensors or own[name].shape != tensors[name].shape]  # fmt: skip
    if wrong:
        raise ModelError.of([Fault(name, "is missing, left over or misshapen", "save it again") for name in wrong])
    network.load_state_dict(tensors)
    return network.eval()
