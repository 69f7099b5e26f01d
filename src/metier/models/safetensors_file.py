"""A safetensors file's header, read with every claim checked against the file before a library maps it.

Source: the layout in github.com/huggingface/safetensors, README.md, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from metier.core import ModelError

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of an element. Source: enum Dtype in safetensors/src/tensor.rs, 0.8."""
LARGEST_HEADER = 16 << 20
"""Bytes of JSON, which takes ten times as much once it is read; a hundred thousand tensors take about ten million."""
MOST_BRACKETS = 600_000
"""Lists and objects in it; three describe a tensor."""
MOST_DIMENSIONS = 64
LARGEST_SIZE = 1 << 48
FIELDS = {"dtype", "shape", "data_offsets"}
INDEX = "model.safetensors.index.json"
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        name: Its name in the state dict.
        dtype: Its type, as the format calls it ("BF16").
        shape: Its sizes.
        start: First byte, from the start of the file.
        bytes: Length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in the file but the numbers."""

    path: Path
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]


def load(path: Path) -> dict[str, TorchTensor]:
    """The tensors of a file, once its header is found to be sound.

    Raises:
        ModelError: If the file is missing or damaged.
    """
    from safetensors.torch import load_file

    read(path)
    try:
        found: dict[str, TorchTensor] = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _broken(path, 0, f"the file cannot be read: {' '.join(str(error).split())[:200]}") from error
    return found


def read(path: Path) -> Header:
    """Read and check the header.

    Raises:
        ModelError: If the file is missing, or anything in the header contradicts itself or the file's size; with the
            byte at which the faulty part begins.
    """
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path), hint="name a .safetensors file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _header_bytes(path, file.read(LENGTH.size), size)
            text = file.read(raw)
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror}", where=str(path), hint="check its rights") from error
    entries = _parsed(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, LENGTH.size, "its metadata are no texts")
    tensors = [_tensor(path, name, entry, LENGTH.size + raw) for name, entry in entries.items()]
    return Header(path, metadata, _side_by_side(path, tensors, LENGTH.size + raw, size))


def check_folder(folder: Path) -> None:
    """Check every safetensors file of a model's folder, and the index of one that is cut in shards.

    Raises:
        ModelError: If a file is damaged or missing, or the index contradicts the shards.
    """
    if (folder / INDEX).is_file():
        shards(folder / INDEX)
    else:
        for path in sorted(folder.glob("*.safetensors")):
            read(path)


def shards(index: Path) -> tuple[Header, ...]:
    """The headers of all shards that an index names; together they hold what it says, each tensor once.

    Raises:
        ModelError: If the index leaves its folder, a shard is missing or damaged, or they disagree.
    """
    told = _weight_map(index)
    headers = []
    for name in sorted(set(told.values())):
        if Path(name).name != name or name in {"", ".", ".."} or "\\" in name:
            raise _index_fault(index, f"it names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise _index_fault(index, f"the shard {name} is missing")
        headers.append(read(index.parent / name))
    held: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in held:
                what = f"the tensor {tensor.name!r} is in {held[tensor.name]} and in {header.path.name}"
                raise _index_fault(index, what)
            held[tensor.name] = header.path.name
    if wrong := sorted(name for name in told.keys() | held.keys() if told.get(name) != held.get(name)):
        there, said = held.get(wrong[0], "no shard"), told.get(wrong[0], "nowhere")
        raise _index_fault(index, f"{len(wrong)} tensors are not where it says: {wrong[0]!r} is in {there}, not {said}")
    return tuple(headers)


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > LARGEST_HEADER:
        raise _index_fault(index, f"it is larger than {LARGEST_HEADER >> 20} MiB")
    try:
        told = _json(index.read_bytes())["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _index_fault(index, f"it cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(told, dict) or not told or not all(isinstance(name, str) for name in told.values()):
        raise _index_fault(index, "its weight_map does not name a file for each tensor")
    return told


def _header_bytes(path: Path, length: bytes, size: int) -> int:
    if len(length) < LENGTH.size:
        raise _broken(path, 0, f"its {size} bytes are too few for a safetensors file")
    (claimed,) = LENGTH.unpack(length)
    if claimed > size - LENGTH.size:
        raise _broken(path, 0, f"its header claims {claimed:,} bytes, the file has {size:,}")
    if claimed > LARGEST_HEADER:
        raise _broken(path, 0, f"its header claims {claimed:,} bytes, more than {LARGEST_HEADER:,}")
    return int(claimed)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = _json(text)
    except (ValueError, RecursionError) as error:
        at = LENGTH.size + getattr(error, "pos", getattr(error, "start", 0))
        raise _broken(path, at, f"its header is not valid JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(entries, dict):
        raise _broken(path, LENGTH.size, "its header is no JSON object")
    return entries


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands there twice")
        found[name] = value
    return found


def _json(text: bytes) -> Any:
    if text.count(b"[") + text.count(b"{") > MOST_BRACKETS:
        raise ValueError(f"it holds more than {MOST_BRACKETS:,} lists and objects")
    return json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    """One entry, each value of the type it must have; `start` counts from the start of the file."""
    if not isinstance(entry, dict) or set(entry) != FIELDS:
        raise _broken(path, LENGTH.size, f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _broken(path, LENGTH.size, f"tensor {name[:80]!r} has the unknown type {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS or not _are_counts(place) or len(place) != 2:
        raise _broken(path, LENGTH.size, f"tensor {name[:80]!r} has a shape or a place that is none")
    start, end = place
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - start) * 8:
        what = f"tensor {name[:80]!r} claims {end - start:,} bytes; {dtype} of shape {shape} takes {bits // 8:,}"
        raise _broken(path, data + start, what)
    return Tensor(name, dtype, tuple(shape), data + start, end - start)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < LARGEST_SIZE for value in values)


def _side_by_side(path: Path, tensors: list[Tensor], data: int, size: int) -> tuple[Tensor, ...]:
    """The tensors by their place: each begins where the one before ends, and the last ends with the file."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes))
    at = data
    for tensor in ordered:
        if tensor.start + tensor.bytes > size:
            raise _broken(path, tensor.start, f"tensor {tensor.name[:80]!r} lies outside the file's {size:,} bytes")
        if tensor.start != at:
            told = "overlaps the one before it" if tensor.start < at else f"leaves a gap of {tensor.start - at:,} bytes"
            raise _broken(path, tensor.start, f"tensor {tensor.name[:80]!r} {told}")
        at += tensor.bytes
    if at != size:
        raise _broken(path, at, f"{size - at:,} bytes behind the last tensor belong to none")
    return tuple(ordered)


def _broken(path: Path, at: int, what: str) -> ModelError:
    return ModelError(what, where=f"{path}: byte {at:,}", hint="the file is damaged; get it again")


def _index_fault(index: Path, what: str) -> ModelError:
    return ModelError(what, where=str(index), hint="get the index and all its shards from one place")
