"""A GGUF file's header, read with every length checked against the file before it is believed.

Source: the layout in github.com/ggml-org/ggml, docs/gguf.md (version 3).
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import ModelError

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 20
MOST_DIMENSIONS = 4
MOST_NESTING = 4
MOST_VALUES = 4_000_000
"""Metadata and tensors together; a value of one byte takes eight or more once read; a vocabulary has a million."""
FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
"""struct's letter for each value type, by its number; strings (8) and arrays (9) have none."""
STRING, ARRAY = 8, 9
SMALLEST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
SMALLEST_PAIR_BYTES = 8 + 4 + 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies.

    Attributes:
        name: GGUF's name, such as "blk.0.attn_q.weight".
        shape: Sizes in torch's order (rows first).
        kind: Number of its quantisation.
        start: First byte, from the start of the file.
        bytes: Length.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in the file but the weights."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]


def read(path: Path, *, extra: str = "gguf") -> Header:
    """Read and check the header of a GGUF file.

    Args:
        path: The file.
        extra: Extra of this package that brings `gguf`, for the hint.

    Raises:
        ModelError: If the package gguf is missing, or anything in the header contradicts the file's size.
    """
    require_package(path, extra)
    with path.open("rb") as file:
        if path.stat().st_size < len(MAGIC) + 20:
            raise _broken(path, 0, "the file is too short to be a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(path, view).header()


def require_package(path: Path, extra: str) -> None:
    """Raise ModelError, saying what to install, where the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "reading a GGUF file needs the package gguf", where=str(path), hint=f"pip install 'metier[{extra}]'"
        )


def dequantise(header: Header, tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32, in torch's order of axes."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.memmap(header.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.bytes,))
    kind = GGMLQuantizationType(tensor.kind)
    if kind == GGMLQuantizationType.F32:
        return np.array(raw.view(np.float32).reshape(tensor.shape))
    if kind == GGMLQuantizationType.F16:
        return raw.view(np.float16).reshape(tensor.shape).astype(np.float32)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    values: np.ndarray = dequantize(rows, kind)
    return values.astype(np.float32, copy=False)


class _Reader:
    """A cursor over the file that refuses to read past its end."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.at, self.size, self.left = path, view, 0, len(view), MOST_VALUES

    def broken(self, what: str) -> ModelError:
        """The fault of what was read last."""
        return _broken(self.path, self.at, what)

    def header(self) -> Header:
        """Magic, version, counts, metadata, tensors."""
        if self.view[:4] != MAGIC:
            raise self.broken(f"the file starts with {self.view[:4]!r} instead of {MAGIC!r}")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise self.broken(f"GGUF version {version} is not one of {', '.join(map(str, VERSIONS))}")
        tensors, pairs = self.number("Q"), self.number("Q")
        self.count(tensors, SMALLEST_TENSOR_BYTES, "tensors")
        self.count(pairs, SMALLEST_PAIR_BYTES, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text()
            if key in metadata:
                raise self.broken(f"the entry {key[:80]!r} stands there twice")
            metadata[key] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        return Header(self.path, metadata, self.placed(found, metadata))

    def number(self, letter: str) -> Any:
        """One number of struct's type `letter`, little-endian."""
        length = struct.calcsize(letter)
        if self.at + length > self.size:
            raise self.broken("the header ends in the middle")
        (value,) = struct.unpack_from(f"<{letter}", self.view, self.at)
        self.at += length
        return value

    def fits(self, count: int, each_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count * each_bytes > self.size - self.at:
            raise self.broken(f"it claims {count:,} {what}, more than its {self.size:,} bytes can hold")

    def count(self, count: int, each_bytes: int, what: str) -> None:
        """As `fits`, for what takes memory once it is read."""
        self.fits(count, each_bytes, what)
        self.left -= count
        if self.left < 0:
            raise self.broken(f"its header holds more than {MOST_VALUES:,} values")

    def text(self) -> str:
        """A string: its length in bytes, then UTF-8."""
        length = self.number("Q")
        self.fits(length, 1, "bytes of text")
        raw = self.view[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a name in the header is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value of the numbered type."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(depth)
        if kind >= len(FORMATS):
            raise self.broken(f"a metadata entry has the unknown type {kind}")
        return self.number(str(FORMATS[kind]))

    def array(self, depth: int) -> list[Any]:
        """A list: type, count, values."""
        if depth >= MOST_NESTING:
            raise self.broken("lists are nested too deeply")
        kind, count = self.number("I"), self.number("Q")
        letter = FORMATS[kind] if kind < len(FORMATS) else None
        if letter is None:
            self.count(count, 8 if kind == STRING else 12, "list entries")
            return [self.value(kind, depth + 1) for _ in range(count)]
        self.count(count, struct.calcsize(letter), "list entries")
        values = list(struct.unpack_from(f"<{count}{letter}", self.view, self.at))
        self.at += count * struct.calcsize(letter)
        return values

    def tensor(self) -> Tensor:
        """One tensor's description; `start` still counts from the data section."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.broken(f"tensor {name!r} claims {dimensions} axes")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, start = self.number("I"), self.number("Q")
        return Tensor(name, shape, kind, start, self.length(name, shape, kind))

    def length(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """Bytes of a tensor of this shape and quantisation."""
        from gguf.constants import GGML_QUANT_SIZES

        if kind not in GGML_QUANT_SIZES:
            raise self.broken(f"tensor {name!r} has the unknown quantisation {kind}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.broken(f"rows of tensor {name!r} are not whole blocks of {block}")
        return int(math.prod(shape) // block * block_bytes)

    def placed(self, tensors: list[Tensor], metadata: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors with `start` counted from the start of the file, each one inside it."""
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= LARGEST_ALIGNMENT:
            raise self.broken(f"its alignment is {alignment!r}")
        data = -(-self.at // alignment) * alignment
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)):
            if data + tensor.start + tensor.bytes > self.size:
                what = f"tensor {tensor.name[:80]!r} lies outside the file's {self.size:,} bytes"
                raise _broken(self.path, data + tensor.start, what)
            if tensor.start < end and tensor.bytes:
                what = f"the tensors {before[:80]!r} and {tensor.name[:80]!r} overlap"
                raise _broken(self.path, data + tensor.start, what)
            end, before = tensor.start + tensor.bytes, tensor.name
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self.broken("two tensors have one name")
        return tuple(Tensor(t.name, t.shape, t.kind, data + t.start, t.bytes) for t in tensors)


def _broken(path: Path, at: int, what: str) -> ModelError:
    hint = "the file is damaged or is no GGUF file; get it again"
    return ModelError(what, where=f"{path}: byte {at:,}", hint=hint)
