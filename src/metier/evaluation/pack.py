"""The retention pack: neutral items on which nothing should be lost, and others that choose or are replayed.

What is reported is measured on the pack alone; what chooses and what is trained on stands in a file of its own, so that
no reported figure was looked at before.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from metier.core import DataError, Fault, RecipeError

KEYS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "reply": ("prompt", "text"),
    "choice": ("prompt", "choices", "answer"),
    "triple": ("anchor", "same", "other"),
}
"""The keys of each kind of item, beside id, language and kind."""


SHIPPED: Mapping[str, tuple[str, ...]] = {"neutral": ("en", "zh"), "neutral-en": ("en",), "neutral-zh": ("zh",)}
"""Names of the shipped pack, whole or by language."""


MOST_FAULTS = 10
"""Lines that are named; the others are counted."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the pack: its place, its kind, its language, and the keys of its kind."""

    where: str
    kind: str
    language: str
    keys: Mapping[str, Any] = field(repr=False)


def read_pack(name: str) -> tuple[Item, ...]:
    """The items of the shipped pack (a name of SHIPPED), of a JSONL file in its form, or none ("off").

    Raises:
        RecipeError: If there is no such file.
        DataError: With every line that is no item.
    """
    if name == "off":
        return ()
    if name in SHIPPED:
        return tuple(item for item in _shipped("neutral.jsonl") if item.language in SHIPPED[name])
    path = Path(name)
    if not path.is_file():
        raise RecipeError(
            "no such file", where=f"evaluate.retention: {name}", hint='name a JSONL file, or "neutral", or "off"'
        )
    try:
        return _parse(path.read_text("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", where=str(path), hint="save it as UTF-8") from None


def general_items(use: Literal["choosing", "replay"], languages: Collection[str]) -> tuple[Item, ...]:
    """Shipped items outside the pack: those by which a strength is chosen, or those that may be trained on."""
    return tuple(
        item for item in _shipped("general.jsonl") if item.keys["use"] == use and item.language in set(languages)
    )


def _shipped(file: str) -> tuple[Item, ...]:
    return _parse(resources.files("metier").joinpath(f"assets/retention/{file}").read_text("utf-8"), file)


def _parse(text: str, name: str) -> tuple[Item, ...]:
    items: list[Item] = []
    faults: list[Fault] = []
    # Not splitlines: a JSON string may hold U+2028 and its kin as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _item(line, f"{name}:{number}")
        if isinstance(found, Item):
            items.append(found)
        else:
            faults.append(found)
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], Fault(name, f"and {len(faults) - MOST_FAULTS} more lines with faults", "")]
    if faults or not items:
        raise DataError.of(faults or [Fault(name, "no items", "write one JSON object a line")])
    return tuple(items)


def _item(line: str, where: str) -> Item | Fault:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Fault(where, f"not JSON: {error}", "write one JSON object a line")
    kind = str(row.get("kind")) if isinstance(row, dict) else ""
    if kind not in KEYS:
        return Fault(where, f"kind is {kind!r}", f"use one of {', '.join(KEYS)}")
    missing = [key for key in KEYS[kind] if not row.get(key) and row.get(key) != 0]
    if missing:
        return Fault(where, f"a {kind} item without {', '.join(missing)}", "add what is missing")
    strange = [key for key in KEYS[kind] if key not in {"choices", "answer"} and not isinstance(row[key], str)]
    if strange:
        return Fault(where, f"{', '.join(strange)} is no text", "write it in quotes")
    if kind == "choice" and not _is_choice(row):
        return Fault(where, "choices is not a list of texts, or answer is not an index into it", "mend the item")
    return Item(where, kind, str(row.get("language", "en")), row)


def _is_choice(row: Mapping[str, Any]) -> bool:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return False
    return isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
