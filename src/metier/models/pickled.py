"""Reading what `torch.save` wrote without running it: state dicts, checkpoints, and whole pickled modules.

Whole modules need no class of theirs: their tensors are found where every `torch.nn.Module` keeps them, and beside them
come the tree of class names and the plain attributes, from which a network can be built again.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from metier.core import ModelError, UnsafeError
from metier.models import pickle_machine, torch_file
from metier.models.pickle_machine import Name, PickleDamagedError, Thing

Plain = bool | int | float | str | None

MOST_MODULES = 100_000
DEEPEST = 100
MOST_NAMED, MOST_CHARACTERS = 1_000_000, 1 << 24
"""Tensors and attributes of a module's tree, and letters of their paths: a part may stand in many places of it."""
MOST_NOTED = 1000
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
        kind: Whether it is a state dict, a whole module, or a checkpoint that holds one of them among other things; a
            program is what `look` finds where no network can be made out behind its calls.
        tensors: Weights and buffers of the network by their names in a state dict; tied ones share memory.
        classes: Class of each module by its path, the network itself under ""; empty for a state dict.
        scalars: Plain attributes of the modules, such as "enc.max_seq_len"; empty for a state dict.
        others: What else a checkpoint holds: plain values, and containers of plain values and tensors.
        calls: What the file would have called, in the order in which it asks for it; only `look` gives any.
    """

    kind: Literal["state dict", "module", "checkpoint", "program"]
    tensors: Mapping[str, Tensor]
    classes: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, Plain] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[str, ...] = ()


def read(path: Path) -> Pickled:
    """The network in a file of `torch.save`; nothing that the file names is imported or called.

    Raises:
        ModelError: If the file is damaged, or holds no network.
        UnsafeError: If it would call anything but what torch's own files call.
    """
    with _in_one_message(path):
        return _sorted_out(torch_file.value(path, torch_file.Weights(), pickle_machine.refuse))


def look(path: Path) -> Pickled:
    """As `read`, but without weights (the tensors lie on the device "meta"), and calls are noted, not refused.

    Raises:
        ModelError: If the file is damaged.
    """
    noted: list[str] = []

    def note(function: str, arguments: tuple[Any, ...]) -> None:
        if len(noted) < MOST_NOTED:
            noted.append(pickle_machine.shown_call(function, arguments))

    with _in_one_message(path):
        try:
            return replace(_sorted_out(torch_file.value(path, torch_file.NoWeights(), note)), calls=tuple(noted))
        except PickleDamagedError as error:
            if noted:  # what calls return is not known, so that what is built from it may not hold together
                return Pickled("program", {}, calls=tuple(noted))
            raise error from None


@contextmanager
def _in_one_message(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path), hint="name a file that torch.save wrote")
    try:
        yield
    except UnsafeError as error:
        (fault,) = error.faults
        raise UnsafeError(fault.what, where=str(path), hint=fault.hint) from None
    except (PickleDamagedError, zipfile.BadZipFile, struct.error, NotImplementedError, *BROKEN) as error:
        raise ModelError(
            f"the file cannot be read as one of torch.save: {' '.join(str(error).split())[:200]}",
            where=str(path),
            hint="get it again; a network is a state dict, a module, or a checkpoint that holds one",
        ) from error


def _sorted_out(value: Any) -> Pickled:
    if _is_module(value):
        return _module(value)
    if not isinstance(value, dict):
        raise PickleDamagedError("it holds no network")
    for key in NETWORKS:
        inner = value.get(key)
        if _is_module(inner) or _is_state(inner):
            found = _sorted_out(inner)
            named = {name: other for name, other in value.items() if isinstance(name, str) and name != key}
            others = {name: other for name, other in named.items() if _is_known(other, set())}
            return Pickled("checkpoint", found.tensors, found.classes, found.scalars, others)
    # Last, for a checkpoint may hold a tensor of its own beside the network, such as the state of the dice.
    if _is_state(value):
        return Pickled("state dict", _without_wrapper(value))
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
    count = characters = 0
    for path, module in _walk(root):
        names = _names(module)
        count, characters = count + len(names), characters + len(path) * len(names) + sum(map(len, names))
        if count > MOST_NAMED or characters > MOST_CHARACTERS:
            raise PickleDamagedError("its modules hold the same things again and again")
        classes[path] = str(module.kind)
        before = f"{path}." if path else ""
        tensors |= {f"{before}{name}": tensor for name, tensor in _tensors(module)}
        scalars |= {f"{before}{name}": value for name, value in module.state.items() if _is_scalar(name, value)}
    if not tensors:
        raise PickleDamagedError("its module holds no tensors")
    return Pickled("module", tensors, classes, scalars)


def _names(module: Thing) -> list[str]:
    """Names of everything that a module holds and that is kept."""
    held = [name for group in ("_parameters", "_buffers", "_modules") for name, _ in _named(module, group)]
    return [*held, *(name for name in module.state if isinstance(name, str))]


def _tensors(module: Thing) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a state dict would hold."""
    said = module.state.get("_non_persistent_buffers_set")
    hidden = said if isinstance(said, set | frozenset) else frozenset()
    buffers = [(name, value) for name, value in _named(module, "_buffers") if name not in hidden]
    for name, value in (*_named(module, "_parameters"), *buffers):
        if isinstance(value, Tensor):
            yield name, value


def _is_scalar(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and not name.startswith("_")
        and (value is None or isinstance(value, bool | int | float | str))
    )


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
