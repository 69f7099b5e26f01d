"""JSON read strictly, with faults a person can act on: no key twice, no NaN, no half characters, no deep nesting."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
SPACE = re.compile(r"[ \t\r\n]*")
WORDS = {
    "Unterminated string starting at": "string not closed",
    "Expecting value": "a value is missing",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name enclosed in double quotes": "a key in double quotes is missing",
    "Extra data": "more text follows the value",
    "Invalid control character at": "a control character stands in a string",
    "Invalid \\escape": "an unknown \\escape",
    "Invalid \\uXXXX escape": "an unknown \\u escape",
}


class NotJSONError(ValueError):
    """What was read is not JSON, or not JSON that every reader understands alike."""

    def __init__(self, what: str, hint: str = "", place: int = 0) -> None:
        """Say what, what to do, and at which character."""
        super().__init__(what)
        self.what, self.hint, self.place = what, hint, place


def parse(text: str) -> Any:
    """The value of a whole text.

    Raises:
        NotJSONError: If it is not one JSON value.
    """
    start = _skip(text, 0)
    value, end = _value(text, start)
    end = _skip(text, end)
    if end < len(text):
        raise NotJSONError(f"more text follows the value at column {_column(text, end)}", ONE_PER_LINE, end)
    return value


def elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """Place and value of each element of the array that begins at `start` and ends the text.

    Raises:
        NotJSONError: At the first place that is not JSON.
    """
    items, end = _array(text, start)
    yield from items
    end = _skip(text, end)
    if end < len(text):
        raise NotJSONError(f"more text follows the array at column {_column(text, end)}", "", end)


def members(text: str, start: int) -> tuple[dict[str, tuple[int, Any]], int]:
    """Key -> (place, value) of the object that begins at `start`, and where it ends.

    A value that is an array is given as its elements with their places.

    Raises:
        NotJSONError: At the first place that is not JSON.
    """
    found: dict[str, tuple[int, Any]] = {}
    place = _skip(text, start + 1)
    while text[place : place + 1] != "}":
        key, place = _value(text, place)
        place = _expect(text, _skip(text, place), ":")
        if not isinstance(key, str) or key in found:
            raise NotJSONError(f"the key {key!r} stands twice or is not a text", "keep one of them", place)
        value, end = _array(text, place) if text[place : place + 1] == "[" else _value(text, place)
        found[key] = (place, value)
        place = _skip(text, end)
        if text[place : place + 1] != "}":
            place = _expect(text, place, ",")
    return found, place + 1


ONE_PER_LINE = "write one object per line"
QUOTES = "write it with a JSON library: keys and texts stand in double quotes, and true, false, null are lower case"


def _array(text: str, start: int) -> tuple[list[tuple[int, Any]], int]:
    items: list[tuple[int, Any]] = []
    place = _skip(text, start + 1)
    while text[place : place + 1] != "]":
        value, end = _value(text, place)
        items.append((place, value))
        place = _skip(text, end)
        if text[place : place + 1] != "]":
            place = _expect(text, place, ",")
    return items, place + 1


def _expect(text: str, place: int, mark: str) -> int:
    if text[place : place + 1] != mark:
        raise NotJSONError(f"{mark!r} is missing at column {_column(text, place)}", "is the file whole?", place)
    return _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    match = SPACE.match(text, place)
    return match.end() if match else place


def _column(text: str, place: int) -> int:
    return place - text.rfind("\n", 0, place)


def _value(text: str, start: int) -> tuple[Any, int]:
    try:
        value, end = DECODER.raw_decode(text, start)
    except NotJSONError as error:
        raise NotJSONError(error.what, error.hint, start) from None
    except json.JSONDecodeError as error:
        raise _explained(text, error) from None
    except RecursionError:
        raise NotJSONError("nested too deeply", f"at most {MAX_DEPTH} levels are read", start) from None
    except ValueError:
        raise NotJSONError("a number with too many digits", "write it as a text", start) from None
    _check(text[start:end], value, start)
    return value, end


def _explained(text: str, error: json.JSONDecodeError) -> NotJSONError:
    words = WORDS.get(error.msg, error.msg[:1].lower() + error.msg[1:])
    hint = "is it whole? a line break inside a text is written \\n"
    if text[error.pos : error.pos + 1] in {"'", "N", "T", "F"}:
        hint = QUOTES
    return NotJSONError(f"{words} at column {_column(text, error.pos)}", hint, error.pos)


def _check(source: str, value: Any, start: int) -> None:
    """Refuse what parses but cannot be stored or walked again."""
    if source.count("[") + source.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise NotJSONError("nested too deeply", f"at most {MAX_DEPTH} levels are read", start)
    if "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise NotJSONError("half a surrogate pair", "write the character itself in UTF-8", start) from None


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth - 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotJSONError(f"the key {twice!r} stands twice", "keep one of them")
    return found


def _refused_constant(word: str) -> Any:
    raise NotJSONError(f"{word} is not a JSON number", "write null, or leave the row out")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise NotJSONError(f"{digits} is too large for a number", "write it as a text")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refused_constant, parse_float=_finite)
