"""Networks that are no transformer of text: those for cells, and a user's own; one door in, one door out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metier.core import ModelError, RecipeError
from metier.models import cellnet, own, sctranslator
from metier.models.cellnet import CellNet, TransformName
from metier.models.identity import fingerprint
from metier.models.model import Lineage, Model
from metier.models.sctranslator import ScTranslator

if TYPE_CHECKING:
    from metier.core.panel import Panel
    from metier.recipe import ModelSection

NEW_CELLS = "new:cells"
"""What `model.base` says for a network for cells that begins from nothing."""
CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def load_own(section: ModelSection, seed: int, *, strict: bool = False) -> Model:
    """The network that `model.use` names; with `strict` it must hold just what the weights hold.

    Raises:
        RecipeError: If the class cannot be imported or called.
        ModelError: If the weights do not fit.
    """
    if section.use is None:
        hint = "name it with model.use=package.module:Class"
        raise RecipeError("a task of your own needs a network of your own", where="model.use", hint=hint)
    module, new = own.build(section, seed, strict=strict)
    _refuse_not_finite(module, section.base)
    return Model(module, None, "values", _lineage(section, module, new), new)


def load_cells(section: ModelSection, panel: Panel, *, seed: int, redraw: bool = True) -> Model:
    """A network for cells, made ready for a panel: rows for genes and proteins that it does not know are added.

    Args:
        section: The model.
        panel: The genes that are read and the proteins that are predicted.
        seed: Seed of what is new.
        redraw: Whether scTranslator draws its random features anew in training.

    Raises:
        ModelError: If there is no such network, or it is damaged.
    """
    if section.base == NEW_CELLS:
        network = cellnet.new(panel, seed)
        names = tuple(name for name, _ in network.named_parameters())
        return Model(network, None, "values", _lineage(section, network, names), names)
    found = _read(section)
    _refuse_not_finite(found, section.base)
    lineage = _lineage(section, found, ())
    if isinstance(found, ScTranslator):
        if not redraw:
            found.redraw_interval = 0
        return Model(found, None, "values", lineage)
    network = found.extended(panel)
    known = {name for name, _ in found.named_parameters()}
    new = tuple(name for name, _ in network.named_parameters() if name not in known)
    return Model(network, None, "values", lineage, new, network.whole())


def is_blank(model: Model) -> bool:
    """Whether nothing of the network is pretrained."""
    return len(model.new) == sum(1 for _ in model.module.parameters())


def usual_transform(network: nn.Module) -> TransformName:
    """How protein counts became what the network predicts; scTranslator scales each cell, as published."""
    return network.config.transform if isinstance(network, CellNet) else "minmax"


def retarget(network: nn.Module, transform: TransformName) -> None:
    """Remember how protein counts become what the network is now taught."""
    if isinstance(network, CellNet):
        network.config = replace(network.config, transform=transform)


def known_genes(network: nn.Module) -> frozenset[str]:
    """Names of the genes that the network was trained on; empty where it knows none by name."""
    return frozenset(network.config.genes) if isinstance(network, CellNet) and network.is_trained else frozenset()


def known_proteins(network: nn.Module, panel: Panel) -> tuple[str, ...]:
    """The proteins of a panel that the network was trained to predict; scTranslator knows all that have an id."""
    if isinstance(network, CellNet):
        return network.knows(panel) if network.is_trained else ()
    return panel.proteins


def _read(section: ModelSection) -> CellNet | ScTranslator:
    """The network in a folder or file, told by its config or its tensors."""
    path = Path(section.base).expanduser()
    if path.is_file() and path.suffix in CHECKPOINTS:
        return sctranslator.read(path)
    if not path.is_dir():
        raise ModelError(
            "there is no such folder or file",
            where=f"model.base={section.base}",
            hint=f"name a folder, a checkpoint ({', '.join(CHECKPOINTS)}), or {NEW_CELLS} to begin from nothing",
        )
    if (path / "adapter").is_dir():
        hint = "name a run of method=full, or one with export.merge=true and its folder merged/"
        raise ModelError("the folder holds an adapter, not a whole network", where=str(path), hint=hint)
    try:
        kind = json.loads((path / "config.json").read_text("utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        hint = "name the folder that holds config.json and model.safetensors"
        raise ModelError(f"no network for cells: {error}", where=str(path), hint=hint) from error
    match kind:
        case "ScTranslator":
            return sctranslator.load(path)
        case "CellNet":
            return cellnet.load(path)
        case _:
            hint = "it reads CellNet and ScTranslator; for another network use model.use"
            raise ModelError(f"a {kind} is no network for cells", where=str(path), hint=hint)


def save(module: nn.Module, folder: Path, section: ModelSection | None) -> None:
    """Write the network so that `load_cells` or `load_own` reads it back.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    match module:
        case ScTranslator():
            sctranslator.save(module, folder)
        case CellNet():
            cellnet.save(module, folder)
        case _:
            own.save(module, folder, section)


def _lineage(section: ModelSection, module: nn.Module, without: tuple[str, ...]) -> Lineage:
    path = Path(section.base).expanduser()
    return Lineage(
        source=section.base,
        path=str(path.resolve()) if path.exists() else section.base,
        revision=None,
        fingerprint=fingerprint(module, without=without),
        license=None,
        reference=str(path.resolve()) if path.exists() else section.base,
    )


def _refuse_not_finite(module: nn.Module, base: str) -> None:
    state: dict[str, Any] = module.state_dict()
    bad = [
        name for name, tensor in state.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise ModelError(
            f"numbers that are not finite in {len(bad)} tensors: {', '.join(bad[:5])}",
            where=f"model.base={base}",
            hint="the file is damaged, or its training diverged; get it again or name another model",
        )
