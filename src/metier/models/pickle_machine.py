"""What a pickle says, found out by reading its opcodes: nothing that the file names is imported or called.

A pickle is a program for a small stack machine. This is that machine with its hands tied: classes and functions stay
names, objects stay records of their state, and a call is only carried out where it is one of a dozen that torch's own
files make, each with a meaning written here. Any other call is refused by name.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metier.core import UnsafeError

MOST_OPCODES = 1_000_000
"""A state dict of ten thousand tensors has about three hundred thousand."""
LONGEST_SHOWN = 80


class Name(NamedTuple):
    """A class or function that the file names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """As Python would write it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Thing:
    """An object that the file describes, as a record.

    Attributes:
        kind: Its class.
        arguments: What it would have been made from.
        state: Its attributes by name; empty where the file gives none.
    """

    kind: Name
    arguments: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)


Persistent = Callable[[Any], Any]
"""Gives the storage that a persistent id stands for."""
Calls = dict[str, Callable[..., Any]]
"""Meanings of the calls that may be carried out, by full name."""


class PickleDamagedError(Exception):
    """The program does not hold together."""


def run(data: bytes, start: int, calls: Calls, persistent: Persistent) -> tuple[Any, int]:
    """The value that the pickle at `start` describes, and where it ends.

    Args:
        data: Bytes that hold the pickle.
        start: Where it begins.
        calls: What the calls of known functions give.
        persistent: What a persistent id gives.

    Raises:
        UnsafeError: If the file asks for a call that is not among `calls`.
        PickleDamagedError: If the program breaks off, is too long or does what no pickler writes.
    """
    machine = _Machine(calls, persistent)
    program = io.BytesIO(data)
    program.seek(start)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if count > MOST_OPCODES:
                raise PickleDamagedError("its program is too long")
            if opcode.name != "STOP":
                machine.step(opcode.name, argument)
        return machine.pop(), program.tell()
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise PickleDamagedError(f"{type(error).__name__}: {str(error)[:LONGEST_SHOWN]}") from error


PLAIN = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
        *("BINBYTES", "BINBYTES8", "SHORT_BINBYTES", "BYTEARRAY8"),
    }
)
"""Opcodes that push what they carry."""
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = frozenset({"PROTO", "FRAME"})
_MARK = object()


class _Machine:
    """Stack and memo; one method for each opcode that does something, named after it."""

    def __init__(self, calls: Calls, persistent: Persistent) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._calls, self._persistent = calls, persistent
        self._left = MOST_OPCODES

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in IGNORED:
            return
        if name in PLAIN:
            self._push(argument)
        elif name in CONSTANTS:
            self._push(CONSTANTS[name]())
        elif name in FIXED_TUPLES:
            self._push(tuple(reversed([self.pop() for _ in range(FIXED_TUPLES[name])])))
        else:
            method = getattr(self, f"_op_{name.lower()}", None)
            if method is None:
                raise PickleDamagedError(f"the opcode {name} has no place in a model file")
            method(argument)

    def pop(self) -> Any:
        """Take the value on top."""
        value = self._stack.pop()
        if value is _MARK:
            raise PickleDamagedError("a value is missing")
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _to_mark(self) -> list[Any]:
        """Everything above the last mark, which goes as well."""
        found: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def _op_mark(self, _: Any) -> None:
        self._push(_MARK)

    def _op_pop(self, _: Any) -> None:
        self._stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._to_mark()

    def _op_dup(self, _: Any) -> None:
        self._push(self._stack[-1])

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_put(self, index: int) -> None:
        self._memo[int(index)] = self._stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_get(self, index: int) -> None:
        self._push(self._memo[int(index)])

    _op_binget = _op_long_binget = _op_get

    def _op_tuple(self, _: Any) -> None:
        self._push(tuple(self._to_mark()))

    def _op_list(self, _: Any) -> None:
        self._push(self._to_mark())

    def _op_dict(self, _: Any) -> None:
        self._push(_pairs(self._to_mark()))

    def _op_frozenset(self, _: Any) -> None:
        self._push(frozenset(map(_key, self._to_mark())))

    def _op_append(self, _: Any) -> None:
        value = self.pop()
        _as(list, self._stack[-1]).append(value)

    def _op_appends(self, _: Any) -> None:
        values = self._to_mark()
        _as(list, self._stack[-1]).extend(values)

    def _op_additems(self, _: Any) -> None:
        values = self._to_mark()
        _as(set, self._stack[-1]).update(map(_key, values))

    def _op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._items()[_key(key)] = value

    def _op_setitems(self, _: Any) -> None:
        values = self._to_mark()
        self._items().update(_pairs(values))

    def _items(self) -> dict[Any, Any]:
        """Where items of the object on top go; a subclass of dict keeps them as its state."""
        top = self._stack[-1]
        return top.state if isinstance(top, Thing) else _as(dict, top)

    def _op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(Name(module, name))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._push(Name(_as(str, module), _as(str, name)))

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._push(self._call(_as(Name, function), _as(tuple, arguments)))

    def _op_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push(self._call(Name(module, name), tuple(self._to_mark())))

    def _op_obj(self, _: Any) -> None:
        function, *arguments = self._to_mark()
        self._push(self._call(_as(Name, function), tuple(arguments)))

    def _op_newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        self._push(self._new(_as(Name, kind), _as(tuple, arguments)))

    def _op_newobj_ex(self, _: Any) -> None:
        named, arguments, kind = self.pop(), self.pop(), self.pop()
        if _as(dict, named):
            raise PickleDamagedError("an object is made from named arguments")
        self._push(self._new(_as(Name, kind), _as(tuple, arguments)))

    def _op_build(self, _: Any) -> None:
        state, top = self.pop(), self._stack[-1]
        if isinstance(top, Thing):
            parts = state if isinstance(state, tuple) else (state,)
            for part in parts:
                if isinstance(part, dict):
                    self._spend(part)
                    top.state.update(part)
        elif isinstance(top, Name):
            raise PickleDamagedError(f"it would change {top} itself")
        # Attributes of a dict (an OrderedDict's _metadata) or of a tensor carry no weights.

    def _op_binpersid(self, _: Any) -> None:
        self._push(self._persistent(self.pop()))

    def _new(self, kind: Name, arguments: tuple[Any, ...]) -> Any:
        """A bare object of a class; the classes with a meaning of ours are made by it."""
        known = self._calls.get(str(kind))
        return known(*map(self._spend, arguments)) if known else Thing(kind, arguments)

    def _call(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        known = self._calls.get(str(function))
        if known is None:
            first = f"({_short(arguments[0])}...)" if arguments else "()"
            raise UnsafeError(
                f"the file would call {function}{first} while it is read",
                where="pickle",
                hint="it is refused; get the model as safetensors from somebody you trust",
            )
        return known(*map(self._spend, arguments))

    def _spend(self, value: Any) -> Any:
        """Count what a call goes through: a long list handed over again and again would take for ever."""
        if isinstance(value, list | tuple | dict | set | frozenset | str | bytes):
            self._left -= len(value)
            if self._left < 0:
                raise PickleDamagedError("its program repeats itself without end")
        return value


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleDamagedError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _key(value: Any) -> Any:
    """A key of a dict or set: plain values only, for hashing nested tuples that share parts can take for ever."""
    if isinstance(value, tuple) and not isinstance(value, Name):
        return tuple(map(_plain, value))
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes | Name):
        return value
    raise PickleDamagedError(f"a {type(value).__name__} is no key")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise PickleDamagedError("a key has no value")
    return {_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def from_pairs(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """What `OrderedDict(pairs)` or `dict(pairs)` gives."""
    if isinstance(pairs, dict):
        return dict(pairs)
    return {_key(key): value for key, value in pairs}


def keys_of(values: Iterable[Any] = ()) -> set[Any]:
    """What `set(values)` gives."""
    return {_key(value) for value in values}


def _short(value: Any) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:LONGEST_SHOWN])
    return str(value) if isinstance(value, Name | int | float | bool) else type(value).__name__
