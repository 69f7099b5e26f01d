"""From rows to records: what each format means, and everything that can be wrong with one row."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

from metier.core.words import first_few
from metier.data.content import texts
from metier.data.faults import Faults, count, listed, nearest
from metier.data.files import Table
from metier.data.formats import Shape, structure
from metier.data.lines import Row
from metier.data.records import NOTHING, Columns, Completion, Conversation, Document, Labelled, Message, Record, Records

Role = Literal["system", "user", "assistant", "tool"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
KEPT_CHARACTERS, RECORD_CHARACTERS = 10_000_000, 500
"""Records are kept until they weigh so much; what a record weighs beside its texts."""
DROPPED_AT_MOST = 0.01
"""Share of rows without a last reply above which the file is refused: then it is no slip but another format."""


class RowError(ValueError):
    """A row that is not what its format says."""

    def __init__(self, kind: str, what: str, hint: str = "") -> None:
        """`kind` is what it has in common with its like."""
        super().__init__(what)
        self.kind, self.what, self.hint = kind, what, hint


class NothingToLearnError(RowError):
    """A row that is well written but has no reply at its end."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """One row, asked for the words of its format.

    Attributes:
        values: Column -> value.
        shape: The file's format.
    """

    values: Mapping[str, Any]
    shape: Shape

    def get(self, word: str) -> Any:
        """The value of an optional word; None where there is none."""
        column = self.shape.columns.get(word)
        return None if column is None else self.values.get(column)

    def need(self, word: str) -> Any:
        """The value of a word that every row has."""
        column = self.shape.columns[word]
        if column not in self.values:
            near = nearest(column, self.values)
            hint = f"rename {near} if it is meant" if near else "add it, or leave the row out"
            raise RowError(f"no {column}", f"has no {column}; fields: {listed(list(self.values)) or 'none'}", hint)
        if self.values[column] is None:
            raise RowError(f"{column} is null", f"{column} is null", "fill it, or leave the row out")
        return self.values[column]

    def text(self, word: str) -> str:
        """A needed text that is more than white space."""
        return _text(self.need(word), self.shape.columns[word])

    def optional_text(self, word: str) -> str:
        """An optional text; empty where there is none."""
        value = self.get(word)
        return "" if value is None or value == "" else _text(value, self.shape.columns[word], empty=True)

    def extras(self, keep: str | None) -> Mapping[str, Any]:
        """The columns that no word of the format uses, and `keep`."""
        used = set(self.shape.columns.values()) - {keep}
        extras = {column: value for column, value in self.values.items() if column not in used}
        return MappingProxyType(extras) if extras else NOTHING


def records(table: Table, shape: Shape, *, keep: str | None = None, strict: bool = False) -> tuple[Records, list[str]]:
    """The records of a table and what the user should know; what is wrong is added to the table's faults.

    Every row is converted once, to be checked; the records of the first rows, up to a fixed size, are kept, those of
    others are made again when they are asked for.

    Args:
        table: The rows.
        shape: Their format.
        keep: A column that goes to the extras even if the format uses it.
        strict: Whether what is unusual is refused as well.
    """
    convert = CONVERTERS[shape.format]

    def made(row: Row) -> Record:
        return convert(_Reader(row.values, shape), table.where(row.line), keep)

    good, dropped, turns = array("q"), array("q"), _Turns()
    kept: dict[int, Record] = {}
    room = KEPT_CHARACTERS
    for place, row in enumerate(table.rows):
        try:
            record = made(row)
        except NothingToLearnError:
            dropped.append(row.line)
        except RowError as error:
            table.faults.add(error.kind, table.where(row.line), error.what, error.hint)
        else:
            good.append(place)
            turns.see(record)
            room -= RECORD_CHARACTERS + sum(map(len, texts(record)))
            if room > 0:
                kept[place] = record
    notes = _dropped(table, dropped, at_most=0.0 if strict else DROPPED_AT_MOST)
    if strict:
        turns.refuse(table.faults)
    else:
        notes += turns.notes(table.file)
    return Records(lambda place: kept.get(place) or made(table.rows[place]), good), notes


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        shown = excerpt_json(value)
        hint = "put it in quotes" if isinstance(value, int | float) else "write one text"
        raise RowError(f"{name} is no text", f"{name} is {_kind(value)}, {shown}, not a text", hint)
    if not empty and not value.strip():
        raise RowError(f"{name} is empty", f"{name} is empty", "fill it, or leave the row out")
    return value


def excerpt_json(value: Any) -> str:
    """The beginning of a value as JSON."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        dict: "an object",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
    }
    return names.get(type(value), "another type")


def _label_row(row: _Reader, where: str, keep: str | None) -> Record:
    return Labelled(where, row.text("text"), _label(row.need("label"), row.shape.columns["label"]), row.extras(keep))


def _label(value: Any, name: str) -> str:
    """A class as text.

    Raises:
        RowError: If it is not a word or an integer.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        what = f"{name} is {value!r}, a fraction; a class is a word or an integer"
        raise RowError(f"{name} is a fraction", what, f"write {value:.0f}" if value == int(value) else NO_REGRESSION)
    if isinstance(value, list | dict):
        raise RowError(f"{name} is no class", f"{name} is {_kind(value)}; a row has one class", "write one word")
    return _text(value, name).strip()


NO_REGRESSION = "if it is a quantity and no class, this task cannot learn it"


def _text_row(row: _Reader, where: str, keep: str | None) -> Record:
    return Document(where, row.text("text"), row.extras(keep))


def _prompt_row(row: _Reader, where: str, keep: str | None) -> Record:
    return Completion(where, row.text("prompt"), row.text("completion"), row.extras(keep))


def _alpaca_row(row: _Reader, where: str, keep: str | None) -> Record:
    """Instruction and input, joined by a line break, are the user's turn; `history` holds the turns before it."""
    turns: list[Message] = []
    if system := row.optional_text("system"):
        turns.append(Message("system", system))
    for asked, answered in _history(structure(row.get("history")), row.shape.columns.get("history", "history")):
        turns += [Message("user", asked), Message("assistant", answered)]
    instruction, given = row.text("instruction"), row.optional_text("input")
    turns.append(Message("user", f"{instruction}\n{given}" if given.strip() else instruction))
    turns.append(Message("assistant", row.text("output")))
    return Conversation(where, tuple(turns), None, row.extras(keep))


def _history(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if not value:
        return
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError(f"{name} is malformed", f"{name} holds {excerpt_json(pair)}", "write [[asked, answered], …]")
        yield _text(pair[0], f"a question in {name}"), _text(pair[1], f"an answer in {name}")


def _conversation_row(row: _Reader, where: str, keep: str | None) -> Record:
    word = "messages" if row.shape.format == "messages" else "conversations"
    column = row.shape.columns[word]
    items = structure(row.need(word))
    if not isinstance(items, list) or not items:
        what = "is empty" if items in ([], "") else f"is {_kind(items)}, not a list of turns"
        raise RowError(f"{column} holds no turns", f"{column} {what}", "write one object per turn")
    turns = [turn for number, item in enumerate(items, 1) if (turn := _turn(item, number)) is not None]
    if (system := row.optional_text("system")).strip() and not any(turn.role == "system" for turn in turns):
        turns.insert(0, Message("system", system))
    _check_turns(turns)
    return Conversation(where, tuple(turns), _tools(row.get("tools")), row.extras(keep))


def _turn(item: Any, number: int) -> Message | None:
    """One turn; None for an empty system prompt, which is the same as none."""
    if not isinstance(item, dict):
        raise RowError("a turn is no object", f"turn {number} is {_kind(item)}, not an object", TURN)
    role = _role(item, number)
    content = _content(item, number, role)
    if item.get("weight") == 0:
        raise RowError("a weight of 0", f"turn {number} has weight 0, but every reply is learnt", "leave the row out")
    if not content.strip() and role == "system":
        return None
    if not content.strip() and role != "tool":
        whose = "reply" if role == "assistant" else f"{role} turn"
        raise RowError(f"empty {whose}", f"turn {number}, the {whose}, is empty", "fill it, or leave the row out")
    return Message(role, content)


TURN = 'a turn is {"role": "user", "content": "…"} or {"from": "human", "value": "…"}'


def _role(item: Mapping[str, Any], number: int) -> Role:
    said = item.get("role", item.get("from"))
    if said is None:
        fields = f"fields: {listed(list(item)) or 'none'}"
        raise RowError("a turn without role", f"turn {number} says not who speaks; {fields}", TURN)
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        near = nearest(str(said).lower(), ROLES)
        hint = f"did you mean {near}?" if near else "roles: system, user, assistant, tool"
        raise RowError("an unknown role", f"turn {number} has the unknown role {excerpt_json(said)}", hint)
    return role


def _content(item: Mapping[str, Any], number: int, role: Role) -> str:
    """The text of a turn; calls of tools are written as one JSON object per line after it."""
    calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else [])
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if content is None and not calls:
        fields = f"fields: {listed(list(item))}"
        raise RowError("a turn without text", f"turn {number} ({role}) has no text; {fields}", TURN)
    if isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if content is not None and not isinstance(content, str):
        shown = excerpt_json(content)
        raise RowError("a turn is no text", f"turn {number} ({role}) is {shown}, not a text", "put it in quotes")
    return "\n".join(part for part in (content, *map(_call, calls)) if part)


def _part(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else None
        what = f"turn {number} has a part of type {kind!r}" if kind else f"turn {number} has a part without text"
        raise RowError("a part that is no text", what, "only text is learnt; leave the row out")
    return text


def _call(call: Any) -> str:
    """A tool call in the form {"name": …, "arguments": …}, whatever wraps it."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call without name", f"a tool call is {excerpt_json(call)}", 'it needs a "name"')
    arguments = structure(function.get("arguments", {}))
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _tools(value: Any) -> str | None:
    """Tool definitions as JSON text, None where there are none."""
    if isinstance(value, str) and value.strip():
        if isinstance(structure(value), str):
            raise RowError("tools is not JSON", f"tools is {excerpt_json(value)}, not JSON", "write a list of tools")
        return value
    if not value or isinstance(value, str):
        return None
    if not isinstance(value, list | dict):
        raise RowError("tools is no list", f"tools is {excerpt_json(value)}, not a list", "write a list of tools")
    return json.dumps(value, ensure_ascii=False)


def _check_turns(turns: Sequence[Message]) -> None:
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        raise RowError("no user turn", "has no user turn", "a reply needs something to reply to")
    if "assistant" not in roles:
        raise RowError("no assistant turn", "has no assistant turn: nothing to learn", "add the reply to learn")
    if roles[-1] != "assistant":
        raise NothingToLearnError("no last reply", f"ends with a {roles[-1]} turn")


def _dropped(table: Table, dropped: Sequence[int], *, at_most: float) -> list[str]:
    """A note on rows without a last reply, or a fault where they are many."""
    if not dropped:
        return []
    said = f"{count(len(dropped), 'row')} of {len(table.rows):,} end without a reply (line {first_few(dropped)})"
    if len(dropped) > at_most * len(table.rows):
        hint = "add the replies, or take these rows out"
        hint += "; up to 1 % would be left out for you" if at_most else ""
        table.faults.add("no last reply", table.where(dropped[0]), said, hint)
        return []
    return [f"{table.file}: {said}: left out, for there is nothing to learn in them."]


class _Turns:
    """What is unusual in conversations but can be learnt: how often, and where first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = dict.fromkeys(UNUSUAL, (0, ""))

    def see(self, record: Record) -> None:
        if isinstance(record, Conversation):
            roles = [turn.role for turn in record.messages]
            for said, test in UNUSUAL.items():
                if test(roles):
                    number, first = self._found[said]
                    self._found[said] = number + 1, first or record.where

    def notes(self, file: str) -> list[str]:
        return [f"{file}: {said} (first at {where})." for where, said in self._told()]

    def refuse(self, faults: Faults) -> None:
        for where, said in self._told():
            faults.add(said, where, f"{said}, the first one here", "mend these rows, or set data.strict to false")

    def _told(self) -> Iterator[tuple[str, str]]:
        for said, (number, first) in self._found.items():
            if number:
                yield first, f"{count(number, 'conversation')} {'has' if number == 1 else 'have'} {said}"


def _twice(role: str, roles: Sequence[str]) -> bool:
    return any(first == second == role for first, second in pairwise(roles))


UNUSUAL: Mapping[str, Callable[[Sequence[str]], bool]] = {
    "two assistant turns in a row": lambda roles: _twice("assistant", roles),
    "two user turns in a row": lambda roles: _twice("user", roles),
    "the assistant speaking first": lambda roles: next(role for role in roles if role != "system") == "assistant",
    "a system turn after the first": lambda roles: "system" in roles[1:],
}


def _own_row(row: _Reader, where: str, _: str | None) -> Columns:
    values = MappingProxyType(dict(row.values))
    return Columns(where, values, values)


CONVERTERS: Mapping[str, Callable[[_Reader, str, str | None], Record]] = {
    "messages": _conversation_row,
    "sharegpt": _conversation_row,
    "alpaca": _alpaca_row,
    "prompt": _prompt_row,
    "text": _text_row,
    "label": _label_row,
    "row": _own_row,
}
