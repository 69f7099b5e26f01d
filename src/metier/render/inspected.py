"""What `metier inspect` shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from metier.render.screen import screen
from metier.report import Voice

if TYPE_CHECKING:
    from rich.console import Console

    from metier.models import Inspected

MOST_ROWS = 40
"""Tensors and classes that are shown one by one; --json has them all."""
MOST_CALLS = 20


def as_json(found: Inspected) -> dict[str, Any]:
    """The whole finding as plain values."""
    return {**asdict(found), "parameters": _elements(found), "dtypes": _by_dtype(found)}


def show(found: Inspected) -> None:
    """What it is, what it would have run, its classes and tensors, and how metier would train it."""
    console, voice = screen(), Voice("en")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(found, voice).items():
        facts.add_row(name, Text(_plain(value)))
    console.print(facts)
    if found.calls:
        console.print("\nReading it elsewhere would run:", style="bold red")
        for call in found.calls[:MOST_CALLS]:
            console.print(f"  {call}", markup=False)
        _more(console, len(found.calls) - MOST_CALLS)
    _tree(console, found)
    _tensors(console, found, voice)
    console.print(f"\ntrains: {_plain(found.trains)}", markup=False)
    if found.recipe:
        console.print("model:", markup=False)
        for line in found.recipe:
            console.print(f"  {_plain(line)}", markup=False)


def _facts(found: Inspected, voice: Voice) -> Mapping[str, str]:
    told = {"path": found.path, "format": found.format, "size": voice.size(found.bytes)}
    if found.architecture:
        told["architecture"] = found.architecture
    if found.tensors:
        kinds = ", ".join(
            f"{count:,} {dtype}" for dtype, count in Counter(t.dtype for t in found.tensors).most_common()
        )
        told["tensors"] = f"{len(found.tensors):,} ({kinds}), {_elements(found):,} numbers"
    return {**told, **found.facts}


def _tree(console: Console, found: Inspected) -> None:
    if not found.classes:
        return
    console.print(f"\n{len(found.classes):,} modules", style="bold")
    for path, kind in list(found.classes.items())[:MOST_ROWS]:
        scalars = ", ".join(
            f"{name.rpartition('.')[2]}={value!r:.40}"
            for name, value in found.scalars.items()
            if name.rpartition(".")[0] == path and name.rpartition(".")[2] != "training"
        )
        line = Text(
            f"  {'  ' * path.count('.')}{path.rpartition('.')[2] or '(whole)'}: {_plain(kind.rpartition('.')[2])}"
        )
        line.append(f"  {_plain(scalars)}", style="dim")
        console.print(line, no_wrap=True, overflow="ellipsis")
    _more(console, len(found.classes) - MOST_ROWS)


def _tensors(console: Console, found: Inspected, voice: Voice) -> None:
    if not found.tensors:
        return
    console.print()
    table = Table(box=None, pad_edge=False)
    for title in ("tensor", "dtype", "shape", "size"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for tensor in found.tensors[:MOST_ROWS]:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(Text(_plain(tensor.name)), tensor.dtype, shape, voice.size(tensor.bytes))
    console.print(table)
    _more(console, len(found.tensors) - MOST_ROWS)


def _more(console: Console, count: int) -> None:
    if count > 0:
        console.print(f"  ... and {count:,} more; --json shows all", style="dim")


def _elements(found: Inspected) -> int:
    return sum(math.prod(tensor.shape) for tensor in found.tensors)


def _by_dtype(found: Inspected) -> dict[str, dict[str, int]]:
    """Count and bytes for each type."""
    told: dict[str, dict[str, int]] = {}
    for tensor in found.tensors:
        row = told.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.bytes
    return told


def _plain(text: str) -> str:
    """Names come out of the file, which must not move the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
