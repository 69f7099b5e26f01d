"""What a pickle says, found out by reading its opcodes: nothing that the file names is imported or called.

A pickle is a program for a small stack machine. This is that machine with its hands tied: classes and functions stay
names, objects stay records of their state, and a call is only carried out where it is one of a dozen that torch's own
files make, each with a meaning written here. Any other call is refused by name, or noted where somebody only looks.

Every bound here is one on work or memory that a short file could otherwise ask for without end: a program of a million
opcodes may name one long list a million times, ask for keys that all collide in a dict, or nest what doubles each time.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, NamedTuple

from metier.core import UnsafeError

MOST_OPCODES = 1_000_000
"""A state dict of ten thousand tensors has about three hundred thousand."""
LARGEST_PROGRAM = 32 << 20
"""Bytes of a program; weights lie beside it. Text may take four times as much once it is decoded."""
MOST_NAMES = 20_000
"""Times that a class or function is named: picklers name each once and remember it."""
OPCODES_A_SET = 4
"""An empty set takes the memory of so many other values."""
LARGEST_NUMBER = 1 << 2048
"""Longer ones take long to hash, each time they are a key."""
LARGEST_KEY = 1 << 60
"""Python hashes numbers modulo 2 ** 61 - 1: larger ones could be chosen so that all fall together."""
MOST_TUPLE_KEYS, LONGEST_TUPLE_KEY = 10_000, 16
"""Nothing random is in the hash of a tuple of numbers, so they can be chosen to fall together as well."""
CHARACTERS_AN_OPCODE = 64
"""Characters that are gone through in about the time of one opcode."""
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
Stranger = Callable[[str, tuple[Any, ...]], None]
"""Told of every other call, its full name and arguments; raises, or lets a record stand in its place."""


class PickleDamagedError(Exception):
    """The program does not hold together."""


def refuse(function: str, arguments: tuple[Any, ...]) -> None:
    """Refuse any call that is not known."""
    raise UnsafeError(
        f"the file would call {shown_call(function, arguments)} while it is read",
        where="pickle",
        hint="it is refused; get the model as safetensors from somebody you trust",
    )


def shown_call(function: str, arguments: tuple[Any, ...]) -> str:
    """A call in short, with the first of its arguments."""
    more = ", ..." if len(arguments) > 1 else ""
    text = f"{function[:LONGEST_SHOWN]}({_short(arguments[0])}{more})" if arguments else f"{function[:LONGEST_SHOWN]}()"
    # A name may hold what would move a terminal's cursor.
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def run(
    data: bytes | mmap, start: int, calls: Calls, persistent: Persistent, stranger: Stranger = refuse
) -> tuple[Any, int]:
    """The value that the pickle at `start` describes, and where it ends.

    Args:
        data: Bytes that hold the pickle.
        start: Where it begins.
        calls: What the calls of known functions give.
        persistent: What a persistent id gives.
        stranger: What is done about any other call.

    Raises:
        UnsafeError: If the file asks for a call that is not among `calls`.
        PickleDamagedError: If the program breaks off, is too long or does what no pickler writes.
    """
    machine = _Machine(calls, persistent, stranger)
    program = io.BytesIO(data[start : start + LARGEST_PROGRAM])
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if count > MOST_OPCODES:
                raise PickleDamagedError("its program is too long")
            if opcode.name != "STOP":
                machine.step(opcode.name, argument)
        return machine.pop(), start + program.tell()
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
}
FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
DICTS = ("builtins.dict", "collections.OrderedDict")
SETS = ("builtins.set", "builtins.frozenset", "__builtin__.set")
IGNORED = frozenset({"PROTO", "FRAME"})
_MARK = object()


class _Machine:
    """Stack and memo; one method for each opcode that does something, named after it."""

    def __init__(self, calls: Calls, persistent: Persistent, stranger: Stranger) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._calls: Calls = {**calls, **dict.fromkeys(DICTS, self._dict), **dict.fromkeys(SETS, self._set)}
        self._persistent, self._stranger = persistent, stranger
        self._left, self._tuple_keys_left, self._names_left = MOST_OPCODES, MOST_TUPLE_KEYS, MOST_NAMES
        self._methods = {
            opcode.name: getattr(self, f"_op_{opcode.name.lower()}", None) for opcode in pickletools.opcodes
        }

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in IGNORED:
            return
        if name in PLAIN:
            if isinstance(argument, int) and abs(argument) > LARGEST_NUMBER:
                raise PickleDamagedError("a number is too long")
            self._push(argument)
        elif name in CONSTANTS:
            self._push(CONSTANTS[name]())
        elif name in FIXED_TUPLES:
            self._push(tuple(reversed([self.pop() for _ in range(FIXED_TUPLES[name])])))
        else:
            method = self._methods[name]
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
        self._push(self._pairs(self._to_mark()))

    def _op_empty_set(self, _: Any) -> None:
        self._push(self._set())

    def _op_frozenset(self, _: Any) -> None:
        self._left -= OPCODES_A_SET
        self._push(frozenset(map(self._key, self._to_mark())))

    def _op_append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _op_appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, values: list[Any]) -> None:
        """Add to the list on top; what a subclass of list holds is no weight and not kept."""
        if not isinstance(top := self._stack[-1], Thing):
            _as(list, top).extend(values)

    def _op_additems(self, _: Any) -> None:
        values = self._to_mark()
        _as(set, self._stack[-1]).update(map(self._key, values))

    def _op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._items()[self._key(key)] = value

    def _op_setitems(self, _: Any) -> None:
        values = self._to_mark()
        self._items().update(self._pairs(values))

    def _items(self) -> dict[Any, Any]:
        """Where items of the object on top go; a subclass of dict keeps them as its state."""
        top = self._stack[-1]
        return top.state if isinstance(top, Thing) else _as(dict, top)

    def _op_global(self, argument: str) -> None:
        self._push(self._name(*argument.split(" ", 1)))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._push(self._name(_as(str, module), _as(str, name)))

    def _name(self, module: str, name: str) -> Name:
        self._names_left -= 1
        if self._names_left < 0:
            raise PickleDamagedError("it names classes again and again")
        return Name(module, name)

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._push(self._call(function, _as(tuple, arguments)))

    def _op_inst(self, argument: str) -> None:
        self._push(self._call(self._name(*argument.split(" ", 1)), tuple(self._to_mark())))

    def _op_obj(self, _: Any) -> None:
        function, *arguments = self._to_mark()
        self._push(self._call(function, tuple(arguments)))

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
        if isinstance(top, Name):
            self._stranger(f"{top}.__setstate__", (state,))
        if not isinstance(top, Thing):
            return  # Attributes of a dict (an OrderedDict's _metadata) or of a tensor carry no weights.
        for part in self._spend(state) if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                top.state.update(self._spend(part))

    def _op_binpersid(self, _: Any) -> None:
        self._push(self._persistent(self.pop()))

    def _new(self, kind: Name, arguments: tuple[Any, ...]) -> Any:
        """A bare object of a class; the classes with a meaning of ours are made by it."""
        known = self._calls.get(str(kind))
        return known(*map(self._spend, self._spend(arguments))) if known else Thing(kind, arguments)

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        known = self._calls.get(str(function)) if isinstance(function, Name) else None
        if known is not None:
            return known(*map(self._spend, self._spend(arguments)))
        kind = function.kind if isinstance(function, Thing) else _as(Name, function)
        self._stranger(shown_call(str(kind), function.arguments) if function is not kind else str(kind), arguments)
        return Thing(kind, arguments)

    def _spend(self, value: Any) -> Any:
        """Count what a call goes through: a long list handed over again and again would take for ever."""
        if isinstance(value, list | tuple | dict | set | frozenset):
            self._left -= len(value)
        elif isinstance(value, str | bytes | bytearray):
            self._left -= len(value) // CHARACTERS_AN_OPCODE
        if self._left < 0:
            raise PickleDamagedError("its program repeats itself without end")
        return value

    def _key(self, value: Any) -> Any:
        """A key of a dict or set: plain values only, for hashing nested tuples that share parts can take for ever."""
        if not isinstance(value, tuple) or isinstance(value, Name):
            return _plain(value)
        self._tuple_keys_left -= 1
        if self._tuple_keys_left < 0 or len(value) > LONGEST_TUPLE_KEY:
            raise PickleDamagedError("too many keys are tuples, or one is too long")
        return tuple(map(_plain, value))

    def _pairs(self, values: list[Any]) -> dict[Any, Any]:
        if len(values) % 2:
            raise PickleDamagedError("a key has no value")
        return {self._key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        """What `OrderedDict(pairs)` or `dict(pairs)` gives."""
        if isinstance(pairs, dict):
            return dict(pairs)
        return {self._key(key): value for key, value in map(items_of, items_of(pairs))}

    def _set(self, values: Any = ()) -> set[Any]:
        """What `set(values)` gives."""
        self._left -= OPCODES_A_SET
        self._spend(())
        return set(map(self._key, items_of(values)))


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise PickleDamagedError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def items_of(value: Any) -> Any:
    """A container that can be gone through at the price of its length; a tensor would come apart into millions."""
    if isinstance(value, list | tuple | dict | set | frozenset):
        return value
    raise PickleDamagedError(f"a {type(value).__name__} is no list")


def _plain(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= LARGEST_KEY:
        raise PickleDamagedError("a number is too large for a key")
    if value is None or isinstance(value, bool | int | float | str | bytes | Name):
        return value
    raise PickleDamagedError(f"a {type(value).__name__} is no key")


def _short(value: Any) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:LONGEST_SHOWN])
    if isinstance(value, Thing):
        return f"{value.kind}(...)"[:LONGEST_SHOWN]
    return str(value)[:LONGEST_SHOWN] if isinstance(value, Name | int | float | bool) else type(value).__name__
