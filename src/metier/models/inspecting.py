"""What a checkpoint of any kind holds, found out from headers alone: nothing is loaded, and nothing in it is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metier.core import ModelError
from metier.core.files import size_bytes
from metier.models import gguf_file, pickled, safetensors_file
from metier.models.source import code_digest

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = 16 << 20
TOLD = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""Keys of config.json that are worth a line."""
TOLD_OF_ADAPTERS = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
TOLD_OF_GGUF = ("general.architecture", "general.name", "general.license")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its name, type, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found.

    Attributes:
        path: What was inspected.
        format: Kind of file or folder, such as "safetensors in 3 shards".
        bytes: Size on disk.
        architecture: Name of the network's class or family, where something says it.
        facts: What else is said of it, by name.
        tensors: Every tensor, as it lies in the file.
        classes: Class of each module by its path, of a network that was pickled whole.
        scalars: Plain attributes of those modules.
        calls: What reading it by `torch.load` or transformers would have run, in short.
        trains: Whether metier can train it, and if not, why not.
        recipe: Lines of a recipe's `model:` with which it would.
    """

    path: str
    format: str
    bytes: int
    architecture: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    trains: str = ""
    recipe: tuple[str, ...] = ()


def inspect(path: Path) -> Inspected:
    """What a file or folder holds.

    Raises:
        ModelError: If there is none, it is damaged, or it is no checkpoint.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ModelError("there is no such file or folder", where=str(path), hint="name a checkpoint")
    found = _reader_of(path)(path)
    if not found.recipe and not found.trains:
        return _own_network(found)
    return found


def _reader_of(path: Path) -> Callable[[Path], Inspected]:
    """By the first bytes where they say it, else by the name."""
    with path.open("rb") as file:
        begins = file.read(9)
    if begins.startswith(b"GGUF"):
        return _gguf
    if begins.startswith(b"\x89HDF"):
        return _by_name("HDF5", "name it as data.train of a task on cells")
    if path.suffix == ".npz" or begins.startswith(b"\x93NUMPY"):
        return _by_name("numpy", "arrays are data, no network")
    if path.name.endswith(".safetensors.index.json"):
        return _shards
    if path.suffix == ".safetensors" or begins[8:] == b"{":
        return _safetensors
    if path.suffix in TORCH_FILES or begins.startswith((b"PK\x03\x04", b"\x80")):
        return _torch
    raise ModelError(
        "this is no checkpoint",
        where=str(path),
        hint=f"it reads safetensors, GGUF, files of torch.save ({', '.join(TORCH_FILES)}), and folders of models",
    )


def _by_name(what: str, hint: str) -> Callable[[Path], Inspected]:
    return lambda path: Inspected(str(path), f"{what} ({path.suffix or 'no suffix'})", size_bytes(path), trains=hint)


def _safetensors(path: Path) -> Inspected:
    header = safetensors_file.read(path)
    return Inspected(str(path), "safetensors", size_bytes(path), facts=header.metadata, tensors=_laid([header]))


def _shards(path: Path) -> Inspected:
    headers = safetensors_file.shards(path)
    total = sum(size_bytes(header.path) for header in headers)
    return Inspected(str(path), f"safetensors in {len(headers)} shards", total, tensors=_laid(headers))


def _laid(headers: Iterable[safetensors_file.Header]) -> tuple[Tensor, ...]:
    return tuple(Tensor(t.name, t.dtype, t.shape, t.bytes) for header in headers for t in header.tensors)


def _gguf(path: Path) -> Inspected:
    from gguf import GGMLQuantizationType

    header = gguf_file.read(path)
    facts = {key: str(header.metadata[key])[:200] for key in TOLD_OF_GGUF if key in header.metadata}
    tensors = tuple(Tensor(t.name, GGMLQuantizationType(t.kind).name, t.shape, t.bytes) for t in header.tensors)
    family = facts.get("general.architecture")
    found = Inspected(str(path), "GGUF", size_bytes(path), family, facts, tensors)
    return replace(found, trains="yes, if transformers reads its family", recipe=(f"base: {path}",))


def _torch(path: Path) -> Inspected:
    looked = pickled.look(path)
    tensors = tuple(
        Tensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes)
        for name, t in looked.tensors.items()
    )
    facts = {f"beside it: {name}": _short(value) for name, value in looked.others.items()}
    form = f"torch.save ({'zip' if _is_zip(path) else 'legacy'}): {looked.kind}"
    found = Inspected(str(path), form, size_bytes(path), looked.classes.get(""), facts, tensors)
    found = replace(found, classes=looked.classes, scalars=looked.scalars, calls=looked.calls)
    if looked.calls:
        why = "no: reading it would run what it calls; get the weights as safetensors from somebody you trust"
        return replace(found, trains=why)
    return found


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _short(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return str(value)[:80] if isinstance(value, bool | int | float | str) or value is None else type(value).__name__


def _folder(path: Path) -> Inspected:
    for is_there, read in (
        ("metier.json", _run),
        ("job.resolved.yaml", _run),
        ("adapter_config.json", _adapter),
        ("config.json", _hub_folder),
    ):
        if (path / is_there).is_file():
            return read(path)
    raise ModelError(
        "the folder holds no config.json, no adapter_config.json and no run of metier",
        where=str(path),
        hint="name a model's folder, or the file itself",
    )


def _run(path: Path) -> Inspected:
    """A run folder: the adapter in it, or the whole network, and what the run says of itself."""
    inside = _adapter(path / "adapter") if (path / "adapter").is_dir() else None
    inside = inside or (_hub_folder(path) if (path / "config.json").is_file() else Inspected(str(path), "", 0))
    finished = (path / "metier.json").is_file()
    facts = _json(path / "metier.json") if finished else {}
    names: tuple[str, ...] = ("task", "head", "base", "base_fingerprint")
    told = {name: str(facts[name])[:80] for name in names if name in facts}
    done = "a finished run" if finished else "an unfinished run"
    trains = "it is tuned: use it with metier predict or chat" if finished else "metier runs says how it goes on"
    kind = f"metier run folder ({done})" + (f", {inside.format}" if inside.format else "")
    return replace(inside, path=str(path), format=kind, bytes=size_bytes(path), facts={**told, **inside.facts},
                   trains=trains, recipe=())  # fmt: skip


def _adapter(path: Path) -> Inspected:
    config = _json(path / "adapter_config.json")
    inside = _weights(path, ("adapter_model.safetensors", "adapter_model.bin"))
    facts = {key: str(config[key]) for key in TOLD_OF_ADAPTERS if key in config}
    base = config.get("base_model_name_or_path")
    return replace(inside, path=str(path), format="peft adapter", bytes=size_bytes(path), facts=facts,
                   architecture=str(config.get("peft_type", "adapter")),
                   trains="an adapter is no base: tune the model that it was trained on",
                   recipe=(f"base: {base}",) if isinstance(base, str) else ())  # fmt: skip


def _hub_folder(path: Path) -> Inspected:
    config = _json(path / "config.json")
    index = path / safetensors_file.INDEX
    inside = _shards(index) if index.is_file() else _weights(path, ("model.safetensors", "pytorch_model.bin"))
    named = config.get("architectures")
    facts = {key: str(config[key]) for key in TOLD if key in config}
    family = str(named[0]) if isinstance(named, list) and named else None
    form = f"model folder, {inside.format or 'no weights'}"
    found = replace(inside, path=str(path), format=form, bytes=size_bytes(path), architecture=family, facts=facts)
    code = config.get("auto_map")
    if code:
        files = sorted({str(value).rsplit(".", 1)[0] + ".py" for value in _flat(code)})
        pin = f"trust_code: {code_digest(path)}"
        return replace(found, calls=(*found.calls, *files), trains="only if its own code may run; read it first",
                       recipe=(f"base: {path}", pin))  # fmt: skip
    if not inside.tensors:
        return replace(found, trains=inside.trains or "no: the folder holds no weights")
    return replace(found, trains="yes", recipe=(f"base: {path}",))


def _flat(code: Any) -> list[Any]:
    entries = code.values() if isinstance(code, dict) else [code]
    return [name for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]


def _weights(folder: Path, names: Iterable[str]) -> Inspected:
    """The first of the files that is there."""
    for name in names:
        if (folder / name).is_file():
            return _safetensors(folder / name) if name.endswith(".safetensors") else _torch(folder / name)
    return Inspected(str(folder), "", size_bytes(folder))


def _own_network(found: Inspected) -> Inspected:
    """Weights alone: they fit whatever class they were saved from."""
    place, _, name = (found.architecture or "package.module.Class").rpartition(".")
    if name == "scPerformerEncDec":
        return replace(found, trains="yes, as a network for cells", recipe=(f"base: {found.path}",))
    told = (f"use: {place}:{name}", f"base: {found.path}")
    return replace(found, trains="yes, with the class that the weights belong to", recipe=told)


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_JSON:
        raise ModelError(f"it is larger than {LARGEST_JSON >> 20} MiB", where=str(path), hint="get it again")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"not valid JSON: {' '.join(str(error).split())[:200]}", where=str(path), hint="get it again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError("it is no JSON object", where=str(path), hint="get it again")
    return found
