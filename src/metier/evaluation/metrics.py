"""What counts as a good answer: pure functions of an answer, its reference and the row, and their table."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metier.core import Fault, RecipeError
from metier.evaluation.sandbox import Limits, passes
from metier.recipe import EvaluateSection

Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered row.

    Attributes:
        question: What was asked.
        answer: What the model said.
        reference: What the data says.
        extras: The row's other columns.
    """

    question: str
    answer: str
    reference: str
    extras: Mapping[str, Any]


RowMetric = Callable[[Answered, EvaluateSection], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of answers.

    Attributes:
        title: What a reader calls it.
        unit: "share" for hits and misses, "score" for a figure between 0 and 1 that is no share of rows.
        source: Where the definition is from.
        applies: Whether the rows and the recipe allow it.
        row: Its value on one row; None for a metric of the whole.
        whole: Its value on all answers and references as class numbers; None for a mean over rows.
    """

    title: str
    unit: Literal["share", "score"]
    source: str
    applies: Callable[[Sequence[Answered], EvaluateSection], bool]
    row: RowMetric | None = None
    whole: Callable[[Codes, Codes], float] | None = None


def exact_match(row: Answered, section: EvaluateSection) -> float:
    """1 if the answer is the reference: as JSON values where both are JSON, else as text with spaces evened out.

    With `answer_after`, what follows the last marker is compared, numbers without thousands separators; a reference
    without the marker is met by no answer.
    """
    if section.answer_after:
        wanted_end = final_answer(row.reference, section.answer_after)
        return float(wanted_end is not None and final_answer(row.answer, section.answer_after) == wanted_end)
    given, wanted = parse_json(row.answer), parse_json(row.reference)
    if wanted is not NOT_JSON and isinstance(wanted, dict | list):
        return float(given is not NOT_JSON and _same_json(given, wanted))
    return float(_even(row.answer) == _even(row.reference))


def valid_json(row: Answered, _: EvaluateSection) -> float:
    """1 if the whole answer is one JSON value; text around it does not count."""
    return float(parse_json(row.answer) is not NOT_JSON)


def valid_schema(row: Answered, section: EvaluateSection) -> float:
    """1 if the whole answer is JSON that satisfies the recipe's schema."""
    value = parse_json(row.answer)
    return float(value is not NOT_JSON and _validator(str(section.json_schema)).is_valid(value))


def tests_passed(row: Answered, section: EvaluateSection) -> float:
    """1 if prompt and answer together pass the row's unit tests."""
    limits = Limits(seconds=section.test_seconds, megabytes=section.test_megabytes)
    return float(passes(row.question, row.answer, row.extras, limits))


def edit_similarity(row: Answered, _: EvaluateSection) -> float:
    """Ratcliff and Obershelp's similarity of the two texts, 0 to 1. Source: difflib.SequenceMatcher.ratio."""
    return difflib.SequenceMatcher(None, row.answer.strip(), row.reference.strip(), autojunk=False).ratio()


def accuracy(row: Answered, _: EvaluateSection) -> float:
    """1 if the class is right."""
    return float(row.answer == row.reference)


def macro_f1(given: Codes, wanted: Codes) -> float:
    """F1 of each class that occurs, averaged over classes; answers and references as class numbers.

    Source: scikit-learn, f1_score(average="macro").
    """
    classes = int(max(given.max(), wanted.max())) + 1
    hits = np.bincount(wanted[given == wanted], minlength=classes)
    both = np.bincount(given, minlength=classes) + np.bincount(wanted, minlength=classes)
    return float(np.mean(2 * hits[both > 0] / both[both > 0]))


def codes(answers: Sequence[str], references: Sequence[str]) -> tuple[Codes, Codes]:
    """Answers and references as numbers of the classes that occur in either."""
    classes = {label: i for i, label in enumerate(sorted({*answers, *references}))}
    return np.array([classes[a] for a in answers]), np.array([classes[r] for r in references])


def _always(_: Sequence[Answered], __: EvaluateSection) -> bool:
    return True


def _references_are_json(rows: Sequence[Answered], _: EvaluateSection) -> bool:
    return bool(rows) and all(isinstance(parse_json(row.reference), dict | list) for row in rows)


def _has_schema(_: Sequence[Answered], section: EvaluateSection) -> bool:
    return section.json_schema is not None


def _has_tests(rows: Sequence[Answered], section: EvaluateSection) -> bool:
    return section.run_tests and any(map(_brings_tests, rows))


def _brings_tests(row: Answered) -> bool:
    return "test" in row.extras or "tests" in row.extras


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric("Exact match", "share", "definition above", _always, row=exact_match),
    "valid_json": Metric("Valid JSON", "share", "RFC 8259", _references_are_json, row=valid_json),
    "valid_schema": Metric("Valid by schema", "share", "JSON Schema 2020-12", _has_schema, row=valid_schema),
    "tests_passed": Metric("Unit tests passed", "share", "Chen et al. 2021, pass@1", _has_tests, row=tests_passed),
    "edit_similarity": Metric("Edit similarity", "score", "difflib", _always, row=edit_similarity),
    "accuracy": Metric("Accuracy", "share", "share of right classes", _always, row=accuracy),
    "macro_f1": Metric("Macro-F1", "score", "scikit-learn f1_score", _always, whole=macro_f1),
}


class _NotJson:
    pass


NOT_JSON = _NotJson()


def parse_json(text: str) -> Any:
    """The value of a text that is JSON as a whole, else NOT_JSON; NaN and infinities are not JSON."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        return json.loads(text.strip(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def _same_json(given: Any, wanted: Any) -> bool:
    """Equal as JSON values: keys in any order, 1 is 1.0, but true is not 1 as it is in Python."""
    pairs = [(given, wanted)]
    while pairs:
        left, right = pairs.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            if left.keys() != right.keys():
                return False
            pairs += [(left[key], right[key]) for key in left]
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return False
            pairs += zip(left, right, strict=True)
        elif isinstance(left, bool) != isinstance(right, bool) or left != right:
            return False
    return True


def final_answer(text: str, marker: str) -> str | None:
    """What stands after the last marker, up to the end of its line; None where the marker is missing."""
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    line = (rest.strip().splitlines() or [""])[0]
    number = line.strip().rstrip(".").replace(",", "").lstrip("$")
    return number if re.fullmatch(r"-?\d+(\.\d+)?", number) else _even(line)


def _even(text: str) -> str:
    return " ".join(text.split())


@functools.lru_cache(maxsize=4)
def _validator(file: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError:
        raise RecipeError(
            "checking answers against a schema needs the package jsonschema",
            where="evaluate.json_schema",
            hint="pip install 'metier[schema]'",
        ) from None
    path = Path(file)
    try:
        schema = json.loads(path.read_text("utf-8"))
        Draft202012Validator.check_schema(schema)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise RecipeError(what, where=file, hint="check evaluate.json_schema") from None
    except SchemaError as error:
        what = f"not a JSON Schema: {error.message}"
        raise RecipeError(what, where=file, hint="check evaluate.json_schema") from None
    except ValueError as error:
        what = f"not a JSON Schema: {error}"
        raise RecipeError(what, where=file, hint="check evaluate.json_schema") from None
    return Draft202012Validator(schema)


def check_asked(metrics: Sequence[str], rows: Sequence[Answered], section: EvaluateSection) -> tuple[str, ...]:
    """Refuse a measure that was asked for and that not one test row can be judged by.

    Args:
        metrics: Names of the task's metrics.
        rows: The test rows, each answered by its own reference.
        section: What is asked for.

    Returns:
        Sentences about test rows that a measure cannot judge.

    Raises:
        RecipeError: With every such measure.
    """
    asked = (
        (
            section.answer_after and "exact_match",
            lambda row: final_answer(row.reference, str(section.answer_after)) is not None,
            f"evaluate.answer_after: {section.answer_after}",
            f"no reference of {len(rows)} test rows holds {section.answer_after!r}",
            f"hold {section.answer_after!r}; no answer can be right where it is missing",
        ),
        (
            section.run_tests and "tests_passed",
            _brings_tests,
            "evaluate.run_tests",
            f"none of {len(rows)} test rows has a column test or tests",
            "have a column test or tests; no answer can pass where it is missing",
        ),
        (
            section.json_schema and "valid_schema",
            lambda row: bool(valid_schema(Answered("", row.reference, "", {}), section)),
            f"evaluate.json_schema: {section.json_schema}",
            f"no reference of {len(rows)} test rows is valid by it",
            f"are valid by {section.json_schema}; a right answer counts as invalid elsewhere",
        ),
    )
    faults, notes = [], []
    for metric, serves, where, none, some in asked:
        count = sum(map(serves, rows)) if metric in metrics else len(rows)
        if rows and not count:
            faults.append(Fault(where, none, "correct it, or leave it out"))
        elif count < len(rows):
            notes.append(f"{count} of {len(rows)} test rows {some}")
    if faults:
        raise RecipeError.of(faults)
    return tuple(notes)


def check_schema(section: EvaluateSection) -> None:
    """Read the recipe's schema once, before expensive work starts.

    Raises:
        RecipeError: If it is no schema, or cannot be read.
    """
    if section.json_schema is not None:
        _validator(section.json_schema)
