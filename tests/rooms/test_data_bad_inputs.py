"""Bad input answers with its place, what it is and what to do: nothing is passed over and nothing else is raised."""

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metier.core import DataError, MetierError, RecipeError
from metier.data import look, read
from metier.recipe import DataSection

EVERY = ("messages", "sharegpt", "alpaca", "prompt", "label", "text")
GOOD = [{"prompt": f"what is number {n} in the long list of things", "completion": f"thing {n}"} for n in range(40)]
TALKS = [
    {"messages": [{"role": "user", "content": f"hi number {n}"}, {"role": "assistant", "content": f"hello {n}"}]}
    for n in range(40)
]
LABELLED = [{"text": f"text of number {n}", "label": "ab"[n % 2]} for n in range(40)]


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def faults_of(folder, content, name="train.jsonl", accepts=EVERY, **section):
    """The faults of a file as lines, its folder left out."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read(DataSection(train=str(path), **section), accepts=accepts)
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


def turn(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ROWS = {
    "cut in two": (GOOD, '{"prompt": "abc', "not JSON: string not closed at column 12"),
    "single quotes": (
        GOOD,
        "{'prompt': 'a'}",
        "not JSON: a key in double quotes is missing at column 2 - write it with",
    ),
    "python words": (GOOD, '{"prompt": True}', "not JSON: a value is missing at column 12 - write it with a JSON"),
    "no comma": (GOOD, '{"prompt": "a" "b": 1}', "a comma or a closing bracket is missing at column 16"),
    "two on a line": (
        GOOD,
        '{"a": 1} {"b": 2}',
        "more text follows the value at column 10 - write one object per line",
    ),
    "control character": (GOOD, '{"a": "x\ty"}', "a control character stands in a string at column 9"),
    "NaN": (GOOD, '{"prompt": NaN, "completion": "a"}', "NaN is not a JSON number"),
    "infinity": (GOOD, '{"prompt": -Infinity, "completion": "a"}', "-Infinity is not a JSON number"),
    "too large": (GOOD, '{"prompt": 1e999, "completion": "a"}', "1e999 is too large"),
    "too many digits": (GOOD, "1" * 5000, "a number with too many digits"),
    "duplicate key": (GOOD, '{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
    "bottomless": (GOOD, "[" * 100_000, "nested too deeply"),
    "deep": (GOOD, '{"a":' * 200 + "1" + "}" * 200, "nested too deeply - at most 100 levels"),
    "half a character": (GOOD, '{"prompt": "\\ud800", "completion": "a"}', "half a surrogate pair"),
    "a list": (GOOD, "[1, 2]", "the row is a list, not an object"),
    "null row": (GOOD, "null", "the row is null, not an object"),
    "missing field": (GOOD, {"prompt": "a b", "reply": "c"}, "has no completion; fields: prompt, reply - add it"),
    "mistyped field": (GOOD, {"prompt": "a b", "complettion": "c"}, "rename complettion if it is meant"),
    "null field": (GOOD, {"prompt": "a b", "completion": None}, "completion is null"),
    "empty completion": (GOOD, {"prompt": "a b", "completion": ""}, "completion is empty"),
    "white space": (GOOD, {"prompt": " \n\t\u3000", "completion": "c"}, "prompt is empty"),
    "number": (GOOD, {"prompt": "a b", "completion": 42}, "completion is a number, 42, not a text - put it in quotes"),
    "wrong type": (GOOD, {"prompt": ["a"], "completion": "b"}, 'prompt is a list, ["a"], not a text'),
    "empty reply": (TALKS, turn(("user", "a"), ("assistant", " ")), "turn 2, the reply, is empty"),
    "empty question": (TALKS, turn(("user", ""), ("assistant", "b")), "turn 1, the user turn, is empty"),
    "unknown role": (TALKS, turn(("usr", "a"), ("assistant", "b")), 'unknown role "usr" - did you mean user?'),
    "strange role": (TALKS, turn((3, "a"), ("assistant", "b")), "unknown role 3 - roles: system, user"),
    "no role": (TALKS, {"messages": [{"content": "a"}]}, "turn 1 says not who speaks; fields: content"),
    "no text": (TALKS, {"messages": [{"role": "user"}]}, "turn 1 (user) has no text; fields: role"),
    "no reply": (TALKS, turn(("user", "a")), "has no assistant turn: nothing to learn"),
    "no question": (TALKS, turn(("assistant", "a")), "has no user turn"),
    "no turns": (TALKS, {"messages": []}, "messages is empty"),
    "turns as text": (TALKS, {"messages": "hello"}, "messages is a text, not a list of turns"),
    "turn as text": (TALKS, {"messages": ["hello"]}, "turn 1 is a text, not an object"),
    "number as text": (TALKS, turn(("user", 1), ("assistant", "b")), "turn 1 (user) is 1, not a text"),
    "image": (
        TALKS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "turn 1 has a part of type 'image_url' - only text is learnt",
    ),
    "weight": (
        TALKS,
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        "turn 2 has weight 0, but every reply is learnt",
    ),
    "tools": (TALKS, turn(("user", "a"), ("assistant", "b")) | {"tools": "add"}, 'tools is "add", not JSON'),
    "float label": (
        LABELLED,
        {"text": "a", "label": 2.0},
        "label is 2.0, a fraction; a class is a word or an integer - write 2",
    ),
    "quantity": (LABELLED, {"text": "a", "label": 0.25}, "label is 0.25, a fraction"),
    "many labels": (LABELLED, {"text": "a", "label": ["b"]}, "label is a list; a row has one class"),
    "null label": (LABELLED, {"text": "a", "label": None}, "label is null"),
    "empty label": (LABELLED, {"text": "a", "label": ""}, "label is empty"),
}


@pytest.mark.parametrize(("good", "bad", "words"), ROWS.values(), ids=ROWS.keys())
def test_a_bad_row_is_named_by_its_line(tmp_path, good, bad, words):
    (said,) = faults_of(tmp_path, lines(*good[:30], bad, *good[30:]))
    assert said.startswith("train.jsonl:31: ")
    assert words in said


def test_every_bad_row_is_named_at_once_and_equal_ones_are_counted(tmp_path):
    said = faults_of(tmp_path, lines(*GOOD, *[{"prompt": "a b c", "completion": ""}] * 50, '{"prompt', "[]"))
    assert len(said) < 25
    assert (
        "train.jsonl:91: not JSON: string not closed at column 2 - is it whole? a line break inside a text is written \\n"
        in said
    )
    assert sum("completion is empty" in line and line.startswith("train.jsonl:") for line in said) == 7
    assert "train.jsonl: and 44 more of the same kind (completion is empty)" in said


def test_the_faults_of_all_files_come_together(tmp_path):
    (tmp_path / "test.jsonl").write_text(lines(*GOOD[:3], "nonsense"))
    said = faults_of(tmp_path, lines(*GOOD, "rubbish"), test=str(tmp_path / "test.jsonl"), validation="nowhere.jsonl")
    assert [line.partition(": ")[0] for line in said] == ["train.jsonl:41", "nowhere.jsonl", "test.jsonl:4"]


FILES = {
    "empty": ("train.jsonl", b"", "train.jsonl: is empty"),
    "blank": ("train.jsonl", b"\xef\xbb\xbf \r\n\n", "train.jsonl: is empty"),
    "no rows": ("train.json", b"[]", "train.json: holds no row"),
    "header only": ("train.csv", b"text,label\n", "train.csv: holds no row"),
    "gbk": (
        "train.csv",
        "text,label\n今天天气很好,好\n昨天下雨了,坏\n".encode("gbk"),
        "train.csv:2: not UTF-8 at byte 1, and 1 more line likewise - it looks like GBK/GB18030, as Chinese Windows writes; "
        "convert it: iconv -f GB18030 -t UTF-8",
    ),
    "latin": (
        "train.jsonl",
        b'{"text": "abc"}\n{"text": "caf\xe9 cr\xe8me", "label": "x"}\n',
        "train.jsonl:2: not UTF-8 at byte 14 - it looks like WINDOWS-1252",
    ),
    "utf-16": (
        "train.csv",
        "text,label\na,b\n".encode("utf-16"),
        "train.csv:1: not UTF-8 at byte 1 - it looks like UTF-16",
    ),
    "cut json": (
        "train.json",
        b'[{"text": "a"},\n{"text": "b"',
        "train.json:2: not JSON: a comma or a closing bracket",
    ),
    "json columns": (
        "train.json",
        b'{"text": ["a"], "label": ["b"]}',
        "not an array of rows - write one object per row",
    ),
    "two arrays": ("train.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "one object with 2 keys (a, b)"),
    "open quote": (
        "train.csv",
        b'text,label\na,b\n"c,d\ne,f\n',
        "train.csv:3: not CSV: a quote that opens in this row is",
    ),
    "cells": ("train.csv", b"text,label\na,b,c\n", "train.csv:2: 3 cells where the header has 2"),
    "after quote": ("train.csv", b'text,label\n"a"b,c\n', "train.csv:2: not CSV: text follows a closing quote"),
    "header twice": ("train.csv", b"text,text\na,b\n", "train.csv:1: the header has text twice"),
    "no header": ("train.csv", "今天很好,1\n明天不好,0\n".encode(), "the first line of a CSV file names the columns"),
    "fractions": (
        "train.csv",
        b"text,label\n" + b"".join(b"t%d,%d.5\n" % (n, n % 9) for n in range(40)),
        "are fractions such as '",
    ),
    "parquet": ("train.parquet", b"PAR1", "read_parquet('"),
    "parquet by content": ("train.jsonl", b"PAR1xyz", "a .parquet file is not read"),
    "xlsx": ("train.xlsx", b"PK\x03\x04", "save it as CSV UTF-8 in the spreadsheet"),
    "zip": ("train.jsonl", b"PK\x03\x04", "a .zip file is not read - unpack it"),
    "txt": ("train.txt", b"hello", 'one line {"text": "..."} of a .jsonl file'),
    "unknown": ("train.foo", b"hello", "an unknown kind of file (.foo)"),
    "cut gzip": ("train.jsonl.gz", gzip.compress(b"x" * 1000)[:20], "not a whole gzip file"),
    "no gzip": ("train.jsonl", b"\x1f\x8bnonsense", "not a whole gzip file"),
}


@pytest.mark.parametrize(("name", "content", "words"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_says_what_it_is_and_how_to_mend_it(tmp_path, name, content, words):
    said = faults_of(tmp_path, content, name)
    assert len(said) == 1
    assert words in said[0]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(*GOOD))
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in {
        "pipe.jsonl": "not a regular file",
        "": "is a folder, not a file - name a file in it, such as",
        "row.jsonl": "does not exist - did you mean",
        "no/rows.jsonl": "there is no folder",
        "\0.jsonl": "does not exist|cannot be read",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(DataError, match=words):
            read(DataSection(train=f"{tmp_path}/{name}"), accepts=EVERY)
    with pytest.raises(DataError, match="not a regular file"):
        read(DataSection(train=os.devnull), accepts=EVERY)


def test_a_decompression_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("metier.data.files.BOMB_BYTES", 4 << 20)
    (said,) = faults_of(tmp_path, gzip.compress(b" " * (16 << 20)), "train.jsonl.gz")
    assert "unpacks to more than 0 GiB from" in said
    monkeypatch.setattr("metier.data.files.MAX_BYTES", 1 << 20)
    (said,) = faults_of(tmp_path, os.urandom(2 << 20), "train.jsonl")
    assert "at most 20 GiB are read" in said


def test_the_same_file_twice_and_shares_that_take_all(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*GOOD))
    with pytest.raises(RecipeError, match=r"data\.test: names the same file as data\.train"):
        read(DataSection(train=str(path), test=f"{tmp_path}/./train.jsonl"), accepts=EVERY)
    with pytest.raises(RecipeError, match="take 110% of the rows"):
        read(DataSection(train=str(path), validation=0.6, test=0.5), accepts=EVERY)


def test_rows_that_end_with_the_user_are_dropped_and_counted_up_to_one_percent(tmp_path):
    unanswered = turn(("user", "hi there"), ("assistant", "hello"), ("user", "and now?"))
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*TALKS * 5, unanswered, unanswered))
    splits = read(DataSection(train=str(path)), accepts=EVERY)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 200
    assert any("2 rows of 202 end without a reply (line 201, 202): left out" in note for note in splits.notes)
    (said,) = faults_of(tmp_path, lines(*TALKS * 2, unanswered))
    assert "train.jsonl:81: 1 row of 81 end without a reply" in said


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            turn(("user", "a b"), ("assistant", "c"), ("assistant", "d")),
            "1 conversation has two assistant turns in a row",
        ),
        (turn(("user", "a b"), ("user", "c"), ("assistant", "d")), "1 conversation has two user turns in a row"),
        (
            turn(("assistant", "a"), ("user", "c"), ("assistant", "d")),
            "1 conversation has the assistant speaking first",
        ),
        (
            turn(("user", "a b"), ("system", "c"), ("assistant", "d")),
            "1 conversation has a system turn after the first",
        ),
    ],
)
def test_unusual_turns_are_noted_with_their_count(tmp_path, row, words):
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*TALKS, row))
    notes = read(DataSection(train=str(path)), accepts=EVERY).notes
    assert any(words in note and "train.jsonl:41" in note for note in notes)
    path.write_text(lines(*TALKS))
    assert not any("conversation" in note for note in read(DataSection(train=str(path)), accepts=EVERY).notes)


def test_too_few_rows_says_how_many_are_needed(tmp_path):
    (said,) = faults_of(tmp_path, lines(*GOOD[:3]))
    assert "3 rows are too few to set 10% aside for test - at least 6 rows are needed" in said
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*GOOD[:6]))
    splits = read(DataSection(train=str(path)), accepts=EVERY)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4, 1, 1)


PIECES = st.sampled_from(
    """ {"text":" | ","label":" | "} | {"messages":[{"role":"user","content":" | "}]} | [ | ] | { | } | , | " | ; | null | NaN
    | 1e9 | \\ud83d | \\n | a b c d e f | 你好 | ' | : """.replace("\n", "").split(" | ")
) | st.sampled_from(["\n", "\t", "\r", "\ufeff", "\0", "|"])
TEXT = (
    st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join).map(lambda text: text.encode("utf-8", "replace"))
)
KEYS = st.sampled_from(("text", "label", "prompt", "completion", "instruction", "output", "history", "input", "system"))
KEYS |= st.sampled_from(
    ("messages", "conversations", "role", "content", "from", "value", "tools", "tool_calls", "name")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=8).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
)


def outcome(work):
    """What `work` gives, or the faults it raises in our words; any other exception passes through and fails the test."""
    try:
        return work(), ()
    except MetierError as error:
        return None, error.faults


def in_our_words(faults):
    return bool(faults) and all(fault.where and fault.what for fault in faults)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv.gz"])
@settings(
    max_examples=120,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=st.binary(max_size=200) | TEXT | OBJECTS)
def test_any_bytes_are_read_or_refused_in_our_words(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    section = DataSection(train=str(path), validation=0.2, test=0.2, overlap="drop")
    for accepts in (EVERY, ("messages", "sharegpt", "alpaca", "prompt")):
        splits, faults = outcome(lambda accepts=accepts: read(section, accepts=accepts))
        assert in_our_words(faults) if splits is None else splits.train and splits.validation and splits.test
    seen, faults = outcome(lambda: look(path))
    assert in_our_words(faults) if seen is None else seen.columns


TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt"]),
            "content": st.text(max_size=6) | VALUES,
        }
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(TURNS, min_size=1, max_size=6))
def test_any_turns_are_read_or_refused_in_our_words(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*TALKS[:6], *[{"messages": row} for row in rows]))
    splits, faults = outcome(lambda: read(DataSection(train=str(path), test=0.2), accepts=EVERY))
    assert in_our_words(faults) if splits is None else splits.train
