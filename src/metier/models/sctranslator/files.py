"""Checkpoints of every layout in, the original layout and our own folders out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from metier.core import Fault, ModelError
from metier.core.files import staged_file, write_json
from metier.models import pickled, safetensors_file
from metier.models.sctranslator.network import Rows, ScTranslator
from metier.models.sctranslator.shape import Shape
from metier.models.tensors import write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The original layout: (pattern there, name here); `\1` is the number of a block.
LAYOUT = (
    (r"performer\.net\.layers\.(\d+)\.0\.fn\.fast_attention\.projection_matrix", r"blocks.\1.attention.projection"),
    (r"performer\.net\.layers\.(\d+)\.0\.fn\.to_", r"blocks.\1.attention.to_"),
    (r"performer\.net\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.attention_norm."),
    (r"performer\.net\.layers\.(\d+)\.1\.fn\.fn\.w1\.", r"blocks.\1.feed_forward.expand."),
    (r"performer\.net\.layers\.(\d+)\.1\.fn\.fn\.w2\.", r"blocks.\1.feed_forward.contract."),
    (r"performer\.net\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.feed_forward_norm."),
    (r"performer\.proj_updater\.calls_since_last_redraw", "calls_since_redraw"),
    (r"pos_emb\.", "identity."),
    (r"^enc\.", "encoder."),
    (r"^dec\.", "decoder."),
    (r"^translator\.fc0\.", "bridge.inner."),
    (r"^translator\.fc1\.", "bridge.outer."),
)
TWICE = "performer.proj_updater.instance."
"""Where the original state dict names the tensors of `performer.net.` a second time."""
# What a pickled module says of itself beside its tensors: (pattern of the name, field of the shape or the only value).
SIZES = (
    (r"enc\.max_seq_len", "genes"),
    (r"dec\.max_seq_len", "proteins"),
    (r"(enc|dec)\.pos_emb\.num_embeddings", "vocabulary"),
    (r"(enc|dec)\.pos_emb\.embedding_dim", "dim"),
    (r"translator\.fc0\.out_features", "bridge"),
    (r".*\.performer\.net\..*\.fn\.heads", "heads"),
    (r".*\.performer\.net\..*\.fast_attention\.dim_heads", "head_dim"),
    (r".*\.performer\.net\..*\.fast_attention\.nb_features", "features"),
)
SETTINGS: tuple[tuple[str, object], ...] = (
    (r".*\.fast_attention\.(causal|generalized_attention|no_projection)", False),
    (r".*\.fn\.fn\.glu", False),
    (r".*\.act\.approximate", "none"),
)


def read(path: Path) -> ScTranslator:
    """The network in a file or folder of any layout, in evaluation mode.

    - a file of torch.save: a whole module, a checkpoint that holds one (`net`, `optimizer`, `epoch`), or a state dict,
      each also as (Distributed)DataParallel wraps it; nothing in it is run
    - a .safetensors file in the original layout
    - a folder that `save` wrote, or the weights in it

    Sizes come from the tensors; what a pickled module says of its sizes must agree.

    Raises:
        ModelError: If it cannot be read, is no scTranslator, or contradicts itself.
        UnsafeError: If a pickle would call anything but what torch's own files call.
    """
    if path.is_dir():
        return load(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return load(path.parent)
    if path.suffix == ".safetensors":
        return from_original(safetensors_file.load(path))
    found = pickled.read(path)
    network = from_original(found.tensors)
    _confirm(network.shape, found.scalars, path)
    # The published code keeps both on the modules; a state dict does not tell them.
    dropout = found.scalars.get("translator.dropout0.p", network.bridge.dropout.p)
    interval = found.scalars.get("enc.performer.proj_updater.feature_redraw_interval", network.redraw_interval)
    network.bridge.dropout.p, network.redraw_interval = float(dropout or 0.0), int(interval or 0)
    return network


def export_original(network: ScTranslator, path: Path) -> None:
    """Write the state dict in the original layout, tensors alone, for the published scripts.

    They build the network and then replace it by a whole pickled module; with this file the line reads, after
    `model = scPerformerEncDec(...)` with the sizes of the network,

        model.load_state_dict(torch.load(path))

    Raises:
        ModelError: If the network is restricted to some ids.
        StorageError: If the disk is full or the folder cannot be written.
    """
    state = to_original(network)
    with staged_file(path) as staged:
        try:
            torch.save(state, staged)
        except RuntimeError as error:  # What torch makes of a full disk.
            raise OSError(str(error)) from error


def from_original(tensors: Mapping[str, Tensor]) -> ScTranslator:
    """The network of a checkpoint in the original layout, in evaluation mode.

    Raises:
        ModelError: With the tensors that are missing, left over or misshapen.
    """
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    here = {_renamed(name): tensor for name, tensor in named.items() if TWICE not in name}
    network = ScTranslator(_shape_of(here))
    _fill(network, {**here, "draws": torch.tensor(0)})
    return network.eval()


def to_original(network: ScTranslator) -> dict[str, Tensor]:
    """The state dict that the published network reads, on the CPU.

    Raises:
        ModelError: If the network is restricted to some ids.
    """
    _check_whole(network)
    there = {_original(name): tensor.cpu() for name, tensor in network.state_dict().items() if name != "draws"}
    again = {name.replace("performer.net.", TWICE): t for name, t in there.items() if "performer.net." in name}
    return there | again


def save(network: ScTranslator, folder: Path) -> None:
    """Write model.safetensors and config.json.

    Raises:
        ModelError: If the network is restricted to some ids.
        StorageError: If the disk is full or the folder cannot be written.
    """
    _check_whole(network)
    write_tensors(network.state_dict(), folder / WEIGHTS)
    config = {"dropout": network.bridge.dropout.p, "redraw_interval": network.redraw_interval, "seed": network.seed}
    write_json(folder / CONFIG, {"architectures": ["ScTranslator"], **asdict(network.shape), **config})


def load(folder: Path) -> ScTranslator:
    """What `save` wrote, in evaluation mode.

    Raises:
        ModelError: If a file is missing or damaged, or tensors are missing, left over or misshapen.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        shape = Shape(**{name: int(config[name]) for name in Shape.__slots__})
        network = ScTranslator(shape, **{name: config[name] for name in ("dropout", "redraw_interval", "seed")})
        tensors = safetensors_file.load(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"the network cannot be read: {' '.join(str(error).split())[:200]}",
            where=str(folder),
            hint=f"the folder needs {CONFIG} and {WEIGHTS} as they were saved",
        ) from error
    _fill(network, tensors)
    return network.eval()


def _confirm(shape: Shape, scalars: Mapping[str, object], path: Path) -> None:
    """Refuse a module that says other sizes of itself than its tensors, or computes by other formulas."""
    wanted = [(pattern, getattr(shape, field)) for pattern, field in SIZES] + list(SETTINGS)
    faults = [
        Fault(f"{path}: {name}", f"says {found}, but the network has {value}", "get the checkpoint again")
        for pattern, value in wanted
        for name, found in scalars.items()
        if re.fullmatch(pattern, name) and found != value
    ]
    if faults:
        raise ModelError.of(faults)


def _check_whole(network: ScTranslator) -> None:
    if isinstance(network.encoder.identity, Rows):
        raise ModelError(
            "the network holds only the rows of its embeddings that are in use",
            where="model",
            hint="write it after network.merged_into(original)",
        )


def _renamed(name: str) -> str:
    for there, here in LAYOUT:
        name = re.sub(there, here, name)
    return name


def _original(name: str) -> str:
    for there, here in LAYOUT:
        # Each rule backwards: the name here becomes the pattern, the pattern there the name.
        pattern = re.escape(here).replace(re.escape(r"\1"), r"(\d+)")
        start = "^" if there.startswith("^") else r"(?<![\w])"
        name = re.sub(start + pattern, there.removeprefix("^").replace(r"(\d+)", r"\1").replace(r"\.", "."), name)
    return name


def _shape_of(tensors: Mapping[str, Tensor]) -> Shape:
    try:
        features, head_dim = tensors["encoder.blocks.0.attention.projection"].shape
        bridge, genes = tensors["bridge.inner.weight"].shape
        vocabulary, dim = tensors["encoder.identity.weight"].shape
        return Shape(
            dim=dim,
            genes=genes,
            proteins=tensors["bridge.outer.weight"].shape[0],
            bridge=bridge,
            vocabulary=vocabulary,
            heads=tensors["encoder.blocks.0.attention.to_q.weight"].shape[0] // head_dim,
            head_dim=head_dim,
            features=features,
            encoder_blocks=_count(tensors, "encoder"),
            decoder_blocks=_count(tensors, "decoder"),
        )
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"this is no scTranslator: {error} is missing or misshapen",
            where="model",
            hint="it needs an encoder, a bridge and a decoder as the published checkpoints have them",
        ) from error


def _count(tensors: Mapping[str, Tensor], stack: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{stack}.blocks.")})


def _fill(network: ScTranslator, tensors: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    faults = [Fault(name, "is missing", "get the checkpoint again") for name in sorted(own.keys() - tensors.keys())]
    faults += [Fault(name, "is no part of the network", "remove it") for name in sorted(tensors.keys() - own.keys())]
    faults += [
        Fault(
            name, f"has the shape {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}", "check its origin"
        )
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if faults:
        raise ModelError.of(faults)
    network.load_state_dict(dict(tensors))
