"""From a path to rows: bytes are checked, decoded and parsed here, and every fault knows its line.

JSONL, CSV and a JSON array are read some at a time, and a row is parsed again whenever it is asked for, so that no file
is too large for memory; a gzip file that is large is unpacked to the disk first. Held whole are only the rarer forms:
one object that holds the rows, lines that end in a carriage return alone, and a file that is not UTF-8, to tell all
that is wrong with it. Kinds are told apart by extension and, where that lies, by content.
"""

from __future__ import annotations

import gzip
import io
import stat
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from metier.core import DataError
from metier.core.files import cache_root
from metier.data.cell_rows import cell_rows
from metier.data.faults import Faults, count, excerpt, nearest
from metier.data.lines import BLANK, PlacedRows, Row, Source, as_object, json_values, line_rows, parsed
from metier.data.strict_json import NotJSONError, elements, members, parse

MAX_BYTES = 20 << 30
"""Largest content that is read."""
IN_MEMORY_BYTES = 16 << 20
"""A smaller file is read once and kept, so that nobody can change it while it is used."""
BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""Text compresses some 3 to 20 times, DEFLATE at most 1032 times: above this ratio, after a GiB, we stop."""
BLOCK_BYTES = 1 << 20
MARK_AND_BLANKS = b"\xef\xbb\xbf \t\r\n"

TO_JSONL = (
    "convert it: python -c \"import pandas; pandas.read_KIND('PATH')"
    ".to_json('STEM.jsonl', orient='records', lines=True, force_ascii=False)\""
)
OTHER_KINDS = {
    ".parquet": TO_JSONL.replace("KIND", "parquet"),
    ".xlsx": "save it as CSV UTF-8 in the spreadsheet, or " + TO_JSONL.replace("KIND", "excel"),
    ".xls": "save it as CSV UTF-8 in the spreadsheet, or " + TO_JSONL.replace("KIND", "excel"),
    ".arrow": TO_JSONL.replace("KIND", "feather"),
    ".feather": TO_JSONL.replace("KIND", "feather"),
    ".pkl": "pickles are not read, for they can run code; write the rows as JSONL",
    ".zip": "unpack it and name the file inside",
    ".bz2": "unpack it with bunzip2, or pack it with gzip",
    ".xz": "unpack it with unxz, or pack it with gzip",
    ".zst": "unpack it with unzstd, or pack it with gzip",
    ".7z": "unpack it and name the file inside",
    ".txt": 'write each document as one line {"text": "..."} of a .jsonl file',
    ".md": 'write each document as one line {"text": "..."} of a .jsonl file',
    ".yaml": "write the rows as JSONL",
    ".yml": "write the rows as JSONL",
}
MAGIC = {
    b"PAR1": ".parquet",
    b"PK\x03\x04": ".zip",
    b"ARROW1": ".arrow",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"7z\xbc\xaf": ".7z",
    b"\xd0\xcf\x11\xe0": ".xls",
    **{b"\x80" + bytes([protocol]): ".pkl" for protocol in range(2, 6)},
}
SHEET = b"xl/"
"""Folder in the archive that an xlsx file is."""
STRANGERS = {
    b"version https://git-lfs": ("is a pointer of Git LFS, not the rows", "get the file itself: git lfs pull"),
    b"<!doctype html": ("is a web page, not rows", "download the file itself, not the page that shows it"),
    b"<html": ("is a web page, not rows", "download the file itself, not the page that shows it"),
    b"<?xml": ("is XML, not rows", "write the rows as JSONL"),
    b"%pdf": ("is a PDF, not rows", "write the rows as JSONL"),
    b"\x89hdf": ("is an HDF5 file, not rows", "cells are for task=cells; write other rows as JSONL"),
    b"gguf": ("is a model (GGUF), not rows", "name it with model.base, and the rows with data.train"),
    b"sqlite format 3": ("is a database, not rows", "write the rows as JSONL"),
    b"\x93numpy": ("is a NumPy array, not rows", "write the rows as JSONL"),
    b"\0\0\0\0\0\0\0\0": ("begins with zero bytes, as a file that was never written whole", "copy it again"),
}
"""First bytes, in lower case, of what is met under the name of a row file, and what to do."""
LINE_KINDS = {".jsonl", ".ndjson"}
JSON_KINDS = LINE_KINDS | {".json"}
TABLE_KINDS = {".csv", ".tsv", ".tab"}


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file.

    Attributes:
        file: The path as the user gave it.
        rows: Every row that could be parsed.
        faults: What could not.
        header: Whether the columns come from the first line of a CSV file.
    """

    file: str
    rows: Sequence[Row]
    faults: Faults
    header: bool = False

    def columns(self) -> tuple[str, ...]:
        """Every column that some row has, in the order of appearance."""
        if isinstance(self.rows, PlacedRows):
            return tuple(self.rows.columns)
        return tuple(dict.fromkeys(column for row in self.rows for column in row.values))

    def where(self, line: int) -> str:
        """File and line."""
        return f"{self.file}:{line}"


def read_table(file: str) -> Table:
    """Read every row of a file.

    Raises:
        DataError: If the file is not there, not a regular file, empty, too large, or not a kind we read.
    """
    path = _located(file)
    source = _source(file, path)
    head = source.head()
    kind = _kind(file, path, head)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("not UTF-8 at byte 1", where=f"{file}:1", hint=_encoding(head, file))
    faults = Faults(file)
    if kind in LINE_KINDS and head.lstrip(MARK_AND_BLANKS).startswith(b"{"):
        rows = line_rows(source, faults, lambda start: _encoding(start, file))
        if rows is not None:
            return Table(file, rows, faults)
    if kind in TABLE_KINDS and _is_text(source):
        return Table(file, cell_rows(source, kind, faults), faults, header=True)
    if kind == ".json" and head.lstrip(MARK_AND_BLANKS).startswith(b"[") and _is_text(source):
        return _array(source, faults)
    return _held(source, kind, faults)


def _is_text(source: Source) -> bool:
    """Whether a file is UTF-8 throughout and holds more than blanks."""
    try:
        return sum(bool(text.strip(BLANK)) for text in source.texts()) > 0
    except UnicodeDecodeError:
        return False


def _held(source: Source, kind: str, faults: Faults) -> Table:
    """The rows of a file that is held whole.

    Raises:
        DataError: If it is empty.
    """
    text, bad_lines = _decoded(source.whole(), faults)
    if not text.strip(BLANK):
        raise DataError("is empty", where=faults.file, hint="it needs one row for each example")
    if kind in TABLE_KINDS:
        return Table(faults.file, (), faults)
    return _json_table(faults.file, text, kind, faults, bad_lines)


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file."""
    try:
        return _located(one).samefile(_located(other))
    except (OSError, ValueError):
        return False


def _located(file: str) -> Path:
    try:
        return Path(file).expanduser()
    except RuntimeError:  # a home folder of nobody
        return Path(file)


def _source(file: str, path: Path) -> Source:
    try:
        _regular(file, path)
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                return _unpacked(file, raw)
            if path.stat().st_size <= IN_MEMORY_BYTES:
                return Source(file, io.BytesIO(raw.read()), watched=False)
        return Source(file, path.open("rb"), watched=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot be read: {reason}", where=file, hint="check the path and its permissions") from None


def _regular(file: str, path: Path) -> None:
    if not path.exists():
        raise DataError("does not exist", where=file, hint=_did_you_mean(file, path))
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode):
        found = sorted(child.name for child in path.iterdir() if _extension(child) in JSON_KINDS | TABLE_KINDS)
        hint = f"name a file in it, such as {path / found[0]}" if found else "name a JSONL, JSON or CSV file"
        raise DataError("is a folder, not a file", where=file, hint=hint)
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(
            "is not a regular file but a pipe, socket or device", where=file, hint="copy the rows to a file"
        )
    if facts.st_size > MAX_BYTES:
        size = f"{facts.st_size / (1 << 30):,.0f} GiB"
        raise DataError(f"holds {size}; at most 20 GiB are read", where=file, hint="take a sample of its rows")


def _did_you_mean(file: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}; paths start at {Path.cwd()}"
    near = nearest(path.name, [child.name for child in folder.iterdir()])
    if near:
        return f"did you mean {folder / near}?"
    if not path.suffix and file.count("/") == 1:
        return "if it is a data set of the Hugging Face Hub, download it and name a file of it"
    return f"paths start at {Path.cwd()}"


def _unpacked(file: str, raw: BinaryIO) -> Source:
    """The content of a gzip file, on disk where it is large; stopped early where it is a decompression bomb."""
    size_packed = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    blocks: Any = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=str(folder))  # noqa: SIM115
    unpacked = Source(file, blocks, watched=False)
    size = 0
    try:
        with gzip.open(raw) as stream:
            while block := stream.read(BLOCK_BYTES):
                blocks.write(block)
                size += len(block)
                if size > MAX_BYTES or (size > BOMB_BYTES and size > BOMB_RATIO * size_packed):
                    raise DataError(
                        f"unpacks to more than {size / (1 << 30):.0f} GiB from {count(size_packed, 'byte')}",
                        where=file,
                        hint="unpack it yourself and look at what it holds",
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"not a whole gzip file: {error}", where=file, hint="copy or download it again") from None
    return unpacked


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".gzip"}:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _kind(file: str, path: Path, content: bytes) -> str:
    """The extension that tells how to read the file; content speaks where the name says nothing."""
    extension = _extension(path)
    for magic, other in MAGIC.items():
        if content.startswith(magic):
            extension = extension if extension in OTHER_KINDS else other
            extension = ".xlsx" if extension == ".zip" and SHEET in content else extension
    if extension in OTHER_KINDS:
        hint = OTHER_KINDS[extension].replace("PATH", file).replace("STEM", path.stem)
        raise DataError(f"a {extension} file is not read", where=file, hint=hint)
    _check_content(file, path, extension, content)
    if extension in JSON_KINDS | TABLE_KINDS:
        return extension
    if content.lstrip(MARK_AND_BLANKS)[:1] in {b"{", b"["}:
        return ".json"
    raise DataError(
        f"an unknown kind of file ({extension or 'no extension'})",
        where=file,
        hint="rows are read from .jsonl, .json, .csv and .tsv, each also with .gz",
    )


def _check_content(file: str, path: Path, extension: str, content: bytes) -> None:
    """Refuse what its first bytes say is something else than its name says.

    Raises:
        DataError: With what it is.
    """
    start = content.lstrip(MARK_AND_BLANKS)[:64]
    for mark, (what, hint) in STRANGERS.items():
        if start.lower().startswith(mark):
            raise DataError(what, where=file, hint=hint)
    stem = path.name.partition(".")[0]
    line = content.lstrip(b"\xef\xbb\xbf").partition(b"\n")[0].strip()
    if extension in TABLE_KINDS and line.startswith(b'{"') and line.endswith(b"}"):
        raise DataError("holds JSON lines, not a table", where=file, hint=f"rename it to {stem}.jsonl")
    is_words = line[:1].isalpha() or line[:1] == b'"'
    if extension in LINE_KINDS and is_words and any(mark in line for mark in (b",", b"\t", b";")):
        what = f"holds no JSON; its first line is {excerpt(line.decode('utf-8', 'replace'), 40)!r}"
        raise DataError(what, where=file, hint=f"if it is a table, rename it to {stem}.csv")


def _decoded(content: bytes, faults: Faults) -> tuple[str, frozenset[int]]:
    """The text, and the numbers of lines that are not UTF-8."""
    try:
        return content.decode("utf-8-sig"), frozenset()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        bad_lines = frozenset(_bad_lines(content))
        others = f", and {count(len(bad_lines) - 1, 'more line')} likewise" if len(bad_lines) > 1 else ""
        faults.add(
            "not UTF-8", f"{faults.file}:{line}", f"not UTF-8 at byte {column}{others}", _encoding(content, faults.file)
        )
        return content.decode("utf-8-sig", errors="replace"), bad_lines


def _bad_lines(content: bytes) -> Iterator[int]:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            yield number


def _encoding(content: bytes, file: str) -> str:
    """How to convert, with the encoding guessed."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _convert("UTF-16", file)
    sample = content[: 1 << 16].rsplit(b"\n", 1)[0]
    try:
        foreign = [character for character in sample.decode("gb18030") if ord(character) > 0x7F]
    except UnicodeDecodeError:
        return _convert("WINDOWS-1252", file)
    # GB2312's first-level characters are the 3,755 common ones; Western text read as GB18030 rarely falls there.
    common = sum(0xB0 <= character.encode("gb18030")[0] <= 0xD7 for character in foreign)
    return _convert("GB18030" if foreign and common > len(foreign) / 2 else "WINDOWS-1252", file)


def _convert(encoding: str, file: str) -> str:
    guess = "GBK/GB18030, as Chinese Windows writes" if encoding == "GB18030" else encoding
    return f"it looks like {guess}; convert it: iconv -f {encoding} -t UTF-8 '{file}' > utf8.{Path(file).name}"


def _json_table(file: str, text: str, kind: str, faults: Faults, bad_lines: frozenset[int]) -> Table:
    """Rows of a JSONL or JSON file, whichever it really is."""
    start = len(text) - len(text.lstrip("\ufeff \t\r\n"))
    if text[start] == "[" and (kind == ".json" or not _complete(text[start:].split("\n", 1))):
        return _array(Source(file, io.BytesIO(text.encode()), watched=False), faults)
    if text[start] == "{" and kind == ".json":
        rows = _object_rows(text, start, faults)
        if rows is not None:
            return Table(file, tuple(rows), faults)
    return Table(file, tuple(_line_rows(text, faults, bad_lines)), faults)


def _complete(lines: list[str]) -> bool:
    """Whether the first line is a whole JSON value and others follow."""
    try:
        parse(lines[0].strip())
    except NotJSONError:
        return False
    return len(lines) > 1 and bool(lines[1].strip())


def _line_rows(text: str, faults: Faults, bad_lines: frozenset[int]) -> Iterator[Row]:
    end = "\n" if "\n" in text else "\r"
    for number, line in enumerate(text.split(end), 1):
        if not line.strip(BLANK) or number in bad_lines:
            continue
        values = parsed(line, number, faults)
        if values is not None:
            yield Row(number, values)


def _array(source: Source, faults: Faults) -> Table:
    """The rows of a JSON array that is the whole file; none where it is no whole array."""
    rows, found = PlacedRows(source, json_values), Faults(faults.file)
    end, line = source.begin(), 1
    blocks = source.texts()
    first = next(blocks)
    try:
        for before, text, value in elements(chain([first], blocks), len(first) - len(first.lstrip(BLANK))):
            begin, line = end + len(before.encode()), line + before.count("\n")
            end = begin + len(text.encode())
            values = as_object(value, f"{faults.file}:{line}", found)
            if values is not None:
                rows.add(line, begin, end, values)
            line += text.count("\n")
    except NotJSONError as error:
        if not error.is_behind:
            rows, found = PlacedRows(source, json_values), Faults(faults.file)
        found.add("not JSON", f"{faults.file}:{error.line}", f"not JSON: {error.what}", error.hint)
    faults.extend(found)
    return Table(faults.file, rows, faults)


def _located_rows(text: str, found: Iterator[tuple[int, Any]], faults: Faults) -> Iterator[Row]:
    line, seen = 1, 0
    for place, value in found:
        line, seen = line + text.count("\n", seen, place), place
        values = as_object(value, f"{faults.file}:{line}", faults)
        if values is not None:
            yield Row(line, values)


def _not_json(text: str, error: NotJSONError, faults: Faults) -> None:
    line = text.count("\n", 0, error.place) + 1
    faults.add("not JSON", f"{faults.file}:{line}", f"not JSON: {error.what}", error.hint)


def _object_rows(text: str, start: int, faults: Faults) -> list[Row] | None:
    """Rows of one object that holds one array; None where the file is a sequence of objects after all."""
    try:
        found, end = members(text, start)
    except NotJSONError as error:
        if _complete(text[start:].split("\n", 1)):
            return None
        _not_json(text, error, faults)
        return []
    if text[end:].strip():
        return None
    arrays = {key: items for key, (_, items) in found.items() if isinstance(items, list)}
    of_rows = {key: items for key, items in arrays.items() if items and all(isinstance(v, dict) for _, v in items)}
    if len(of_rows) == 1 and not of_rows.keys() & {"messages", "conversations"}:
        return list(_located_rows(text, iter(next(iter(of_rows.values()))), faults))
    if len(of_rows) > 1 or (arrays and len(arrays) == len(found) and not of_rows):
        what = f"one object with {count(len(found), 'key')} ({', '.join(list(found)[:8])}), not an array of rows"
        faults.add("not rows", f"{faults.file}:1", what, 'write one object per row: [{"column": value, ...}, ...]')
        return []
    return None
