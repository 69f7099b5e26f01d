"""The one way in: a recipe's data section becomes checked, disjoint splits, or one error with everything found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from itertools import combinations

from metier.core import DataError, RecipeError
from metier.data import checks
from metier.data.checks import Side, Target
from metier.data.content import answer
from metier.data.convert import records
from metier.data.faults import Faults, count, refuse
from metier.data.files import read_table, same_file
from metier.data.formats import FORMATS, Shape, recognise
from metier.data.records import Columns, Conversation, Record, Splits
from metier.data.split import FEW_ROWS, draw, sample
from metier.recipe import DataSection

JUDGING = ("validation", "test")


def read(section: DataSection, *, accepts: Collection[str], target: Target | None = None) -> Splits:
    """Read, split and check the rows of a recipe.

    Args:
        section: The recipe's `data` section.
        accepts: Words of the formats that the task can learn from: "messages", "sharegpt", "alpaca", "prompt",
            "text", "label".
        target: What the task learns from a row, None for nothing in particular; by default the last reply, the
            completion or the label. It is what must not stand in the prompt.

    Raises:
        DataError: With every fault of every file, each with its file and line.
        RecipeError: If the section asks for what cannot be, such as a format that the task does not read.
    """
    _check_section(section, accepts)
    parts, shape, notes = _parts(section, accepts)
    faults = Faults(section.train)
    sides, more = _sides(section, parts, faults)
    notes += more
    if section.personal_data == "drop":
        sides, more = checks.without_personal_data(sides, faults)
        notes += more
        refuse(faults)
    train = sides["train"]
    notes += checks.labels(train, [sides[name] for name in JUDGING], faults)
    notes += checks.leaks(train, target or answer, section.seed, faults)
    notes += checks.personal_data(list(sides.values()), section, faults)
    refuse(faults)
    notes += [
        f"{name} has only {count(len(sides[name].records), 'row')}: what it measures has a wide interval."
        for name in JUDGING
        if len(sides[name].records) < FEW_ROWS
    ]
    rows = {name: side.records for name, side in sides.items()}
    return Splits(
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        format=shape.format,
        reason=shape.reason,
        notes=tuple(notes),
        fingerprint=fingerprint(rows),
    )


def fingerprint(rows: Mapping[str, Collection[Record]]) -> str:
    """Hex sha256 over what the rows say, in order; where they stand does not count."""
    digest = hashlib.sha256()
    for name in ("train", *JUDGING):
        digest.update(f"{name}\n".encode())
        for record in rows[name]:
            digest.update(json.dumps(_content(record), ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _content(record: Record) -> list[object]:
    fields = {name: getattr(record, name) for name in record.__slots__ if name not in {"where", "extras"}}
    if isinstance(record, Columns):
        fields["values"] = dict(record.values)
    if isinstance(record, Conversation):
        fields["messages"] = [(turn.role, turn.content) for turn in record.messages]
    return [type(record).__name__, fields, dict(record.extras)]


def _check_section(section: DataSection, accepts: Collection[str]) -> None:
    if section.format != "auto" and section.format not in accepts:
        tasks = " or ".join(f"task={task}" for task in FORMATS[section.format].tasks)
        reads = ", ".join(name for name in FORMATS if name in accepts)
        hint = f"it reads {reads}; {section.format} rows are for {tasks}"
        raise RecipeError(f"the task does not read {section.format} rows", where="data.format", hint=hint)
    for (earlier, first), (name, second) in combinations(_files(section).items(), 2):
        if same_file(first, second):
            what = f"names the same file as data.{earlier}"
            raise RecipeError(what, where=f"data.{name}", hint=f"name other rows, or a share: data.{name}=0.1")
    total = sum(share for share in (section.validation, section.test) if isinstance(share, float))
    if total >= 1:
        what = f"validation and test take {total:.0%} of the rows, and nothing is left to learn from"
        raise RecipeError(what, where="data.validation", hint="lower the shares, such as 0.1 each")


def _files(section: DataSection) -> dict[str, str]:
    named = {"train": section.train, "validation": section.validation, "test": section.test}
    return {name: file for name, file in named.items() if isinstance(file, str)}


def _parts(section: DataSection, accepts: Collection[str]) -> tuple[dict[str, Side], Shape, list[str]]:
    """The rows of each file, the format of the training file, and notes.

    Raises:
        DataError: With the faults of all files.
    """
    parts: dict[str, Side] = {}
    shapes: dict[str, Shape] = {}
    notes: list[str] = []
    gathered: list[Faults] = []
    for name, file in _files(section).items():
        try:
            parts[name], shapes[name], found, faults = _part(name, file, section, accepts)
        except DataError as error:
            found, faults = [], Faults.of(error)
        notes += found
        gathered.append(faults)
    refuse(*gathered)
    for name, shape in shapes.items():
        if shape.format != shapes["train"].format:
            notes.append(f"{name} is in another format than train: {shape.reason}.")
    return parts, shapes["train"], notes


def _part(
    name: str, file: str, section: DataSection, accepts: Collection[str]
) -> tuple[Side, Shape, list[str], Faults]:
    table = read_table(file)
    if not table.rows:
        if not table.faults:
            table.faults.add("no rows", file, "holds no row", "it needs one row for each example")
        refuse(table.faults)
    try:
        shape = recognise(table, section, accepts)
    except DataError as error:
        refuse(table.faults, Faults.of(error))
        raise
    found, notes = records(table, shape, keep=section.group, strict=section.strict)
    side = Side(name, file, found)
    if name == "train" and section.group is not None:
        checks.group_column(side, section.group, table.faults)
    kept = sample(found, section.max_rows, seed=section.seed, name=name)
    if len(kept) < len(found):
        notes.append(f"{file}: {len(kept):,} of {count(len(found), 'row')} are used, as data.max_rows says.")
    return Side(name, file, kept), shape, notes, table.faults


def _sides(section: DataSection, parts: Mapping[str, Side], faults: Faults) -> tuple[dict[str, Side], list[str]]:
    """The three splits: files are held against training first, then shares are drawn from what is left of it."""
    train, notes = parts["train"], []
    for name in JUDGING:
        if name in parts:
            train, said = checks.overlap(train, parts[name], section, faults)
            notes += said
    if all(name in parts for name in JUDGING):
        notes += checks.shared(parts["validation"], parts["test"])
    if not train.records:
        faults.add("no rows", section.train, "no training row is left", "name other rows for validation or test")
        refuse(faults)
    notes += checks.repeats(train)
    # Test is drawn before validation, so that changing the share that chooses never changes the rows that judge.
    shares = {name: float(getattr(section, name)) for name in reversed(JUDGING) if name not in parts}
    try:
        drawn = draw(train.records, shares, seed=section.seed, group=section.group, file=section.train)
    except DataError as error:
        refuse(faults, Faults.of(error))
        raise
    sides = {name: Side(name, section.train, rows) for name, rows in drawn.items()}
    return {name: sides.get(name) or parts[name] for name in ("train", *JUDGING)}, notes
