"""JSON read strictly, with faults a person can act on: no key twice, no NaN, no half characters, no deep nesting."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100
BEHIND = "more text follows the array"
NEAR = 16
"""Characters before a cut in which a number, a word or an escape may stand that goes on behind it."""
LITTLE = 1 << 19
"""Characters that are not worth letting go of."""
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

    def __init__(self, what: str, hint: str = "", place: int = 0, *, column: int | None = None) -> None:
        """Say what, what to do, at which character of the text, and at which column of its line."""
        super().__init__(what)
        self._what, self.hint, self.place, self.column = what, hint, place, column
        self.line = 1
        """Line of the file, where the text was only a part of it."""

    @property
    def is_open(self) -> bool:
        """Whether a text has no end."""
        return self._what == WORDS["Unterminated string starting at"]

    @property
    def is_behind(self) -> bool:
        """Whether what was read is whole, and more stands behind it."""
        return self._what == BEHIND

    @property
    def what(self) -> str:
        """What is wrong, and where in its line."""
        return self._what if self.column is None else f"{self._what} at column {self.column}"


def parse(text: str) -> Any:
    """The value of a whole text.

    Raises:
        NotJSONError: If it is not one JSON value.
    """
    start = _skip(text, 0)
    value, end = _value(text, start)
    end = _skip(text, end)
    if end < len(text):
        raise NotJSONError("more text follows the value", ONE_PER_LINE, end, column=_column(text, end))
    return value


def elements(blocks: Iterator[str], start: int) -> Iterator[tuple[str, str, Any]]:
    """The elements of an array that is a whole file: the text that leads to each, its own text, and its value.

    No more of the file is held than a few blocks, or the longest element where that is longer.

    Args:
        blocks: The text of the file.
        start: Where in the first block the array begins.

    Raises:
        NotJSONError: At the first place that is not JSON, with its line.
    """
    window = _Window(blocks)
    try:
        yield from _elements(window, start)
    except NotJSONError as error:
        raise window.placed(error) from None


def _elements(window: _Window, start: int) -> Iterator[tuple[str, str, Any]]:
    done, place = 0, window.skip(start + 1)
    while window.text[place : place + 1] != "]":
        value, end = window.value(place)
        yield window.text[done:place], window.text[place:end], value
        done = window.drop(end)
        place = window.skip(done)
        if window.text[place : place + 1] != "]":
            _expect(window.text, place, ",")
            place = window.skip(place + 1)
    place = window.skip(place + 1)
    if place < len(window.text):
        raise NotJSONError(BEHIND, "", place, column=_column(window.text, place))


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


class _Window:
    """Some of a long text: it grows at its end where more is needed, and is cut at its beginning."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.text, self._blocks = next(blocks, ""), blocks
        self._lines, self._columns = 0, 0  # what is cut off: whole lines, and columns of the line that goes on

    def skip(self, place: int) -> int:
        """Where the blanks end."""
        found = _skip(self.text, place)
        while found >= len(self.text) and self._grow():
            found = _skip(self.text, found)
        return found

    def value(self, place: int) -> tuple[Any, int]:
        """The value at a place, and where it ends."""
        while True:
            # A text that is cut may read as another value, or as none: what ends near the cut is read again.
            try:
                value, end = _value(self.text, place)
                if end + NEAR <= len(self.text) or not self._grow():
                    return value, end
            except NotJSONError as error:
                is_near = error.is_open or error.place + NEAR > len(self.text)
                if error.column is None or not is_near or not self._grow():
                    raise

    def drop(self, place: int) -> int:
        """Let go of what stands before a place, unless that is little; where the place is now."""
        if place < LITTLE:
            return place
        gone, self.text = self.text[:place], self.text[place:]
        lines = gone.count("\n")
        self._columns = len(gone) - gone.rfind("\n") - 1 if lines else self._columns + len(gone)
        self._lines += lines
        return 0

    def placed(self, error: NotJSONError) -> NotJSONError:
        """A fault of this part with its line and column in the whole."""
        lines = self.text.count("\n", 0, error.place)
        error.line = self._lines + lines + 1
        if not lines and error.column is not None:
            error.column += self._columns
        return error

    def _grow(self) -> bool:
        """Take as much again, so that a long value is not read again and again; whether there was more."""
        more, size = [], 0
        while size <= len(self.text) and (block := next(self._blocks, "")):
            more.append(block)
            size += len(block)
        self.text += "".join(more)
        return size > 0


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
        raise NotJSONError(f"{mark!r} is missing", "is the file whole?", place, column=_column(text, place))
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
    return NotJSONError(words, hint, error.pos, column=_column(text, error.pos))


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
