"""The rows of a CSV or TSV file, found once and read again where they stand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metier.data.faults import Faults, count
from metier.data.lines import PlacedRows, Source


def cell_rows(source: Source, kind: str, faults: Faults) -> PlacedRows:
    """Check every row and note where it stands; the first line names the columns.

    Args:
        source: The file, which is UTF-8 and not empty.
        kind: Its extension, which tells what stands between cells.
        faults: Takes what is wrong.
    """
    with _cells_of_any_size():
        return _rows(source, _delimiter(source, kind), faults)


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _rows(source: Source, delimiter: str, faults: Faults) -> PlacedRows:
    header: list[str] = []

    def values(text: str) -> dict[str, Any]:
        with _cells_of_any_size():
            return dict(zip(header, next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), strict=True))

    rows = PlacedRows(source, values)
    for line, begin, end, cells in _lines_of_cells(source, delimiter, faults):
        if not header:
            header += [cell.strip() for cell in cells]
            if not _header_is_good(header, line, faults):
                return rows
        elif len(cells) == len(header):
            rows.add(line, begin, end, dict(zip(header, cells, strict=True)))
        else:
            what = f"{count(len(cells), 'cell')} where the header has {len(header)}"
            faults.add("wrong number of cells", f"{faults.file}:{line}", what, CSV_HINT)
    return rows


def _lines_of_cells(source: Source, delimiter: str, faults: Faults) -> Iterator[tuple[int, int, int, list[str]]]:
    """Line, first byte, byte behind it and cells of every row that is not empty, up to the first that is no CSV."""
    lines = _Measured(source)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line, begin = reader.line_num + 1, lines.end
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add("not CSV", f"{faults.file}:{line}", f"not CSV: {_csv_words(error)}", CSV_HINT)
            return
        if any(cells):
            yield line, begin, lines.end, cells


class _Measured(Iterator[str]):
    """The lines of a file, and where the last one ended.

    Attributes:
        end: The byte behind it.
    """

    def __init__(self, source: Source) -> None:
        self.end, self._lines = source.begin(), source.text_lines()

    def __next__(self) -> str:
        line = next(self._lines)
        self.end += len(line.encode())
        return line


CSV_HINT = 'a text with a comma, quote or line break stands in "double quotes", and a quote inside is written ""'


def _csv_words(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote that opens in this row is never closed"
    return "text follows a closing quote" if "expected after" in str(error) else str(error)


def _delimiter(source: Source, kind: str) -> str:
    """Tab for .tsv; for .csv whichever of comma, semicolon and tab the header has most of."""
    if kind != ".csv":
        return "\t"
    header = next(source.texts()).lstrip("\r\n").split("\n", 1)[0]
    return max(",;\t", key=header.count)


def _header_is_good(header: list[str], line: int, faults: Faults) -> bool:
    twice = sorted({name for name in header if header.count(name) > 1})
    if not twice:
        return True
    named = ", ".join(name or "(nameless)" for name in twice)
    faults.add(
        "header", f"{faults.file}:{line}", f"the header has {named} twice", "the first line names each column once"
    )
    return False
