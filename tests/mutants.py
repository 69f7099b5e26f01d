"""Honest files changed at random, and the readers that must answer each with a value or with one of our own errors."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hostile

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)  # fmt: skip
WORDS = {
    "json": (b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"-1", b"1e999", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n",
             b"\\ud800", b"\\u0000", b"true", b"9" * 400, b"[" * 3000, b'"dtype"', b'"data_offsets"', b"F64", b"__metadata__", b"\x00"),
    "pickle": (*(bytes([code]) for code in range(256)), b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
               b"ccollections\nOrderedDict\n", b"\x8b\xff\xff\xff\x7f", b"h\x00", b"q\x00", b"(", b"t", b"R", b"Q", b"b", b"}", b"u", b".", b"\x93"),
    "binary": (*(struct.pack("<Q", number) for number in NUMBERS), *(struct.pack("<I", number & 0xFFFFFFFF) for number in NUMBERS),
               b"\x00", b"\xff", b"\xff" * 8, b"GGUF", b"\x89HDF\r\n\x1a\n", b"TREE", b"HEAP", b"SNOD", b"OHDR"),
}  # fmt: skip


@dataclass(frozen=True)
class Parser:
    """A reader, honest files for it, and the words that its format is made of."""

    name: str
    suffix: str
    seeds: Callable[[], tuple[bytes, ...]]
    words: str
    read: Callable[[Path], Any]
    dress: Callable[[bytes, random.Random], bytes] = lambda content, _: content
    """Puts a mutant where only a checksum or a length would have caught it."""


def mutant(parser: Parser, number: int) -> bytes:
    """The mutant of this number; the same at any time."""
    dice = random.Random(f"{parser.name} {number}")
    seeds = parser.seeds()
    content = bytearray(dice.choice(seeds))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 5, 12))):
        _change(content, dice, WORDS[parser.words], seeds)
    return parser.dress(bytes(content), dice)


def _change(content: bytearray, dice: random.Random, words: tuple[bytes, ...], seeds: tuple[bytes, ...]) -> None:
    at = dice.randrange(len(content) + 1)
    end = min(len(content), at + dice.choice((1, 2, 4, 8, 32, 200)))
    match dice.randrange(9):
        case 0 | 1:
            for place in range(at, min(at + 1, len(content))):
                content[place] ^= 1 << dice.randrange(8)
        case 2:
            content[at : at + 1] = bytes([dice.randrange(256)])
        case 3:
            word = dice.choice(words)
            content[at : at + len(word)] = word
        case 4:
            content[at:at] = dice.choice(words)
        case 5:
            del content[at:end]
        case 6:
            content[at:at] = content[at:end] * dice.choice((1, 2, 50))
        case 7:
            del content[at:]
        case _:
            other = dice.choice(seeds)
            start = dice.randrange(len(other) + 1)
            content[at:end] = other[start : start + end - at]


# ------------------------------------------------------------------------------------------------ honest files


@cache
def pickles() -> tuple[bytes, ...]:
    """Programs of torch.save, without the archive around them, and files of the old form."""
    import torch
    from torch import nn

    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleDict({"a": nn.Linear(3, 1)}))
    values: list[Any] = [module.state_dict(), module, {"net": module, "epoch": 3, "seen": {1, 2}}]
    values += [{"w": torch.ones(12).bfloat16(), "u": torch.ones(6).to(torch.uint16), "p": nn.Parameter(torch.ones(3))}]
    found = []
    for value in values:
        for how in ({}, {"pickle_protocol": 4}):
            file = io.BytesIO()
            torch.save(value, file, **how)
            with zipfile.ZipFile(file) as archive:
                found.append(archive.read("archive/data.pkl"))
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=False)
        found.append(file.getvalue())
    return tuple(found)


def _archived(content: bytes, dice: random.Random) -> bytes:
    """Mostly a whole archive around a changed program; sometimes an archive that is changed itself."""
    if content[:2] == b"\x80\x02" and content[2:3] == b"\x8a":
        return content  # the old form
    sizes = (24, 12, 12, 12, 12, 12, 8, 12, 4)  # of the network's nine tensors
    storages = [(f"data/{key}", bytes(range(size))) for key, size in enumerate(sizes)]
    whole = hostile.archive(content, *storages)
    if dice.random() < 0.2:
        whole_ = bytearray(whole)
        _change(whole_, dice, WORDS["binary"], (whole,))
        return bytes(whole_)
    return whole


@cache
def safetensors() -> tuple[bytes, ...]:
    """Small files of several types, one without tensors."""
    import torch
    from safetensors.torch import save

    states: list[dict[str, Any]] = [
        {"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "c.d": torch.arange(3)},
        {"empty": torch.empty(0, 4), "one": torch.tensor(1.5), "flags": torch.ones(7).bool()},
    ]
    return tuple(save(state, metadata=told) for state in states for told in (None, {"format": "pt"}))


def _fitting(content: bytes, dice: random.Random) -> bytes:
    """Mostly with the length of the header put right, so that the header itself is read."""
    end = content.rfind(b"}") + 1
    while content[end : end + 1] == b" ":
        end += 1
    if dice.random() < 0.7 and end > 8:
        return struct.pack("<Q", end - 8) + content[8:]
    return content


@cache
def ggufs() -> tuple[bytes, ...]:
    """Headers with values of every type, and two tensors."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("a.float") + struct.pack("<If", 6, 0.5),
        text("a.flag") + struct.pack("<I?", 7, True),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("ab") + text("c"),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text("lists") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ2i", 5, 2, 1, -1),
    ]
    tensors = [
        text("token_embd.weight") + struct.pack("<I2QIQ", 2, 32, 2, 0, 0),
        text("blk.0.attn_q.weight") + struct.pack("<I1QIQ", 1, 32, 8, 256),
    ]
    found = []
    for version, many in ((3, pairs), (2, pairs[:2])):
        head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(many)) + b"".join(many) + b"".join(tensors)
        found.append(head + bytes(-len(head) % 32) + bytes(256 + 34))
    return tuple(found)


@cache
def rows() -> tuple[bytes, ...]:
    """Rows of every format, as JSONL and as JSON."""
    many: list[list[dict[str, Any]]] = [
        [{"prompt": f"question {i} 问", "completion": f"answer {i}"} for i in range(4)],
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u2028"}]}, {"text": "x"}],
        [{"text": "long " * 20, "label": 1}, {"text": "", "label": None}, {"text": "e", "label": 1.5}],
    ]
    lines = ["\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for row in part) for i, part in enumerate(many)]
    whole = [json.dumps(part, indent=1) for part in many]
    encoded = [text.encode() for text in (*lines, *whole)]
    return (*encoded, lines[0].encode("utf-8-sig"), lines[1].replace("\n", "\r\n").encode())


@cache
def cells() -> tuple[bytes, ...]:
    """Small h5ad files of counts, dense and sparse."""
    import tempfile
    import warnings

    import made_cells

    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dense in (False, True):
            rna, _ = made_cells.synthetic(cells=6, genes=5, proteins=2)
            if dense:
                rna.X = rna.X.toarray()
            path = Path(folder) / "cells.h5ad"
            rna.write_h5ad(path)
            found.append(path.read_bytes())
    return tuple(found)


def _read_pickle(path: Path) -> None:
    from metier.models import pickled

    pickled.read(path)


def _read_safetensors(path: Path) -> None:
    from metier.models import safetensors_file

    safetensors_file.load(path)


def _read_gguf(path: Path) -> None:
    from metier.models import gguf_file

    gguf_file.read(path)


def _read_rows(path: Path) -> None:
    from metier.data.faults import refuse
    from metier.data.files import read_table

    table = read_table(str(path))
    for row in table.rows:
        assert isinstance(row.values, dict)
    refuse(table.faults)


def _read_cells(path: Path) -> None:
    from metier.data.cells import read_cells

    read_cells(path, with_proteins=False, organism=None)


PARSERS = (
    Parser("pickle", ".pt", pickles, "pickle", _read_pickle, _archived),
    Parser("safetensors", ".safetensors", safetensors, "json", _read_safetensors, _fitting),
    Parser("GGUF", ".gguf", ggufs, "binary", _read_gguf),
    Parser("JSONL", ".jsonl", rows, "json", _read_rows),
    Parser("h5ad", ".h5ad", cells, "binary", _read_cells),
)


def outcomes(
    parser: Parser, numbers: range, folder: Path, began: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, str]]:
    """What became of each mutant: "read", the name of our error, or what was not caught."""
    from metier.core import MetierError

    path = folder / f"mutant{parser.suffix}"
    for number in numbers:
        began(number)
        path.write_bytes(mutant(parser, number))
        try:
            parser.read(path)
            yield number, "read"
        except MetierError as error:
            yield number, type(error).__name__
        except Exception as error:  # noqa: BLE001 - what this is about
            yield number, f"not caught: {type(error).__name__}: {str(error)[:100]}"
