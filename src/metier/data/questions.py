"""Rows to be answered: the same files as for training, but without answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from metier.core import DataError
from metier.data.faults import refuse
from metier.data.files import read_table


def read_questions(path: Path) -> list[str | dict[str, Any]]:
    """The rows of a JSONL, JSON or CSV file; the lines of a text file, or of stdin for "-".

    Raises:
        DataError: If the file cannot be read, with every fault.
    """
    if str(path) == "-":
        return _lines(sys.stdin.read(), "stdin")
    if path.suffix.lower() in {".txt", ".md"}:
        try:
            return _lines(path.read_text("utf-8-sig"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(path), hint="name a UTF-8 text file") from None
    table = read_table(str(path))
    refuse(table.faults)
    return [dict(row.values) for row in table.rows]


def _lines(text: str, where: str) -> list[str | dict[str, Any]]:
    found: list[str | dict[str, Any]] = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise DataError("nothing to answer", where=where, hint="write one question a line")
    return found
