"""Rows of a file that are read again as they are asked for: held is only where each row stands."""

from __future__ import annotations

import codecs
import io
import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from metier.core import DataError
from metier.core.lazily import Made
from metier.data.faults import Faults, count
from metier.data.strict_json import NotJSONError, parse

HEAD_BYTES = 1 << 16
"""Bytes from which the kind and the encoding of a file are told."""
BLOCK_BYTES = 1 << 20
BLANK = "\ufeff \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stood in the file.

    Attributes:
        line: Line on which the row begins, from 1.
        values: Column to value.
    """

    line: int
    values: dict[str, Any]


class Source:
    """The bytes of a file, in memory or where they stand."""

    def __init__(self, file: str, raw: IO[bytes], *, watched: bool) -> None:
        """Take an open file; it is closed with the source.

        Args:
            file: The path as the user gave it.
            raw: What to read from.
            watched: Whether somebody else could change it meanwhile.
        """
        self._file, self._raw = file, raw
        self._facts = self._now() if watched else None
        weakref.finalize(self, raw.close)

    def head(self) -> bytes:
        """The beginning."""
        self._raw.seek(0)
        return self._raw.read(HEAD_BYTES)

    def whole(self) -> bytes:
        """Everything."""
        self._raw.seek(0)
        return self._raw.read()

    def lines(self) -> Iterator[bytes]:
        """Line by line, each with its end."""
        self._raw.seek(0)
        return iter(self._raw)

    def blocks(self) -> Iterator[bytes]:
        """Some at a time."""
        self._raw.seek(0)
        return iter(lambda: self._raw.read(BLOCK_BYTES), b"")

    def texts(self) -> Iterator[str]:
        """Some at a time as text, without the mark that may stand before UTF-8."""
        return codecs.iterdecode(self.blocks(), "utf-8-sig")

    def text_lines(self) -> Iterator[str]:
        r"""Line by line as text, each with its end, which may be \n, \r or both."""
        self._raw.seek(0)
        lines = io.TextIOWrapper(self._raw, "utf-8-sig", newline="")
        try:
            for line in lines:  # noqa: UP028 - `yield from` would close the file with the generator
                yield line
        finally:
            lines.detach()  # or it would close the file with itself

    def begin(self) -> int:
        """Byte at which the text begins."""
        return len(codecs.BOM_UTF8) if self.head().startswith(codecs.BOM_UTF8) else 0

    def read(self, start: int, stop: int) -> bytes:
        """Some of it.

        Raises:
            DataError: If the file is no longer the one that was checked.
        """
        if self._facts is not None and self._now() != self._facts:
            hint = "start again; while a run reads a large file, write new rows to another one"
            raise DataError("has changed since it was checked", where=self._file, hint=hint)
        self._raw.seek(start)
        return self._raw.read(stop - start)

    def _now(self) -> tuple[int, int]:
        facts = os.fstat(self._raw.fileno())
        return facts.st_size, facts.st_mtime_ns


class PlacedRows(Made[Row]):
    """The rows of a file of which only the places are held; a row is parsed again when it is asked for.

    Attributes:
        columns: Every column that some row has, in the order of appearance.
    """

    def __init__(self, source: Source, values: Callable[[str], dict[str, Any]]) -> None:
        """Begin with no row.

        Args:
            source: The file.
            values: Gives the values of a row from its text, which was found to be good before.
        """
        self._source, self._values = source, values
        self._begin, self._end, self._line = array("q"), array("q"), array("q")
        self.columns: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._line)

    def make(self, place: int) -> Row:
        """Parse a row."""
        text = self._source.read(self._begin[place], self._end[place]).decode("utf-8")
        return Row(self._line[place], self._values(text))

    def add(self, line: int, begin: int, end: int, values: dict[str, Any]) -> None:
        """Note where a row stands."""
        self._line.append(line)
        self._begin.append(begin)
        self._end.append(end)
        if not self.columns.keys() >= values.keys():
            self.columns |= dict.fromkeys(values)


def json_values(text: str) -> dict[str, Any]:
    """The values of a row that was strictly parsed before: nothing else is wanted now."""
    found: dict[str, Any] = json.loads(text.strip(BLANK))
    return found


def line_rows(source: Source, faults: Faults, encoding: Callable[[bytes], str]) -> PlacedRows | None:
    """Check every line and note where the rows stand; None where the file has no line break, and so no lines.

    Args:
        source: The file.
        faults: Takes what is wrong.
        encoding: Takes the head of a file that is not UTF-8 and says how to convert it.
    """
    rows, found, bad = PlacedRows(source, json_values), Faults(faults.file), _BadLines()
    end = number = 0
    for number, raw in enumerate(source.lines(), 1):
        begin, end = end, end + len(raw)
        if end == len(raw) and not raw.endswith(b"\n"):
            return None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.add(number, error.start + 1)
            continue
        if text.strip(BLANK):
            values = parsed(text, number, found)
            if values is not None:
                rows.add(number, begin, end, values)
    if bad.lines:
        faults.add("not UTF-8", f"{faults.file}:{bad.line}", bad.said(), encoding(source.head()))
    faults.extend(found)
    return rows


@dataclass(slots=True)
class _BadLines:
    """Lines that are not UTF-8: how many, and where the first one stops being it."""

    lines: int = 0
    line: int = 0
    column: int = 0

    def add(self, line: int, column: int) -> None:
        if not self.lines:
            self.line, self.column = line, column
        self.lines += 1

    def said(self) -> str:
        others = f", and {count(self.lines - 1, 'more line')} likewise" if self.lines > 1 else ""
        return f"not UTF-8 at byte {self.column}{others}"


def parsed(text: str, number: int, faults: Faults) -> dict[str, Any] | None:
    """The object that a line holds; None, and a fault, where it holds none."""
    where = f"{faults.file}:{number}"
    try:
        # Columns are counted in the line as an editor shows it.
        value = parse(text.rstrip("\r\n").lstrip("\ufeff"))
    except NotJSONError as error:
        faults.add("not JSON", where, f"not JSON: {error.what}", error.hint)
        return None
    return as_object(value, where, faults)


def as_object(value: Any, where: str, faults: Faults) -> dict[str, Any] | None:
    """The value if it is an object; None, and a fault, where it is something else."""
    if isinstance(value, dict):
        return value
    faults.add(
        "not an object", where, f"the row is {_named(value)}, not an object", 'write it as {"column": value, ...}'
    )
    return None


def _named(value: Any) -> str:
    names = {str: "a text", list: "a list", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "an object")
