"""Reading what `torch.save` wrote without running it: state dicts, checkpoints, and whole pickled modules.

Whole modules need no class of theirs: their tensors are found where every `torch.nn.Module` keeps them, and beside them
come the tree of class names and the plain attributes, from which a network can be built again.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metier.core import ModelError
from metier.models.pickle_machine import Calls, Name, PickleDamagedError, Thing, from_pairs, keys_of, run

Plain = bool | int | float | str | None

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
}
"""Names that torch gives its storages in files."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of the format before PyTorch 1.6. Source: torch/serialization.py."""
LARGEST_PROGRAM = 64 << 20
"""Bytes of a pickle in a zip archive; weights lie beside it."""
MOST_MODULES = 100_000
DEEPEST = 100
MOST_DIMENSIONS = 64
ROOM = 1 << 24
"""Elements by which a tensor that repeats its storage may be larger than it."""
NETWORKS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
"""Keys under which checkpoints keep the network."""
WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel"})
"""Classes that hold the network itself as their child `module`."""
BROKEN = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    OSError,
    EOFError,
)
"""What reading a damaged archive raises, in one place or another."""


@dataclass(frozen=True)
class Pickled:
    """What a file holds.

    Attributes:
        kind: Whether it is a state dict, a whole module, or a checkpoint that holds one of them among other things.
        tensors: Weights and buffers of the network by their names in a state dict; tied ones share memory.
        classes: Class of each module by its path, the network itself under ""; empty for a state dict.
        scalars: Plain attributes of the modules, such as "enc.max_seq_len"; empty for a state dict.
        others: What else a checkpoint holds: plain values, and containers of plain values and tensors.
    """

    kind: Literal["state dict", "module", "checkpoint"]
    tensors: Mapping[str, Tensor]
    classes: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, Plain] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Pickled:
    """The network in a file of `torch.save`; nothing that the file names is imported or called.

    Raises:
        ModelError: If the file is damaged, or holds no network.
        UnsafeError: If it would call anything but what torch's own files call.
    """
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path), hint="name a file that torch.save wrote")
    try:
        return _sorted_out(_zipped(path) if zipfile.is_zipfile(path) else _legacy(path.read_bytes()))
    except (PickleDamagedError, zipfile.BadZipFile, struct.error, NotImplementedError, *BROKEN) as error:
        raise ModelError(
            f"the file cannot be read as one of torch.save: {' '.join(str(error).split())[:200]}",
            where=str(path),
            hint="get it again; a network is a state dict, a module, or a checkpoint that holds one",
        ) from error


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
        dtype = STORAGES[str(kind)] if isinstance(kind, Name) else None
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


def _zipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        programs = [name for name in names if name.endswith("/data.pkl")]
        if len(programs) != 1 or len(set(names)) != len(names):
            raise PickleDamagedError("the archive does not hold one data.pkl")
        root = programs[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise PickleDamagedError("it is a TorchScript archive, which is a program and no network")
        if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder", 16) != b"little":
            raise PickleDamagedError("its numbers are big-endian")

        def fetch(key: str, dtype: torch.dtype, count: int) -> Tensor:
            name, length = f"{root}data/{key}", count * dtype.itemsize
            found = bytearray(_stored(archive, name, length))
            if len(found) != length:
                raise PickleDamagedError(f"{name} has {len(found)} bytes instead of {length}")
            return torch.frombuffer(found, dtype=dtype) if count else torch.empty(0, dtype=dtype)

        program = _stored(archive, programs[0], LARGEST_PROGRAM)
        value, _ = run(program, 0, CALLS, _Storages(fetch, path.stat().st_size))
        return value


def _stored(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """An entry that lies uncompressed in the archive, as torch writes them."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise PickleDamagedError(f"{name} is compressed, which torch never does")
    if entry.file_size > most:
        raise PickleDamagedError(f"{name} is larger than it may be")
    return archive.read(entry)


def _legacy(data: bytes) -> Any:
    """The format before PyTorch 1.6: five pickles, then the bytes of the storages."""

    def nothing(_: Any) -> Any:
        raise PickleDamagedError("a storage stands before the network")

    magic, place = run(data, 0, CALLS, nothing)
    if magic != LEGACY_MAGIC:
        raise PickleDamagedError("it is neither of torch's formats")
    for _ in ("protocol", "system"):
        _, place = run(data, place, CALLS, nothing)
    storages = _Storages(lambda _, dtype, count: torch.empty(count, dtype=dtype), len(data))
    value, place = run(data, place, CALLS, storages)
    keys, place = run(data, place, CALLS, nothing)
    if not isinstance(keys, list) or set(keys) != set(storages.found):
        raise PickleDamagedError("its list of storages is not the one it uses")
    for key in keys:
        storage = storages.found[key]
        (count,) = struct.unpack_from("<q", data, place)
        if count != storage.numel():
            raise PickleDamagedError(f"storage {key} has {count} elements instead of {storage.numel()}")
        place += 8
        if count:
            storage.copy_(torch.frombuffer(bytearray(data[place : place + storage.nbytes]), dtype=storage.dtype))
        place += storage.nbytes
    return value


def _tensor(storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> Tensor:
    """A view of a storage, once it is certain that it stays inside."""
    if not isinstance(storage, Tensor) or not _are_counts((offset, *sizes, *strides)):
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
        return torch.empty(tuple(sizes), dtype=storage.dtype)
    return storage.as_strided(tuple(sizes), tuple(strides), offset)


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
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *words: ":".join(map(str, words)),
    "collections.OrderedDict": from_pairs,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": from_pairs,
    "builtins.list": lambda values=(): list(values),
    "builtins.tuple": lambda values=(): tuple(values),
    "builtins.set": keys_of,
    "builtins.frozenset": keys_of,
    "__builtin__.set": keys_of,
    "copyreg._reconstructor": _object,
    "copy_reg._reconstructor": _object,
    "_codecs.encode": _encode,
    **{name: _inert(name) for name in INERT},
}
"""The calls that honest files make, each with the meaning it has here."""


def _sorted_out(value: Any) -> Pickled:
    if _is_module(value):
        return _module(value)
    if not isinstance(value, dict):
        raise PickleDamagedError("it holds no network")
    if _is_state(value):
        return Pickled("state dict", _without_wrapper(value))
    for key in NETWORKS:
        inner = value.get(key)
        if _is_module(inner) or _is_state(inner):
            found = _sorted_out(inner)
            others = {str(name): other for name, other in value.items() if name != key and _is_known(other, set())}
            return Pickled("checkpoint", found.tensors, found.classes, found.scalars, others)
    raise PickleDamagedError("it holds no network")


def _is_module(value: Any) -> bool:
    return isinstance(value, Thing) and isinstance(value.state.get("_modules"), dict) and "_parameters" in value.state


def _is_state(value: Any) -> bool:
    named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return named and any(isinstance(item, Tensor) for item in value.values())


def _is_known(value: Any, seen: set[int]) -> bool:
    """Whether a value consists of plain values and tensors alone; what was seen already is not looked at again."""
    if isinstance(value, dict | list | tuple) and not isinstance(value, Name):
        if id(value) in seen:
            return True
        seen.add(id(value))
        return all(_is_known(item, seen) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str | bytes | Tensor)


def _module(root: Thing) -> Pickled:
    while root.kind.name in WRAPPERS and _is_module(inside := root.state["_modules"].get("module")):
        root = inside
    tensors: dict[str, Tensor] = {}
    classes: dict[str, str] = {}
    scalars: dict[str, Plain] = {}
    for path, module in _walk(root):
        classes[path] = str(module.kind)
        before = f"{path}." if path else ""
        tensors |= {f"{before}{name}": tensor for name, tensor in _tensors(module)}
        scalars |= {f"{before}{name}": value for name, value in module.state.items() if _is_scalar(name, value)}
    if not tensors:
        raise PickleDamagedError("its module holds no tensors")
    return Pickled("module", tensors, classes, scalars)


def _tensors(module: Thing) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a state dict would hold."""
    hidden = module.state.get("_non_persistent_buffers_set") or ()
    buffers = [(name, value) for name, value in _named(module, "_buffers") if name not in hidden]
    for name, value in (*_named(module, "_parameters"), *buffers):
        if isinstance(value, Tensor):
            yield name, value


def _is_scalar(name: Any, value: Any) -> bool:
    return not str(name).startswith("_") and (value is None or isinstance(value, bool | int | float | str))


def _walk(root: Thing) -> Iterator[tuple[str, Thing]]:
    """Every module with its path, outer ones first; the same module may stand in two places."""
    waiting = [("", root, 0)]
    for _ in range(MOST_MODULES):
        if not waiting:
            return
        path, module, depth = waiting.pop()
        if depth > DEEPEST:
            raise PickleDamagedError("its modules are nested without end")
        yield path, module
        below = [(name, child) for name, child in _named(module, "_modules") if _is_module(child)]
        waiting += [(f"{path}.{name}" if path else name, child, depth + 1) for name, child in reversed(below)]
    raise PickleDamagedError("it holds too many modules")


def _named(module: Thing, group: str) -> list[tuple[str, Any]]:
    found = module.state.get(group) or {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise PickleDamagedError(f"a module's {group} are not named")
    return list(found.items())


def _without_wrapper(state: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}
