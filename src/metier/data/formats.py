"""Which format a file's rows are written in, by looking at their columns and values."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metier.core import DataError, RecipeError
from metier.data.faults import listed, nearest
from metier.data.files import Table
from metier.data.strict_json import NotJSONError, parse
from metier.recipe import DataSection

LOOKED_AT = 200
"""Rows whose values are looked at; all rows give their column names."""

TEXT = ("text", "content", "document", "body", "passage", "raw_content", "文本", "内容", "正文")
SHORT_TEXT = ("sentence", "review", "title", "question", "query", "utterance", "message", "comment", "tweet", "prompt")
LABEL = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "sentiment",
    "topic",
    "target",
    "标签",
    "类别",
    "分类",
    "情感",
)
ASKS = ("question", "query", "problem", "input", "source", "instruction", "问题", "输入", "src")
ANSWERS = ("response", "answer", "output", "target", "solution", "canonical_solution", "reply", "summary")
ZH_ANSWERS = ("答案", "回答", "输出", "回复", "tgt")


@dataclass(frozen=True, slots=True)
class Format:
    """A way to write rows.

    Attributes:
        needs: Words that every row has, each with the column names it goes by, the usual one first.
        may: Words that a row may have, likewise.
        tasks: The tasks that read it, the likeliest first.
        title: How the format is called in a sentence.
    """

    needs: Mapping[str, tuple[str, ...]]
    may: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    title: str

    def words(self) -> dict[str, tuple[str, ...]]:
        """Every word with its column names."""
        return {**self.needs, **self.may}


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        {"messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")},
        {"tools": ("tools", "functions")},
        ("chat",),
        "OpenAI messages",
    ),
    "sharegpt": Format(
        {"conversations": ("conversations", "conversation", "messages", "dialogue", "dialog", "chat")},
        {"system": ("system", "system_prompt"), "tools": ("tools", "functions")},
        ("chat",),
        "ShareGPT conversations",
    ),
    "alpaca": Format(
        {
            "instruction": ("instruction", "指令"),
            "output": ("output", "response", "answer", "completion", "target", *ZH_ANSWERS),
        },
        {
            "input": ("input", "context", "question", "query", "问题", "输入"),
            "system": ("system", "system_prompt"),
            "history": ("history",),
        },
        ("chat",),
        "Alpaca instructions",
    ),
    "prompt": Format(
        {"prompt": ("prompt", *ASKS), "completion": ("completion", *ANSWERS, *ZH_ANSWERS)},
        {},
        ("complete", "chat"),
        "prompts and completions",
    ),
    "label": Format({"text": (*TEXT, *SHORT_TEXT), "label": LABEL}, {}, ("classify",), "texts and labels"),
    "text": Format({"text": TEXT}, {}, ("complete",), "plain texts"),
    "row": Format({}, {}, ("own",), "rows of columns of your own"),
}
YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
TURN_KEYS = {"messages": ("role",), "sharegpt": ("from", "value")}


def formats_for(task: str) -> tuple[str, ...]:
    """Formats that a task, by its word in the recipe, can learn from."""
    return tuple(name for name, form in FORMATS.items() if task in form.tasks)


@dataclass(frozen=True, slots=True)
class Shape:
    """A recognised format.

    Attributes:
        format: Its word.
        columns: Word of the format -> column of the file.
        reason: Why, as a sentence for the user.
    """

    format: str
    columns: Mapping[str, str]
    reason: str


def recognise(table: Table, section: DataSection, accepts: Collection[str]) -> Shape:
    """The format of a file, given or found.

    Raises:
        DataError: If no format that the task reads fits; the message names the columns and a mapping to paste.
        RecipeError: If `data.columns` or `data.format` asks for what cannot be.
    """
    columns = _Columns.of(table)
    mapping = section.columns
    _check_mapping(mapping, columns, table)
    asked = [section.format] if section.format != "auto" else [name for name in FORMATS if name in accepts]
    for name in asked:
        if (found := _fit(name, columns, mapping, given=section.format != "auto")) is not None:
            return Shape(name, found, _reason(name, found, columns, section))
    raise _unfit(table, columns, asked, mapping)


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is known of a file's columns.

    Attributes:
        names: All of them, in order of appearance.
        values: Column -> its values in the first rows, nulls left out.
    """

    names: tuple[str, ...]
    values: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, table: Table) -> _Columns:
        names = table.columns()
        first = [row.values for row in table.rows[:LOOKED_AT]]
        return cls(names, {name: [row[name] for row in first if row.get(name) is not None] for name in names})

    def are(self, name: str, kinds: type | tuple[type, ...]) -> bool:
        """Whether at least half of a column's values are of these types; a column of nulls may be anything."""
        values = self.values[name]
        return 2 * sum(isinstance(value, kinds) for value in values) >= len(values)

    def turn_kind(self, name: str) -> str | None:
        """Which of the two ways of writing turns a column has, if any."""
        firsts = [first for value in self.values[name] if (first := _first_turn(value)) is not None]
        for kind, keys in TURN_KEYS.items():
            matching = sum(all(key in first for key in keys) for first in firsts)
            if firsts and 2 * matching >= len(self.values[name]):
                return kind
        return None


def _first_turn(value: Any) -> dict[str, Any] | None:
    items = structure(value)
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else None


def structure(value: Any) -> Any:
    """A list or object that a CSV cell holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            return parse(value)
        except NotJSONError:
            return value
    return value


def _check_mapping(mapping: Mapping[str, str], columns: _Columns, table: Table) -> None:
    known = list(dict.fromkeys(word for form in FORMATS.values() for word in form.words()))
    for word, column in mapping.items():
        if word not in known:
            near = nearest(word, known)
            hint = f"did you mean {near}?" if near else f"words: {', '.join(known)}"
            raise RecipeError(f"{word!r} is no word of a format", where="data.columns", hint=hint)
        if column not in columns.names:
            near = nearest(column, columns.names)
            hint = f"did you mean {near}?" if near else f"columns: {listed(columns.names, 12)}"
            raise DataError(f"has no column {column!r}, which data.columns names", where=table.file, hint=hint)


def _fit(name: str, columns: _Columns, mapping: Mapping[str, str], *, given: bool) -> dict[str, str] | None:
    """Word -> column if the format fits, else None."""
    form = FORMATS[name]
    if not given and any(word not in form.words() for word in mapping):
        return None
    found: dict[str, str] = {word: column for word, column in mapping.items() if word in form.words()}
    for word, aliases in form.words().items():
        column = found.get(word) or _column_for(name, word, aliases, columns, taken=found.values())
        if column is not None and (given or _value_fits(name, word, column, columns)):
            found[word] = column
    if any(word not in found for word in form.needs):
        return None
    return None if name == "prompt" and not given and not mapping and _two_prompts(found, columns) else found


def _column_for(name: str, word: str, aliases: Sequence[str], columns: _Columns, taken: Collection[str]) -> str | None:
    by_name = {column.strip().casefold(): column for column in reversed(columns.names) if column not in taken}
    for alias in aliases:
        if alias in by_name:
            if name in TURN_KEYS and word in FORMATS[name].needs and columns.turn_kind(by_name[alias]) != name:
                continue
            return by_name[alias]
    if name in TURN_KEYS and word in FORMATS[name].needs:
        return next((column for column in by_name.values() if columns.turn_kind(column) == name), None)
    alone = name == "text" and len(columns.names) == 1
    return columns.names[0] if alone and columns.are(columns.names[0], str) else None


def _value_fits(name: str, word: str, column: str, columns: _Columns) -> bool:
    if name in TURN_KEYS and word in FORMATS[name].needs:
        return columns.turn_kind(column) == name
    if word == "label":
        return columns.are(column, (str, int, float))
    return word in {"tools", "history"} or columns.are(column, str)


def _two_prompts(found: Mapping[str, str], columns: _Columns) -> bool:
    """Whether two columns could be the prompt, so that taking one would lose the other."""
    if found["prompt"].casefold() == "prompt":
        return False
    others = [column for column in columns.names if column.strip().casefold() in ASKS and columns.are(column, str)]
    return len(set(others) - {found["completion"]}) > 1


def _reason(name: str, found: Mapping[str, str], columns: _Columns, section: DataSection) -> str:
    if not FORMATS[name].needs:
        return f"{FORMATS[name].title}: {listed(columns.names, 12)}"
    shown = ", ".join(word if word == column else f"{word} from {column}" for word, column in found.items())
    how = "as data.format says" if section.format != "auto" else f"recognised by the columns ({shown})"
    if section.columns:
        how = f"by data.columns ({shown})"
    unused = [column for column in columns.names if column not in found.values()]
    spare = f"; not learnt: {listed(unused)}" if unused else ""
    guess = any(word in FORMATS[name].needs or word == "input" for word in found if word != found[word])
    doubt = "; set data.columns if that is not what they mean" if guess and not section.columns else ""
    return f"{FORMATS[name].title}, {how}{spare}{doubt}"


def _unfit(table: Table, columns: _Columns, asked: Sequence[str], mapping: Mapping[str, str]) -> DataError:
    """The refusal: what the columns are, which task would read them, and a mapping to paste."""
    shown = listed(columns.names, 12)
    what = f"the rows are not {_or([FORMATS[name].title for name in asked])}; columns: {shown}"
    hints = [f"add a column {word}" for word in _lacking(columns, asked, mapping)]
    for name, form in FORMATS.items():
        if form.needs and name not in asked and _fit(name, columns, mapping, given=False) is not None:
            hints.append(f"they are {form.title}, for {_or([f'task={task}' for task in form.tasks])}")
            break
    if table.header and any(column.isdigit() or len(column) > 40 for column in columns.names):
        hints.append("the first line of a CSV file names the columns, such as text,label: is it there?")
    elif suggestion := _suggestion(columns, asked):
        hints.append(f"map the columns: data.columns={suggestion}")
    hints = hints or [f"a row needs {_or([' and '.join(FORMATS[name].needs) for name in asked])}"]
    return DataError(what, where=table.file, hint="; or ".join(hints))


def _lacking(columns: _Columns, asked: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """The one word that keeps the rows from the one format that is wanted; empty where more is amiss."""
    if len(asked) != 1:
        return []
    needs = FORMATS[asked[0]].needs
    found = dict(mapping)
    for word, aliases in needs.items():
        column = found.get(word) or _column_for(asked[0], word, aliases, columns, taken=found.values())
        if column is not None:
            found[word] = column
    lacking = [word for word in needs if word not in found]
    return lacking if len(lacking) == 1 and len(needs) > 1 else []


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _suggestion(columns: _Columns, asked: Sequence[str]) -> str:
    """A mapping to paste, guessed from the names and values; empty where no columns can serve."""
    tried = [name for name in ("label", "prompt", "text") if name in asked]
    guesses = [found for name in tried if (found := _guessed(FORMATS[name], columns))]
    if not guesses:
        return ""
    # A guess in which some name speaks for itself beats one by position; of two such, the fuller one.
    best = max(guesses, key=lambda found: (_speaking(found), -len(found) if not _speaking(found) else len(found)))
    return "{" + ", ".join(f"{word}: {_yaml(column)}" for word, column in best.items()) + "}"


def _guessed(form: Format, columns: _Columns) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for word, aliases in form.needs.items():
        free = [name for name in columns.names if name not in chosen.values() and columns.values[name]]
        column = _class_column(free, columns) if word == "label" else _text_column(aliases, free, columns)
        if column is None:
            return {}
        chosen[word] = column
    return chosen


def _speaking(found: Mapping[str, str]) -> bool:
    aliases = {alias for form in FORMATS.values() for word in found for alias in form.words().get(word, ())}
    return any(nearest(column.casefold(), aliases, 0.75) for column in found.values())


def _text_column(aliases: Sequence[str], free: Sequence[str], columns: _Columns) -> str | None:
    """The free column of texts that is most likely meant: by name, else the first."""
    texts = [column for column in free if columns.are(column, str)]
    near = (found for alias in aliases if (found := nearest(alias, texts, 0.75)))
    return next(near, next(iter(texts), None))


def _class_column(free: Sequence[str], columns: _Columns) -> str | None:
    """The free column that holds classes: by name, else the first whose values repeat."""
    named = (column for column in free if column.casefold() in LABEL)
    repeating = (column for column in free if _is_class(columns.values[column]))
    return next(named, None) or next(repeating, None)


def _is_class(values: Sequence[Any]) -> bool:
    distinct = {str(value) for value in values}
    return len(distinct) <= max(2, len(values) // 5) and all(isinstance(value, str | int) for value in values)


def _yaml(column: str) -> str:
    """A column name as it can stand in YAML flow style."""
    plain = re.fullmatch(r"[^\W\d][\w-]*", column) and column.lower() not in YAML_WORDS
    return column if plain else json.dumps(column, ensure_ascii=False)
