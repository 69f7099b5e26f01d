"""A first look at a file, for writing a recipe that fits it."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metier.data.content import answer, cjk_share, texts
from metier.data.convert import records
from metier.data.faults import refuse
from metier.data.files import read_table
from metier.data.formats import FORMATS, recognise
from metier.data.records import Labelled, Record
from metier.recipe import DataSection

SAMPLES = 3
CJK_ROWS = 1000
MARKER_SHARE = 0.95
"""Share of the answers that must carry a marker before it counts as common to all."""
TEST_COLUMNS = ("test", "tests", "test_list")


@dataclass(frozen=True, slots=True)
class Look:
    """What a file holds.

    Attributes:
        format: The recognised format.
        reason: How it was recognised, as a sentence.
        tasks: The tasks that read it, the likeliest first: "chat", "complete", "classify".
        rows: Number of rows.
        columns: Every column, in order of appearance.
        mapping: Word of the format -> column.
        samples: The first records, at most three.
        cjk_share: Share of Chinese, Japanese and Korean characters among the letters, 0 to 1.
        labels: Class -> rows, most frequent first; None where rows have no label.
        tests: Column of unit-test code; None where rows carry none.
        json_keys: Keys that every answer has, where every answer is a JSON object; None where one is not.
        answer_marker: Text after which the final answer stands in nearly all rows, such as "####"; None without.
        median_characters: Median length of a row's texts.
        p95_characters: Length that 95 % of the rows do not exceed.
        notes: What is unusual about the rows.
    """

    format: str
    reason: str
    tasks: tuple[str, ...]
    rows: int
    columns: tuple[str, ...]
    mapping: Mapping[str, str]
    samples: tuple[Record, ...]
    cjk_share: float
    labels: Mapping[str, int] | None
    tests: str | None
    json_keys: tuple[str, ...] | None
    answer_marker: str | None
    median_characters: int
    p95_characters: int
    notes: tuple[str, ...]


def look(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> Look:
    """Read a file and say what it holds, whatever the task.

    Raises:
        DataError: With every fault of the file, or if its format is not recognised.
        RecipeError: If `columns` has a word that no format knows.
    """
    table = read_table(os.fspath(path))
    refuse(table.faults)
    shape = recognise(
        table,
        DataSection(train=os.fspath(path), columns=dict(columns or {})),
        [name for name, form in FORMATS.items() if form.needs],
    )
    found, notes = records(table, shape)
    refuse(table.faults)
    answers = [said for record in found if (said := answer(record)) is not None and shape.format != "label"]
    lengths = sorted(sum(map(len, texts(record))) for record in found)
    keys = _json_keys(answers)
    return Look(
        format=shape.format,
        reason=shape.reason,
        tasks=FORMATS[shape.format].tasks,
        rows=len(found),
        columns=table.columns(),
        mapping=shape.columns,
        samples=tuple(found[:SAMPLES]),
        cjk_share=cjk_share("\n".join(text for record in found[:CJK_ROWS] for text in texts(record))),
        labels=_labels(found),
        tests=next((column for column in TEST_COLUMNS if found and column in found[0].extras), None),
        json_keys=keys,
        answer_marker=_marker(answers) if keys is None else None,
        median_characters=int(statistics.median(lengths or [0])),
        p95_characters=lengths[int(0.95 * (len(lengths) - 1))] if lengths else 0,
        notes=tuple(notes),
    )


def _labels(found: Sequence[Record]) -> Mapping[str, int] | None:
    counted = Counter(record.label for record in found if isinstance(record, Labelled))
    return dict(counted.most_common()) or None


def _json_keys(answers: Sequence[str]) -> tuple[str, ...] | None:
    """Keys common to all answers, in the order of the first; None where one is no JSON object."""
    objects = [_object(said) for said in answers]
    if not objects or any(found is None for found in objects):
        return None
    return tuple(key for key in objects[0] or {} if all(key in (found or {}) for found in objects))


def _object(said: str) -> dict[str, Any] | None:
    if not said.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _marker(answers: Sequence[str]) -> str | None:
    """What the last line of nearly every answer begins with, if it is a sign or a phrase with a colon."""
    last_lines = [lines[-1] for said in answers if (lines := said.strip().splitlines())]
    heads = Counter(match.group() for line in last_lines if (match := MARKER.match(line)))
    if len(last_lines) < 2 or not heads:
        return None
    head, number = heads.most_common(1)[0]
    return head.strip() if number >= MARKER_SHARE * len(last_lines) and len(set(last_lines)) > 1 else None


# "####", "[answer]", "【答案】", or up to forty characters that end in a colon, such as "The answer is:".
MARKER = re.compile(r"[#=>*]{2,}|[\[【<][^\]】>\n]{1,20}[\]】>]|[^\W\d][^:：\n]{0,39}[:：]")
