"""Model files that want to run something, or to fill the memory, or to take for ever; and a judge that reads them.

`python tests/hostile.py FOLDER` writes them there, reads each in a process of its own that may take 5 seconds and 256
MiB more than it had before, and prints one JSON object a file. What a process does beside reading is seen by an audit hook.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5, 256 << 20
MAGIC = 0x1950A86A20F9469CFC6C
DANGEROUS = (
    "os.system posix.system nt.system os.popen os.execv os.spawnlp os.fork os.kill os.remove os.putenv "
    "subprocess.Popen subprocess.check_output subprocess.getoutput builtins.eval builtins.exec builtins.compile "
    "builtins.__import__ builtins.open builtins.getattr builtins.setattr builtins.delattr builtins.globals "
    "builtins.vars builtins.breakpoint builtins.input builtins.map builtins.apply __builtin__.eval "
    "__builtin__.execfile importlib.import_module runpy.run_path runpy.run_module pty.spawn webbrowser.open "
    "shutil.rmtree shutil.copyfile socket.create_connection urllib.request.urlopen http.client.HTTPConnection "
    "pickle.loads pickle.Unpickler marshal.loads dill.loads cloudpickle.loads joblib.load torch.load "
    "torch.hub.load torch.jit.load torch.storage._load_from_bytes torch.serialization.load torch.ops.load_library "
    "torch.utils.cpp_extension.load torch.fx.Interpreter torch._dynamo.guards.GuardBuilder numpy.load "
    "numpy.testing._private.utils.runstring numpy.f2py.crackfortran.getlincoef operator.attrgetter "
    "operator.methodcaller functools.reduce types.FunctionType types.CodeType ctypes.CDLL ctypes.pythonapi "
    "code.interact code.InteractiveInterpreter pdb.run pdb.Pdb bdb.Bdb timeit.timeit cProfile.run profile.run "
    "trace.Trace doctest.debug_script sys.exit sys.setrecursionlimit asyncio.create_subprocess_shell "
    "multiprocessing.Process threading.Thread _thread.start_new_thread atexit.register signal.signal "
    "logging.config.dictConfig idlelib.pyshell.ModifiedInterpreter pip.main setuptools.setup site.main "
    "venv.create zipimport.zipimporter copyreg.add_extension copyreg.dispatch_table _pickle.load "
    "xmlrpc.client.ServerProxy "
)


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None, items: Any = None, pairs: Any = None) -> None:
        self.made = (function, arguments, state, items, pairs)

    def __reduce_ex__(self, protocol: int) -> Any:
        """What the pickler writes."""
        return self.made[:2] if self.made[2:] == (None, None, None) else self.made


def archive(program: bytes, *entries: tuple[str, bytes], root: str = "m", how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of torch's form around a program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as zipped:
        zipped.writestr(f"{root}/data.pkl", program)
        for name, content in entries:
            zipped.writestr(name if name.startswith(("/", "..")) else f"{root}/{name}", content)
    return file.getvalue()


def legacy(program: bytes, keys: list[str] = [], storages: bytes = b"") -> bytes:  # noqa: B006
    """The form before PyTorch 1.6 around a program."""
    head = pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + program + pickle.dumps(keys, 2) + storages


def text(word: str) -> bytes:
    """Opcodes that push a text."""
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def called(function: str, argument: str = "true", form: int = 0) -> bytes:
    """Opcodes that call `function`, by one of six ways, without the final stop."""
    module, _, name = function.rpartition(".")
    by_line, push = f"c{module}\n{name}\n".encode(), text(argument)
    return (
        by_line + b"(" + push + b"tR",
        b"(" + push + f"i{module}\n{name}\n".encode(),
        b"(" + by_line + push + b"o",
        text(module) + text(name) + b"\x93" + push + b"\x85R",
        by_line + b"q\x07" + b"0h\x07" + push + b"\x85R",
        by_line + b"}" + text("x") + push + b"sb",
    )[form]


def tensor(
    count: int = 4, offset: int = 0, sizes: bytes = b"K\x02K\x02", strides: bytes = b"K\x02K\x01", **parts: bytes
) -> bytes:
    """Opcodes that make a tensor; count may be any Python number."""
    kind, key, word = (
        parts.get("kind", b"ctorch\nFloatStorage\n"),
        parts.get("key", text("0")),
        parts.get("word", text("storage")),
    )
    number = f"I{count}\n".encode()
    storage = b"(" + word + kind + key + text("cpu") + number + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + f"I{offset}\n".encode()
        + b"("
        + sizes
        + b"t("
        + strides
        + b"t\x89}tR"
    )


def state(*values: bytes) -> bytes:
    """A state dict with these values, as a whole program."""
    return b"}(" + b"".join(text(f"w{i}") + value for i, value in enumerate(values)) + b"u."


def module(inside: bytes, parameters: bytes = b"}", buffers: bytes = b"}") -> bytes:
    """Opcodes of a module with opcodes of its children."""
    parts = text("_modules") + inside + text("_parameters") + parameters + text("_buffers") + buffers
    return b"cm\nM\n)\x81}(" + parts + b"ub"


def calling(sentinel: Path) -> Iterator[tuple[str, bytes]]:
    """Files that would call something."""
    mark = f"touch {sentinel}"
    for function in DANGEROUS.split():
        yield f"call {function}", archive(state(called(function, mark)))
    for form in range(6):
        yield f"form {form} bare", archive(called("os.system", mark, form) + b".")
        yield f"form {form} legacy", legacy(state(called("os.system", mark, form)))
        yield f"form {form} plain pickle", called("os.system", mark, form) + b"."
    value: Any
    for protocol in range(6):
        value = {"w": Calls(os.system, mark)}
        yield f"protocol {protocol}", archive(pickle.dumps(value, protocol))
    for name, value in {
        "eval": Calls(eval, f"open({str(sentinel)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(sentinel)!r}, 'w')"),
        "getattr chain": Calls(getattr, Calls(__import__, "os"), "system"),
        "with state": Calls(os.system, mark, state={"a": 1}),
        "with items": Calls(os.system, mark, items=iter([1, 2])),
        "with pairs": Calls(os.system, mark, pairs=iter([("a", 1)])),
        "path": Calls(Path.touch, sentinel),
        "map": Calls(list, Calls(map, os.system, [mark])),
        "in a list": [1, [2, (3, Calls(os.system, mark))]],
        "in a dict in a dict": {"a": {"b": {"c": Calls(os.system, mark)}}},
        "as argument of a known call": Calls(dict, Calls(os.system, mark)),
        "beside a network": {"state_dict": {}, "callback": Calls(os.system, mark)},
    }.items():
        yield f"reduce {name}", archive(pickle.dumps(value, 4))
        yield f"reduce {name}, legacy", legacy(pickle.dumps(value, 2))
    call = called("os.system", mark)
    yield "call as a key of storage", archive(state(tensor(key=call)))
    yield "call as a kind of storage", archive(state(tensor(kind=call)))
    yield "call as a size", archive(state(tensor(sizes=call + b"K\x02")))
    yield "call as a persistent id", archive(call + b"Q.")
    yield "class in the old form", legacy(b"(" + text("module") + call + text("f") + text("s") + b"tQ.")
    yield (
        "call in the metadata of a dict",
        archive(b"ccollections\nOrderedDict\n)R}" + text("_metadata") + call + b"sb."),
    )
    yield "call before the end", archive(call + b"0" + state(tensor()), ("data/0", bytes(16)))
    yield "call in a module", archive(module(b"}" + text("a") + call + b"s") + b".")
    yield (
        "call in a forward hook",
        archive(module(b"}", b"}" + text("w") + tensor() + b"s")[:-2] + text("hook") + call + b"ub."),
    )
    yield "call as the legacy magic", call + b"."
    yield "call as the legacy protocol", pickle.dumps(MAGIC, 2) + call + b"."
    yield "call as the legacy list of keys", legacy(state(tensor()))[:-3] + call + b"."
    yield "result of a call is called", archive(called("builtins.getattr")[:-2] + b"tR(" + text(mark) + b"tR.")
    yield (
        "_rebuild_from_type_v2",
        archive(b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(" + text(mark) + b"t}tR."),
    )
    yield "partial of a call", archive(b"cfunctools\npartial\n(cos\nsystem\n" + text(mark) + b"tR)R.")
    yield (
        "reconstructor of a function",
        archive(b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR" + b"(" + text(mark) + b"tR."),
    )
    yield "setstate of a class", archive(b"cbuiltins\nobject\n}" + text("__init__") + b"cos\nsystem\nsb.")
    yield "setattr by slots", archive(b"ctorch.nn\nModule\nN}" + text("forward") + b"cos\nsystem\ns\x86b.")
    yield "newobj with keywords", archive(b"csubprocess\nPopen\n)}" + text("args") + text(mark) + b"s\x92.")
    yield "name with newlines", archive(text("os\nsystem") + text("x\x1b[2J") + b"\x93)R.")
    yield "dotted name", archive(text("os") + text("path.os.system") + b"\x93" + text(mark) + b"\x85R.")
    yield "unicode lookalike", archive(text("ｏs") + text("system") + b"\x93" + text(mark) + b"\x85R.")
    for number in (1, 250):
        yield f"extension code {number}", archive(bytes([0x82, number]) + text(mark) + b"\x85R.")
    yield "extension code of two bytes", archive(b"\x83\x01\x01)R.")
    yield "extension code of four bytes", archive(b"\x84\x01\x01\x01\x01)R.")
    yield "extension code below zero", archive(b"\x84\xff\xff\xff\xff)R.")
    yield "persistent id as text", archive(b"Pos system\n.")
    yield "out-of-band buffer", archive(b"\x97\x98.")


def wasting() -> Iterator[tuple[str, bytes]]:
    """Files that ask for much memory or time."""
    many = 300_000
    long_list = b"](" + b"N" * 400_000 + b"eq\x00"
    yield "nested lists", archive(b"]" * 900_000 + b"a" * 899_999 + b".")
    yield "nested tuples", archive(b")" + b"\x85" * 900_000 + b".")
    yield "doubling tuples", archive(b")" + b"2\x86" * 400_000 + b"q\x00}h\x00Ns.")
    yield "doubling text of a device", archive(b"]" + b"q\x00](h\x00h\x00e" * 60 + b"q\x01ctorch\ndevice\n(h\x01tR.")
    yield "marks", archive(b"(" * 990_000 + b".")
    yield "opcodes", archive(b"N0" * 5_000_000 + b".")
    yield "sets", archive(b"(" + b"\x8f" * 990_000 + b"l.")
    yield "dicts", archive(b"(" + b"}" * 990_000 + b"l.")
    yield "names", archive(b"(" + b"cabcdefgh\nabcdefgh\n" * 900_000 + b"l.")
    yield "objects", archive(b"ca\nb\nq\x000(" + b"h\x00)\x81" * 330_000 + b"l.")
    yield "texts of four bytes a letter", archive(b"(" + text("😀" + "a" * 24) * 900_000 + b"l.")
    yield "one text of four bytes a letter", archive(text("😀" + "a" * (31 << 20)) + b".")
    yield "program of 40 MB", archive(text("a" * (40 << 20)) + b".")
    yield "program of 40 MB, legacy", legacy(text("a" * (40 << 20)) + b".")
    yield "memo", archive(b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(900_000)) + b".")
    yield "memo far away", archive(b"Nr\xff\xff\xff\xff" * 900_000 + b".")
    for function in (
        "builtins.list",
        "builtins.tuple",
        "builtins.set",
        "builtins.dict",
        "collections.OrderedDict",
        "torch.Size",
    ):
        name = function.replace(".", "\n", 1) if function.count(".") == 1 else function
        yield (
            f"{function} again and again",
            archive(long_list + (b"0c" + name.encode() + b"\n(h\x00tR") * 50_000 + b"."),
        )
        wide = tensor(sizes=b"J\x00\x00\x00\x01", strides=b"K\x00")
        yield f"{function} of a tensor", archive(b"c" + name.encode() + b"\n(" + wide + b"tR.", ("data/0", bytes(16)))
    yield (
        "arguments again and again",
        archive(b"(" + b"N" * 400_000 + b"tq\x000" + b"cfunctools\npartial\nh\x00R0" * 100_000 + b"N."),
    )
    yield "state again and again", archive(b"(" + b"N" * 400_000 + b"tq\x000ca\nb\n)\x81" + b"h\x00b" * 200_000 + b".")
    yield (
        "dict as state again and again",
        archive(
            b"}("
            + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000))
            + b"uq\x000ca\nb\n)\x81"
            + b"h\x00b" * 200_000
            + b"."
        ),
    )
    yield "tuple as key again and again", archive(b"(" + b"N" * 400_000 + b"tq\x000}" + b"h\x00Ns" * 150_000 + b".")
    yield (
        "long number as key again and again",
        archive(b"\x8b" + struct.pack("<i", 8 << 20) + b"\x7f" * (8 << 20) + b"q\x000}" + b"h\x00Ns" * 200_000 + b"."),
    )
    prime = (1 << 61) - 1
    collide = b"".join(b"\x8a\x0c" + (prime * i).to_bytes(12, "little") + b"N" for i in range(1, many))
    yield "keys that collide", archive(b"}(" + collide + b"u.")
    yield "keys that collide in a set", archive(b"\x8f(" + collide + b"\x90.")
    yield "keys that collide in a frozenset", archive(b"(" + collide + b"\x91.")
    pairs = b"".join(b"J" + struct.pack("<i", i) + b"K\x01\x86N" for i in range(240_000))
    yield "tuples as keys", archive(b"}(" + pairs + b"u.")
    yield "digits", archive(b"I" + b"9" * 1_000_000 + b"\n.")
    yield "digits of a long", archive(b"L" + b"9" * 1_000_000 + b"L\n.")
    yield "long number", archive(b"\x8b" + struct.pack("<i", 20 << 20) + b"\x7f" * (20 << 20) + b".")
    for opcode, width in ((b"X", 4), (b"\x8d", 8), (b"B", 4), (b"\x8e", 8), (b"\x96", 8), (b"T", 4), (b"\x8b", 4)):
        yield f"length that lies, {opcode!r}", archive(opcode + (b"\xff" * (width - 1) + b"\x7f") + b"abc.")
        yield f"length that lies, legacy {opcode!r}", legacy(opcode + (b"\xff" * (width - 1) + b"\x7f") + b"abc.")
    yield "frame that lies", archive(b"\x80\x04\x95" + b"\xff" * 8 + b"N.")
    yield (
        "encode again and again",
        archive(
            text("a" * (8 << 20)) + b"q\x000" + (b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR") * 20_000 + b"."
        ),
    )
    yield (
        "module in itself",
        archive(
            b"cm\nM\n)\x81q\x00}(" + text("_modules") + b"}" + text("a") + b"h\x00s" + text("_parameters") + b"}ub."
        ),
    )
    ladder = module(b"}")
    for level in range(40):
        at = b"q" + bytes([level + 1])
        again = b"h" + bytes([level + 1])
        ladder = ladder + at + b"0" + module(b"}(" + text("a") + again + text("b") + again + b"u")
    yield "modules that double", archive(ladder + b".")
    name = text("n" * 3_000_000)
    ladder = module(b"}(" + name + b"q\x63N" + b"u")
    for level in range(30):
        at, again = b"q" + bytes([level + 1]), b"h" + bytes([level + 1])
        ladder = ladder + at + b"0" + module(b"}(h\x63" + again + text("b") + again + b"u")
    yield "names that double", archive(ladder + b".")
    shared = b"}(" + b"".join(text(f"p{i}") + b"N" for i in range(100_000)) + b"uq\x600"
    children = b"".join(text(f"c{i}") + module(b"}", b"h\x60") for i in range(5_000))
    yield "modules that share a hundred thousand names", archive(shared + module(b"}(" + children + b"u") + b".")
    deep = b"}"
    for _ in range(500):
        deep = b"}" + text("a") + module(deep) + b"s"
    yield "deep modules", archive(module(deep) + b".")
    yield (
        "key of many long texts",
        archive(
            text("k" * (4 << 20))
            + b"q\x000}("
            + text("state_dict")
            + state(tensor())[:-1]
            + (b"(" + b"h\x00" * 16 + b"tN") * 50_000
            + b"u.",
            ("data/0", bytes(16)),
        ),
    )


def reaching() -> Iterator[tuple[str, bytes]]:
    """Tensors that reach beyond what is theirs, and archives that are no archives."""
    data = ("data/0", bytes(16))
    for name, made in {
        "offset": tensor(offset=1), "offset below zero": tensor(offset=-1), "huge offset": tensor(offset=1 << 62),
        "size": tensor(sizes=b"K\x02K\x03"), "size below zero": tensor(sizes=b"K\x02J\xff\xff\xff\xff"),
        "stride": tensor(strides=b"K\x09K\x01"), "stride below zero": tensor(strides=b"J\xff\xff\xff\xffK\x01"),
        "fewer sizes": tensor(sizes=b"K\x02"), "size is a float": tensor(sizes=b"F2.0\nK\x02"), "size is nan": tensor(sizes=b"Fnan\nK\x02"),
        "size is true": tensor(sizes=b"\x88K\x02"), "size is text": tensor(sizes=text("2") + b"K\x02"), "size is none": tensor(sizes=b"NK\x02"),
        "sizes overflow": tensor(sizes=b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f" * 2, strides=b"K\x00K\x00"),
        "repeated for ever": tensor(sizes=b"J\xff\xff\xff\x7fK\x01", strides=b"K\x00K\x00"),
        "too many axes": tensor(sizes=b"K\x01" * 65, strides=b"K\x01" * 65),
        "count is larger than the entry": tensor(count=5), "count is smaller": tensor(count=3), "count below zero": tensor(count=-4),
        "count of petabytes": tensor(count=10**15), "unknown storage": tensor(kind=b"ctorch\nFloatStorag\n"),
        "storage of another size": tensor(kind=b"ctorch\nDoubleStorage\n"), "storage is a function": tensor(kind=b"cos\nsystem\n"),
        "word of storage": tensor(word=text("package")), "key above the folder": tensor(key=text("../0")),
        "absolute key": tensor(key=text("/etc/passwd")), "key of the program": tensor(key=text("../data.pkl")), "key is a number": tensor(key=b"K\x00"),
        "key is none": tensor(key=b"N"), "storage is a list": b"ctorch._utils\n_rebuild_tensor_v2\n(]K\x00))\x89}tR",
        "storage is missing": b"ctorch._utils\n_rebuild_tensor_v2\n)R", "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n(N\x88}tR",
        "bytes of no type": b"ctorch._utils\n_rebuild_tensor_v3\n(NK\x00))\x89}cos\nsystem\ntR",
        "type of another storage": tensor().replace(b"_v2", b"_v3").replace(b"\x89}tR", b"\x89}ctorch\nuint16\ntR"),
    }.items():  # fmt: skip
        yield f"tensor: {name}", archive(state(made), data)
    twice = tensor() + text("x") + tensor(kind=b"ctorch\nIntStorage\n")
    yield "storage with two types", archive(state(twice), data)
    yield (
        "storages larger than the file",
        archive(state(*(tensor(count=4, key=text(str(i))) for i in range(90_000))), data),
    )
    good = state(tensor())
    yield "compressed", archive(good, data, how=zipfile.ZIP_DEFLATED)
    yield "bomb", archive(state(tensor(count=25 << 20)), ("data/0", bytes(100 << 20)), how=zipfile.ZIP_DEFLATED)
    yield "bomb in bzip2", archive(state(tensor(count=25 << 20)), ("data/0", bytes(100 << 20)), how=zipfile.ZIP_BZIP2)
    yield "bomb in lzma", archive(state(tensor(count=5 << 20)), ("data/0", bytes(20 << 20)), how=zipfile.ZIP_LZMA)
    yield "torchscript", archive(good, data, ("constants.pkl", b"N."))
    yield "big-endian", archive(good, data, ("byteorder", b"big"))
    yield "two programs", archive(good, data, ("x/data.pkl", good))
    yield "entry above the folder", archive(state(tensor(key=text("../../x"))), ("../../x", bytes(16)))
    yield "no storage", archive(good)
    yield "entries", archive(good, data, *((f"data/x{i}", b"") for i in range(150_000)))
    whole = archive(good, data)
    at, end = whole.rindex(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    first = whole.index(b"PK\x01\x02")
    yield "entry that lies about its size", whole[: at + 20] + b"\xff\xff\xff\x7f" * 2 + whole[at + 28 :]
    yield "entry that lies about its place", whole[: at + 42] + b"\xff\xff\xff\x7f" + whole[at + 46 :]
    yield "entry that says it is encrypted", whole[: at + 8] + b"\x01" + whole[at + 9 :]
    yield "entry of an unknown method", whole[: at + 10] + b"\x63" + whole[at + 11 :]
    yield "both entries are one", whole[: at + 42] + whole[first + 42 : first + 46] + whole[at + 46 :]
    yield "wrong checksum", whole[: at + 16] + b"\x00\x00\x00\x01" + whole[at + 20 :]
    yield "directory that lies about its size", whole[: end + 12] + b"\xff\xff\xff\x7f" + whole[end + 16 :]
    yield "directory that lies about its place", whole[: end + 16] + b"\xff\xff\xff\x7f" + whole[end + 20 :]
    yield "archive with a comment", whole[: end + 20] + b"\x04\x00" + b"PK\x05\x06"
    yield "archive cut off", whole[:-30]
    yield "nothing", b""
    yield "zeros", bytes(1000)
    yield "text", b"not a model at all"
    yield "legacy with a count that lies", legacy(good, ["0"], struct.pack("<q", 5) + bytes(20))
    yield "legacy with a count below zero", legacy(good, ["0"], struct.pack("<q", -4) + bytes(16))
    yield "legacy that breaks off", legacy(good, ["0"], struct.pack("<q", 4) + bytes(3))
    yield "legacy with strange keys", legacy(good, ["0", "1"], struct.pack("<q", 4) + bytes(16))
    yield "legacy with keys that are lists", legacy(good)[:-3] + b"](]](]]ee."


def files(sentinel: Path) -> dict[str, bytes]:
    """Every hostile file by name; `sentinel` is the file that most of them would make."""
    return {name: content for group in (calling(sentinel), wasting(), reaching()) for name, content in group}


# ------------------------------------------------------------------------------------------------ the judge


def _grown(field: str = "VmHWM") -> int:
    """Bytes that Linux says of this process."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split(f"{field}:")[1].split()[0]) << 10


def _watch(report: list[str]) -> None:
    """Note whatever a reader of files has no business with."""

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.split(".", maxsplit=1)[0] in {
            "import",
            "exec",
            "compile",
            "subprocess",
            "socket",
            "os",
            "ctypes",
            "pickle",
            "shutil",
        }:
            report.append(f"{event} {arguments!r:.80}")

    sys.addaudithook(seen)


def judge(read: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    """What came of reading one file in a process of its own."""
    import resource

    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        report: list[str] = []
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the highest memory counts from here
        before, room = _grown("VmRSS"), _grown("VmSize") + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        _watch(report)
        start = time.process_time()
        try:
            read(path)
            ended, said = "read", ""
        except BaseException as error:  # noqa: BLE001 - whatever comes is told
            ended, said = type(error).__name__, str(error)
        seconds = time.process_time() - start
        told = {"ended": ended, "said": said[:300], "executed": report, "seconds": seconds, "bytes": _grown() - before}
        os.write(theirs, json.dumps(told).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        json.loads(answer)
        if answer
        else {"ended": f"killed: {status}", "said": "", "executed": [], "seconds": SECONDS, "bytes": 0}
    )


def main(folder: Path) -> None:
    """Write the files, read each, and print what came of it."""
    import torch

    from metier.models import pickled

    sentinel = folder / "ran"
    # What is imported on first use is imported by honest files of both forms, and by names that are not ASCII.
    for codec in ("cp437", "raw_unicode_escape", "ascii", "latin1"):
        b"a".decode(codec)
    for new in (True, False):
        torch.save({"w": torch.zeros(2)}, folder / "honest.pt", _use_new_zipfile_serialization=new)
        pickled.read(folder / "honest.pt")
    path = folder / "hostile.pt"
    for name, content in files(sentinel).items():
        path.write_bytes(content)
        print(json.dumps({"name": name, **judge(pickled.read, path), "ran": sentinel.exists()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
