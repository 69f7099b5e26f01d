"""Every format and kind of file is read, recognised and shown; what does not fit is refused with a way out."""

import gzip
import json
from pathlib import Path

import pytest

from metier.core import DataError, RecipeError
from metier.data import Completion, Conversation, Document, Labelled, Message, look, read
from metier.recipe import DataSection

CHAT = ("messages", "sharegpt", "alpaca", "prompt")
COMPLETE = ("text", "prompt")
CLASSIFY = ("label",)
EVERY = ("messages", "sharegpt", "alpaca", "prompt", "label", "text")

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "haven", "islet", "jade", "knoll", "larch")


def sentence(number):
    """A sentence unlike that of any other number."""
    return (
        " ".join(WORDS[(number * 7 + step * (number % 5 + 1) + number // 12) % 12] for step in range(6)) + f" {number}"
    )


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder, content, name="train.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
    return str(path)


def every(splits):
    """All records, in the order of their lines."""
    records = [*splits.train, *splits.validation, *splits.test]
    return sorted(records, key=lambda record: int(record.where.rpartition(":")[2]))


def many(row, count=30):
    """`count` rows made by `row(number)`."""
    return [row(number) for number in range(count)]


MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": "！"}]},
        {"role": "assistant", "content": "您好。"},
    ],
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "id": 7,
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "What is the weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
        {"from": "observation", "value": '{"sun": true}'},
        {"from": "gpt", "value": "Sunny."},
    ],
    "system": "You know the weather.",
    "tools": '[{"name": "weather"}]',
}
ALPACA = {
    "instruction": "Translate.",
    "input": "猫",
    "output": "cat",
    "system": "You translate.",
    "history": [["Hello?", "Hi."]],
}
CALLS = {
    "messages": [
        {"role": "user", "content": "Add 1 and 2"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
}


@pytest.mark.parametrize(
    ("row", "format_word", "turns", "tools"),
    [
        (
            MESSAGES,
            "messages",
            [("system", "Be brief."), ("user", "你好！"), ("assistant", "您好。")],
            MESSAGES["tools"],
        ),
        (
            SHAREGPT,
            "sharegpt",
            [
                ("system", "You know the weather."),
                ("user", "What is the weather?"),
                ("assistant", '{"name": "weather", "arguments": {}}'),
                ("tool", '{"sun": true}'),
                ("assistant", "Sunny."),
            ],
            [{"name": "weather"}],
        ),
        (
            ALPACA,
            "alpaca",
            [
                ("system", "You translate."),
                ("user", "Hello?"),
                ("assistant", "Hi."),
                ("user", "Translate.\n猫"),
                ("assistant", "cat"),
            ],
            None,
        ),
        (
            CALLS,
            "messages",
            [
                ("user", "Add 1 and 2"),
                ("assistant", '{"name": "add", "arguments": {"a": 1, "b": 2}}'),
                ("tool", "3"),
                ("assistant", "It is 3."),
            ],
            None,
        ),
    ],
    ids=["messages", "sharegpt", "alpaca", "tool calls"],
)
def test_conversations(tmp_path, row, format_word, turns, tools):
    found = look(write(tmp_path, [row]))
    assert found.format == format_word
    (record,) = found.samples
    assert isinstance(record, Conversation)
    assert record.messages == tuple(Message(role, content) for role, content in turns)
    assert (record.tools and json.loads(record.tools)) == tools
    assert record.where.endswith("train.jsonl:1")


def test_what_is_not_learnt_goes_to_the_extras(tmp_path):
    found = look(write(tmp_path, [MESSAGES]))
    assert found.samples[0].extras == {"id": 7}
    row = {"prompt": "def f():", "completion": " return 1", "test": "assert f() == 1", "entry_point": "f"}
    found = look(write(tmp_path, [row]))
    assert found.samples == (Completion(found.samples[0].where, "def f():", " return 1", found.samples[0].extras),)
    assert found.samples[0].extras == {"test": "assert f() == 1", "entry_point": "f"}
    assert found.tests == "test"
    assert "not learnt: test, entry_point" in found.reason


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("prompt", "completion"), "prompt"),
        (("question", "answer"), "prompt"),
        (("query", "response"), "prompt"),
        (("input", "output"), "prompt"),
        (("Problem", "Solution"), "prompt"),
        (("问题", "答案"), "prompt"),
        (("instruction", "response"), "alpaca"),
        (("instruction", "context", "response"), "alpaca"),
        (("instruction", "question", "answer"), "alpaca"),
        (("sentence", "label"), "label"),
        (("文本", "标签"), "label"),
        (("text",), "text"),
        (("anything",), "text"),
    ],
)
def test_a_format_is_recognised_by_its_usual_names(tmp_path, columns, expected):
    found = look(write(tmp_path, many(lambda n: {column: f"{sentence(n)} {column}" for column in columns})))
    assert found.format == expected
    assert set(found.mapping.values()) == set(columns)
    for word, column in found.mapping.items():
        if word != column:
            assert f"{word} from {column}" in found.reason


def test_the_task_decides_between_formats_that_both_fit(tmp_path):
    path = write(tmp_path, many(lambda n: {"text": sentence(n), "label": "ab"[n % 2]}))
    assert isinstance(read(DataSection(train=path), accepts=CLASSIFY).train[0], Labelled)
    assert isinstance(read(DataSection(train=path), accepts=COMPLETE).train[0], Document)


def test_turns_in_the_other_keys_are_still_recognised_by_value(tmp_path):
    rows = [{"conversations": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}]
    assert look(write(tmp_path, rows)).format == "messages"
    rows = [{"dialog": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}]
    assert look(write(tmp_path, rows)).format == "sharegpt"


def test_labels_are_kept_as_text(tmp_path):
    rows = many(lambda n: {"text": sentence(n), "label": n % 3})
    assert {record.label for record in every(read(DataSection(train=write(tmp_path, rows)), accepts=CLASSIFY))} == set(
        "012"
    )
    rows = many(lambda n: {"text": sentence(n), "label": n % 2 == 0})
    assert look(write(tmp_path, rows)).labels == {"true": 15, "false": 15}


def test_columns_map_words_to_your_names(tmp_path):
    rows = many(lambda n: {"frage": sentence(n), "antwort": f"no {n}"})
    with pytest.raises(
        DataError, match=r"columns: frage, antwort .*data\.columns=\{prompt: frage, completion: antwort\}"
    ):
        read(DataSection(train=write(tmp_path, rows)), accepts=CHAT)
    columns = {"prompt": "frage", "completion": "antwort"}
    splits = read(DataSection(train=write(tmp_path, rows), columns=columns), accepts=CHAT)
    assert splits.format == "prompt"
    assert every(splits)[3] == Completion(every(splits)[3].where, sentence(3), "no 3")


def test_a_suggested_mapping_can_be_pasted(tmp_path):
    path = write(tmp_path, many(lambda n: {"my text": sentence(n), "no": "ab"[n % 2]}))
    with pytest.raises(DataError) as caught:
        read(DataSection(train=path), accepts=CLASSIFY)
    assert 'data.columns={text: "my text", label: "no"}' in str(caught.value)
    columns = {"text": "my text", "label": "no"}
    assert read(DataSection(train=path, columns=columns), accepts=CLASSIFY).format == "label"


@pytest.mark.parametrize(
    ("row", "accepts", "words"),
    [
        ({"text": "a b c", "label": "x"}, CHAT, ["task=classify", "{prompt: text, completion: label}"]),
        ({"text": "a b c"}, CLASSIFY, ["task=complete", "columns: text"]),
        ({"prompt": "a b c", "completion": "d"}, CLASSIFY, ["task=complete or task=chat"]),
        ({"good": "a b", "bad": "c d", "uid": "e"}, COMPLETE, ["columns: good, bad, uid", "{text: good}"]),
        ({"rxn": "CC>>C", "yield": 0.5}, CLASSIFY, ["columns: rxn, yield", "a row needs text and label"]),
        ({"question": "a", "input": "b", "answer": "c"}, COMPLETE, ["columns: question, input, answer"]),
    ],
)
def test_what_does_not_fit_names_the_task_or_the_mapping_that_would(tmp_path, row, accepts, words):
    with pytest.raises(DataError) as caught:
        read(DataSection(train=write(tmp_path, [row] * 3)), accepts=accepts)
    for word in words:
        assert word in str(caught.value)


def test_wrong_words_and_formats_are_the_recipes_fault(tmp_path):
    path = write(tmp_path, many(lambda n: {"prompt": sentence(n), "completion": str(n)}))
    with pytest.raises(RecipeError, match=r"data\.columns: 'promt'.*did you mean prompt\?"):
        read(DataSection(train=path, columns={"promt": "prompt"}), accepts=CHAT)
    with pytest.raises(DataError, match=r"no column 'promtp'.*did you mean prompt\?"):
        read(DataSection(train=path, columns={"prompt": "promtp"}), accepts=CHAT)
    with pytest.raises(RecipeError, match=r"data\.format: .* label rows are for task=classify"):
        read(DataSection(train=path, format="label"), accepts=CHAT)
    with pytest.raises(DataError, match="not Alpaca instructions; columns: prompt, completion"):
        read(DataSection(train=path, format="alpaca"), accepts=CHAT)


ROWS = [{"text": "今天，天气很好", "label": "好"}, {"text": 'he said "no",\nthen left', "label": "bad"}]
CSV = 'text,label\n"今天，天气很好",好\n"he said ""no"",\nthen left",bad\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS)),
        ("crlf.jsonl", jsonl(ROWS).replace(b"\n", b"\r\n")),
        ("mac.jsonl", jsonl(ROWS).replace(b"\n", b"\r")),
        ("blank.jsonl", b"\n\n" + jsonl(ROWS).replace(b"\n", b"\n\n")),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("wrapped.json", json.dumps({"version": "1", "data": ROWS}, ensure_ascii=False).encode()),
        ("lines.json", jsonl(ROWS)),
        ("array.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("noextension", jsonl(ROWS)),
        ("a.csv", CSV.encode()),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("crlf.csv", CSV.replace("\n", "\r\n").encode()),
        ("semicolon.csv", CSV.replace("text,label", "text;label").replace('",', '";').encode()),
        (
            "a.tsv",
            CSV.replace("text,label", "text\tlabel").replace('",好', '"\t好').replace('",bad', '"\tbad').encode(),
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_every_kind_of_file(tmp_path, name, content, packed):
    path = write(tmp_path, gzip.compress(content) if packed else content, name + (".gz" if packed else ""))
    found = look(path)
    assert (found.format, found.rows, found.columns) == ("label", 2, ("text", "label"))
    texts = [(record.text.replace("\r\n", "\n").replace('";', '",'), record.label) for record in found.samples]
    assert texts == [(row["text"], row["label"]) for row in ROWS]


def test_lines_of_rows_inside_arrays_and_csv(tmp_path):
    found = look(write(tmp_path, b'{"n": 1,\n"rows": [\n{"text": "a b"},\n\n{"text":\n "c d"}]}', "a.json"))
    assert [record.where.rpartition(":")[2] for record in found.samples] == ["3", "5"]
    found = look(write(tmp_path, CSV.encode() + b"z,y\n", "a.csv"))
    assert [record.where.rpartition(":")[2] for record in found.samples] == ["2", "3", "5"]


def test_a_csv_cell_may_hold_turns_as_json(tmp_path):
    turns = json.dumps(MESSAGES["messages"]).replace('"', '""')
    found = look(write(tmp_path, f'messages,id\n"{turns}",7\n'.encode(), "a.csv"))
    assert found.format == "messages"
    assert found.samples[0].messages[1] == Message("user", "你好！")


def test_look_describes_the_answers(tmp_path):
    rows = many(lambda n: {"prompt": sentence(n), "completion": json.dumps({"team": "x", "urgency": n, "z": 1})})
    found = look(write(tmp_path, rows))
    assert found.json_keys == ("team", "urgency", "z")
    assert found.answer_marker is None
    rows = many(lambda n: {"prompt": sentence(n), "completion": f"So it is\n#### {n}"})
    found = look(write(tmp_path, rows))
    assert (found.json_keys, found.answer_marker) == (None, "####")
    assert found.median_characters == int(sorted(len(sentence(n)) + len(f"So it is\n#### {n}") for n in range(30))[15])
    assert found.cjk_share == 0
    found = look(write(tmp_path, many(lambda n: {"text": f"天气很好ab{n}"})))
    assert found.cjk_share == pytest.approx(4 / 6)


def test_look_takes_columns(tmp_path):
    path = write(tmp_path, many(lambda n: {"a": sentence(n), "b": "xy"[n % 2]}))
    found = look(path, {"text": "a", "label": "b"})
    assert (found.format, found.labels) == ("label", {"x": 15, "y": 15})


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "format_word", "task_formats"),
    [
        ("banking77/train", "label", CLASSIFY),
        ("thucnews10/test", "label", CLASSIFY),
        ("zh_review_sentiment/train", "label", CLASSIFY),
        ("gsm8k/train", "prompt", CHAT),
        ("humaneval/test", "prompt", COMPLETE),
        ("mbpp/train", "prompt", COMPLETE),
        ("pystdlib_functions/train", "prompt", COMPLETE),
        ("alpaca_en_demo/train", "messages", CHAT),
        ("alpaca_zh_demo/train", "messages", CHAT),
        ("identity/train", "messages", CHAT),
        ("glaive_toolcall_en/train", "sharegpt", CHAT),
        ("lawbench_2-8/train", "alpaca", CHAT),
        ("lawbench_3-3/train", "alpaca", CHAT),
        ("c4_demo/test", "text", COMPLETE),
        ("wikitext2/test", "text", COMPLETE),
    ],
)
def test_real_files_are_recognised(name, format_word, task_formats):
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    splits = read(DataSection(train=str(path), max_rows=600), accepts=task_formats)
    assert splits.format == format_word
    assert splits.train
    assert look(path).format == format_word


@pytest.mark.parametrize(
    ("name", "columns"), [("blimp", "good, bad, uid"), ("ifeval", "key, prompt"), ("suzuki_yield", "rxn, yield")]
)
def test_real_files_of_other_shapes_are_refused_with_their_columns(name, columns):
    path = SHARED / name / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with pytest.raises(DataError, match=f"columns: {columns}.*data\\.columns="):
        look(path)
