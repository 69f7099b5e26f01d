"""The two formats of `torch.save`, read without running what they say: tensors get their meaning, calls get none."""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier.models import pickle_machine
from metier.models.pickle_machine import Calls, Name, PickleDamagedError, Stranger, Thing, items_of

STORAGES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}
"""Names that torch gives its storages in files; an untyped one holds bytes, and its tensors say of which type."""
NEWER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
TYPES: Mapping[str, torch.dtype] = {
    str(dtype): dtype for dtype in (*STORAGES.values(), *(getattr(torch, name) for name in NEWER))
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of the format before PyTorch 1.6. Source: torch/serialization.py."""
LARGEST_DIRECTORY = 8 << 20
"""Bytes of an archive's list of entries: over a hundred thousand, each of which takes ten times as much once read."""
MOST_DIMENSIONS = 64
ROOM = 1 << 24
"""Elements by which a tensor that repeats its storage may be larger than it."""


def value(path: Path, weights: Weights, stranger: Stranger) -> Any:
    """What the file's program describes.

    Args:
        path: The file, in either of torch's formats.
        weights: What makes the storages.
        stranger: What is done about calls that torch's own files do not make.

    Raises:
        PickleDamagedError: If the file contradicts itself, or other things that a damaged archive makes of it.
        UnsafeError: If the stranger says so.
    """
    if zipfile.is_zipfile(path):
        return _zipped(path, weights, stranger)
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise PickleDamagedError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _legacy(data, weights, stranger)


class Weights:
    """Makes storages of bytes."""

    def empty(self, dtype: torch.dtype, count: int) -> Tensor:
        """A storage that is filled later."""
        return torch.empty(count, dtype=dtype)

    def of(self, content: Callable[[], bytes], dtype: torch.dtype, count: int) -> Tensor:
        """The storage with this content."""
        found = bytearray(content())
        if len(found) != count * dtype.itemsize:
            raise PickleDamagedError(f"a storage has {len(found)} bytes instead of {count * dtype.itemsize}")
        return torch.frombuffer(found, dtype=dtype) if count else self.empty(dtype, 0)

    def fill(self, storage: Tensor, content: bytes) -> None:
        """Give a storage its content."""
        storage.copy_(torch.frombuffer(bytearray(content), dtype=storage.dtype))


class NoWeights(Weights):
    """Makes storages that have a size and no content."""

    def empty(self, dtype: torch.dtype, count: int) -> Tensor:
        """A storage without content."""
        return torch.empty(count, dtype=dtype, device="meta")

    def of(self, content: Callable[[], bytes], dtype: torch.dtype, count: int) -> Tensor:  # noqa: ARG002
        """A storage without content."""
        return self.empty(dtype, count)

    def fill(self, storage: Tensor, content: bytes) -> None:
        """Nothing: there is no content."""


class _Storages:
    """The storages of a file, each made once."""

    def __init__(self, fetch: Callable[[str, torch.dtype, int], Tensor], most_bytes: int) -> None:
        self._fetch, self._left = fetch, most_bytes
        self.found: dict[str, Tensor] = {}

    def __call__(self, identity: Any) -> Any:
        """The storage of a persistent id, in one dimension; the old format also wraps classes, to keep their text."""
        if identity[0] == "module":
            return identity[1]
        word, kind, key, _, count, *rest = identity
        if word != "storage" or not isinstance(key, str) or not isinstance(count, int) or any(rest):
            raise PickleDamagedError("a storage is not named as torch names it")
        dtype = STORAGES.get(str(kind)) if isinstance(kind, Name) else None
        if dtype is None or count < 0:
            raise PickleDamagedError("a storage has no known type or size")
        if key not in self.found:
            self._left -= count * dtype.itemsize
            if self._left < 0:
                raise PickleDamagedError("its storages are larger than the file")
            self.found[key] = self._fetch(key, dtype, count)
        storage = self.found[key]
        if storage.dtype != dtype or storage.numel() != count:
            raise PickleDamagedError(f"storage {key} is named with two sizes or types")
        return storage


def _zipped(path: Path, weights: Weights, stranger: Stranger) -> Any:
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        programs = [name for name in names if name.endswith("/data.pkl")]
        if len(programs) != 1 or len(set(names)) != len(names):
            raise PickleDamagedError("the archive does not hold one data.pkl")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise PickleDamagedError("it is a TorchScript archive, which is a program and no network")
        if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder", 16)() != b"little":
            raise PickleDamagedError("its numbers are big-endian")

        def fetch(key: str, dtype: torch.dtype, count: int) -> Tensor:
            return weights.of(_stored(archive, f"{root}data/{key}", count * dtype.itemsize), dtype, count)

        program = _stored(archive, programs[0], pickle_machine.LARGEST_PROGRAM)()
        value, _ = pickle_machine.run(program, 0, CALLS, _Storages(fetch, path.stat().st_size), stranger)
        return value


def _check_directory(path: Path) -> None:
    """Refuse an archive whose list of entries alone would fill the memory once it is read.

    Source: PKWARE's APPNOTE 6.3.10, sections 4.3.14 to 4.3.16.
    """
    with path.open("rb") as file:
        file.seek(-min(98, path.stat().st_size), os.SEEK_END)
        end = file.read().rjust(98, b"\0")
    sizes = [struct.unpack_from("<I", end, 76 + 12)[0]]
    if end[56:60] == b"PK\x06\x07":
        sizes = [struct.unpack_from("<Q", end, 40)[0]]
    if end[76:80] != b"PK\x05\x06" or sizes[0] > LARGEST_DIRECTORY:
        raise PickleDamagedError("its list of entries is too long, or something follows it")


def _stored(archive: zipfile.ZipFile, name: str, most: int) -> Callable[[], bytes]:
    """Reads an entry that lies uncompressed in the archive, as torch writes them."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise PickleDamagedError(f"{name} is compressed, which torch never does")
    if entry.file_size > most:
        raise PickleDamagedError(f"{name} is larger than it may be")
    return lambda: archive.read(entry)


def _legacy(data: mmap.mmap, weights: Weights, stranger: Stranger) -> Any:
    """The format before PyTorch 1.6: five pickles, then the bytes of the storages."""

    def nothing(_: Any) -> Any:
        raise PickleDamagedError("a storage stands before the network")

    storages = _Storages(lambda _, dtype, count: weights.empty(dtype, count), len(data))
    values, place = [], 0
    for persistent in (nothing, nothing, nothing, storages, nothing):
        found, place = pickle_machine.run(data, place, CALLS, persistent, stranger)
        values.append(found)
        if values[0] != LEGACY_MAGIC:
            raise PickleDamagedError("it is neither of torch's formats")
    _, _, _, value, keys = values
    if not isinstance(keys, list) or {*map(_as_key, keys)} != set(storages.found):
        raise PickleDamagedError("its list of storages is not the one it uses")
    for key in keys:
        place = _fill(storages.found[key], data, place, weights)
    return value


def _fill(storage: Tensor, data: mmap.mmap, place: int, weights: Weights) -> int:
    """Give a storage its content, which stands at `place` after its length; where it ends."""
    (count,) = struct.unpack_from("<q", data, place)
    if count != storage.numel():
        raise PickleDamagedError(f"a storage has {count} elements instead of {storage.numel()}")
    start, end = place + 8, place + 8 + storage.nbytes
    if end > len(data):
        raise PickleDamagedError("it breaks off")
    if count:
        weights.fill(storage, data[start:end])
    return end


def _as_key(value: Any) -> str:
    if not isinstance(value, str):
        raise PickleDamagedError("a storage has no name")
    return value


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> Tensor:
    """A view of a storage, once it is certain that it stays inside."""
    if not isinstance(storage, Tensor) or not _are_counts((offset, *items_of(sizes), *items_of(strides))):
        raise PickleDamagedError("a tensor has no storage, or a size that is no count")
    if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
        raise PickleDamagedError("a tensor's sizes and strides do not fit together")
    elements = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if elements and last >= storage.numel():
        raise PickleDamagedError("a tensor reaches beyond its storage")
    if elements > storage.numel() + ROOM:
        raise PickleDamagedError("a tensor repeats its storage too often")
    if not elements:
        return storage.new_empty(tuple(sizes))
    return storage.as_strided(tuple(sizes), tuple(strides), offset)


def _tensor_of_type(
    storage: Any, offset: Any, sizes: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """A tensor of a type that has no storage of its own; its storage holds bytes."""
    if not isinstance(storage, Tensor) or storage.dtype != torch.uint8 or str(dtype) not in TYPES:
        raise PickleDamagedError("a tensor has no bytes, or no known type")
    whole = storage.numel() // TYPES[str(dtype)].itemsize * TYPES[str(dtype)].itemsize
    return _tensor(storage[:whole].view(TYPES[str(dtype)]), offset, sizes, strides)


def _of_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Tensor:
    """A tensor that carries attributes, which are no weights."""
    rebuild = {"torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_tensor_v3": _tensor_of_type}
    if not isinstance(function, Name) or str(function) not in rebuild:
        raise PickleDamagedError("a tensor is made in a way that is not known")
    return rebuild[str(function)](*items_of(arguments))


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise PickleDamagedError("a device has no name")
    return kind if index is None else f"{kind}:{index}"


def _are_counts(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise PickleDamagedError("a parameter is no tensor")
    return data


def _object(kind: Any, *_: Any) -> Thing:
    if not isinstance(kind, Name):
        raise PickleDamagedError("an object has no class")
    return Thing(kind)


def _inert(name: str) -> Callable[..., Thing]:
    """A call that only makes a value which no network needs."""
    module, _, last = name.rpartition(".")
    return lambda *arguments: Thing(Name(module, last), arguments)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise PickleDamagedError("bytes in an encoding that no pickler writes")
    return text.encode("latin1")


INERT = (
    "functools.partial",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)
CALLS: Calls = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": lambda sizes=(): tuple(items_of(sizes)),
    "torch.device": _device,
    "collections.defaultdict": lambda *_: {},
    "builtins.list": lambda values=(): list(items_of(values)),
    "builtins.tuple": lambda values=(): tuple(items_of(values)),
    "copyreg._reconstructor": _object,
    "copy_reg._reconstructor": _object,
    "_codecs.encode": _encode,
    **{name: _inert(name) for name in INERT},
}
"""The calls that honest files make, each with the meaning it has here."""
