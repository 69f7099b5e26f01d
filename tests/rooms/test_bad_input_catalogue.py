"""Whatever a user gives that is wrong is answered with place, cause and remedy, before any weight is loaded.

The models here have a configuration and a tokenizer but no weights, so whoever tried to load some would end in another
message. Where a case is told and goes on, the note is what is looked for.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny

from metier import api

MODELS = ("llama", "gpt2", "bert", "t5")
LINES = {"chat": "talks", "complete": "texts", "classify": "classes"}
MOST_LINES = 30


def rows(kind):
    """Sixty sound rows."""
    return [
        {
            "talks": talk(("user", f"where is order {n} of {n * 7919}"), ("assistant", f"it left in van {n}")),
            "pairs": {"prompt": f"where is order {n} of {n * 7919}", "completion": f"it left in van {n}"},
            "texts": {"text": f"order {n} of {n * 7919} left in van {n * 31}"},
            "classes": {"text": f"where is order {n} of {n * 7919}", "label": ("late", "lost", "fine")[n % 3]},
        }[kind]
        for n in range(60)
    ]


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def content(lines):
    """Bytes as they are, a text as it is, rows as JSONL."""
    if isinstance(lines, bytes):
        return lines
    if isinstance(lines, str):
        return lines.encode()
    return "".join(
        (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines
    ).encode()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models without weights."""
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        (tiny.make(name, root / name) / "model.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        yield root


@pytest.fixture
def check(models, metier, tmp_path, monkeypatch):
    """`metier check` of a small job; sections are merged into it, overrides given as they are."""
    monkeypatch.chdir(tmp_path)

    def call(lines=None, *overrides, task="chat", model="", name="", command="check", **sections):
        name = name or "train.jsonl"
        (tmp_path / name).write_bytes(content(rows(LINES[task]) if lines is None else lines))
        model = model or {"chat": "llama", "complete": "gpt2", "classify": "bert"}[task]
        tree = {
            "model": {"base": str(models / model), "device": "cpu"},
            "data": {"train": name},
            "task": {"kind": task},
            "method": {"kind": "lora", "rank": 2},
            "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.001},
            "evaluate": {"retention": "off"},
            "export": {"folder": "runs/it"},
        }
        for section, keys in sections.items():
            tree[section] = {**tree[section], **keys}
        (tmp_path / "job.json").write_text(json.dumps(tree))
        return metier(command, "job.json", *overrides)

    return call


def answered(done, code, *words):
    """One short answer in our words: place, cause, remedy."""
    assert done.code == code, done.err + done.out
    assert "Traceback" not in done.err + done.out
    assert "a bug in metier" not in done.err
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert 0 < len(said) <= MOST_LINES
    assert all(re.match(r"error: .+: .+", line) for line in said)
    assert " - " in said[0], said[0]
    for word in words:
        assert word in done.err, done.err


def noted(done, *words):
    """It goes on, and says so."""
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    for word in words:
        assert word in told, told


def sheet():
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return raw.getvalue()


T, P, C, X = rows("talks"), rows("pairs"), rows("classes"), rows("texts")
MORE = [talk(("user", f"and order {n} of {n * 6007} then"), ("assistant", f"in van {n}")) for n in range(60)]

FILES = {
    # number in the catalogue, or a neighbour: (name, content, what is said)
    "1 a line cut in two": (
        "a.jsonl",
        [*T[:40], '{"messages": [{"ro', *T[40:]],
        ("a.jsonl:41: not JSON: string not closed",),
    ),
    "3 empty": ("a.jsonl", b"", ("a.jsonl: is empty",)),
    "24 no rows": ("a.jsonl", b"\n\n\n", ("a.jsonl: is empty",)),
    "24 an empty list": ("a.json", b"[]", ("a.json: holds no row",)),
    "4 a row lacks the field": (
        "a.jsonl",
        [*T, {"message": []}],
        ("a.jsonl:61: has no messages; fields: message", "rename"),
    ),
    "5 null": ("a.jsonl", [*T, {"messages": None}], ("a.jsonl:61: messages is null",)),
    "5 null content": (
        "a.jsonl",
        [*T, talk(("user", None), ("assistant", "x"))],
        ("a.jsonl:61: turn 1 (user) has no text",),
    ),
    "6 other columns": (
        "a.jsonl",
        [{"says": f"order {n} is late by {n * 31} days", "we_say": f"van {n}"} for n in range(30)],
        ("columns: says, we_say", "data.columns={prompt: says, completion: we_say}"),
    ),
    "9 empty assistant": (
        "a.jsonl",
        [*T, talk(("user", "a"), ("assistant", ""))],
        ("a.jsonl:61: turn 2, the reply, is empty",),
    ),
    "10 empty completion": (
        "a.jsonl",
        [*P, {"prompt": "a b", "completion": " "}],
        ("a.jsonl:61: completion is empty",),
    ),
    "8 last turns are the user's": (
        "a.jsonl",
        [
            *T,
            talk(("user", "a"), ("assistant", "b"), ("user", "c")),
            talk(("user", "d"), ("assistant", "e"), ("user", "f")),
        ],
        ("a.jsonl:61: 2 rows of 62 end without a reply (line 61, 62)",),
    ),
    "nested list": ("a.jsonl", [*P, {"prompt": [["a"]], "completion": "b"}], ("prompt is a list",)),
    "number as text": ("a.jsonl", [*P, {"prompt": "a b", "completion": 42}], ("completion is a number, 42", "quotes")),
    "NaN": ("a.jsonl", [*P, '{"prompt": "a", "completion": NaN}'], ("a.jsonl:61: not JSON: NaN is not a JSON number",)),
    "a key twice": ("a.jsonl", [*P, '{"prompt": "a", "prompt": "b"}'], ("the key 'prompt' stands twice",)),
    "half a surrogate": ("a.jsonl", [*P, '{"prompt": "\\ud83d", "completion": "b"}'], ("half a surrogate pair",)),
    "a tab in a string": ("a.jsonl", [*P, '{"prompt": "a\tb", "completion": "b"}'], ("a control character",)),
    "a megabyte in a line": (
        "a.jsonl",
        [*T, talk(("user", "a " * 500_000), ("assistant", "b"))],
        ("a.jsonl:61: 5,0|a.jsonl:61: 50",),
    ),
    "zero bytes": ("a.jsonl", b"\0" * 5000, ("begins with zero bytes", "copy it again")),
    "UTF-16": ("a.jsonl", content(T).decode().encode("utf-16"), ("a.jsonl:1: not UTF-8", "UTF-16; convert it: iconv")),
    "latin-1": (
        "a.jsonl",
        content(T[:3]) + '{"messages": "café"}\n'.encode("latin-1"),
        ("a.jsonl:4: not UTF-8 at byte", "WINDOWS-1252"),
    ),
    "a workbook named csv": ("a.csv", sheet(), ("a .xlsx file is not read", "save it as CSV UTF-8")),
    "an old workbook named csv": (
        "a.csv",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
        ("a .xls file is not read",),
    ),
    "a pickle named jsonl": ("a.jsonl", pickle.dumps(T), ("pickles are not read, for they can run code",)),
    "a web page": ("a.jsonl", b"<!DOCTYPE html><html><body>404</body></html>", ("is a web page, not rows",)),
    "a pointer of Git LFS": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        ("Git LFS", "git lfs pull"),
    ),
    "a PDF": ("a.jsonl", b"%PDF-1.7 ...", ("is a PDF, not rows",)),
    "a model": ("a.jsonl", b"GGUF\3\0\0\0", ("is a model (GGUF), not rows", "model.base")),
    "cells": ("a.jsonl", b"\x89HDF\r\n\x1a\n", ("is an HDF5 file", "task=cells")),
    "Zstandard": ("a.jsonl", b"\x28\xb5\x2f\xfd1234", ("a .zst file is not read", "unzstd")),
    "a table named jsonl": ("a.jsonl", "text,label\n" + "some words,a\n" * 30, ("holds no JSON", "rename it to a.csv")),
    "JSON lines named csv": ("a.csv", content(T), ("holds JSON lines, not a table", "rename it to a.jsonl")),
    "a cut gzip file": (
        "a.jsonl.gz",
        gzip.compress(content(T))[:90],
        ("not a whole gzip file", "copy or download it again"),
    ),
    "Python's own words": ("a.jsonl", [*T, "{'messages': None}"], ("a.jsonl:61: not JSON", "JSON library")),
    "two rows": ("a.jsonl", T[:2], ("2 rows are too few", "at least 6 rows are needed")),
    "a thousand faults": (
        "a.jsonl",
        [*T, *(f"nonsense {n}" for n in range(1000))],
        ("and 980 more of the same kind (not JSON)",),
    ),
    "rows of another task": ("a.jsonl", C, ("they are texts and labels, for task=classify",)),
}


@pytest.mark.parametrize(("name", "lines", "words"), FILES.values(), ids=FILES.keys())
def test_files_of_conversations(check, name, lines, words):
    done = check(lines, name=name)
    answered(done, 65)
    for word in words:
        assert any(option in done.err for option in word.split("|")), done.err


CLASSES = {
    "28 fractions": (
        [{"text": f"order {n} is late", "label": n / 7} for n in range(60)],
        ("is a fraction", "and 40 more"),
    ),
    "29 one class": (
        [c | {"label": "late"} for c in C],
        ("every row has the label 'late': there is nothing to tell apart",),
    ),
    "no label": (X, ("the rows are not texts and labels; columns: text", "add a column label")),
    "a list of labels": ([*C, {"text": "a", "label": ["a", "b"]}], ("train.jsonl:61: label is a list",)),
    "null label": ([*C, {"text": "a", "label": None}], ("train.jsonl:61: label is null",)),
    "the label in the text": (
        [{"text": f"order {n * 7919} is {c['label']}", "label": c["label"]} for n, c in enumerate(C)],
        ("the text holds its own label",),
    ),
    "no text at all": ([{"text": "", "label": "a"}] * 40, ("text is empty", "and 20 more")),
}


@pytest.mark.parametrize(("lines", "words"), CLASSES.values(), ids=CLASSES.keys())
def test_rows_of_classes(check, lines, words):
    answered(check(lines, task="classify"), 65, *words)


RECIPES = {
    "17 rank 0": ("method.rank=0", 2, "method.rank is 0"),
    "negative rank": ("method.rank=-4", 2, "method.rank is -4"),
    "rank as text": ("method.rank=eight", 2, "method.rank is 'eight'"),
    "a rank that no layer has": ("method.rank=4000", 2, "rank 4000 is more than the 32"),
    "alpha 0": ("method.alpha=0", 2, "method.alpha is 0"),
    "dropout 1": ("method.dropout=1", 2, "method.dropout is 1"),
    "16 no such layer": ("method.targets=[q_porj]", 2, "'q_porj' matches no linear layer - did you mean q_proj?"),
    "more blocks than there are": (
        "method={kind: freeze, blocks: 99}",
        2,
        "the network has 2 blocks, 99 were asked for",
    ),
    "a key of another method": ("method.blocks=2", 2, "unknown key method.blocks"),
    "22 negative rate": ("train.learning_rate=-1", 2, "train.learning_rate is -1"),
    "a rate that is no number": ("train.learning_rate=.nan", 2, "train.learning_rate is nan"),
    "infinite rate": ("train.learning_rate=.inf", 2, "train.learning_rate is inf"),
    "a word for the rate": ("train.learning_rate=fast", 2, "train.learning_rate is 'fast' - auto, or"),
    "no epochs": ("train.epochs=0", 2, "train.epochs is 0"),
    "batch 0": ("train.batch_size=0", 2, "train.batch_size is 0"),
    "half a row": ("train.batch_size=2.5", 2, "train.batch_size is 2.5"),
    "a seed in words": ("train.seed=lucky", 2, "train.seed is 'lucky'"),
    "negative seed": ("data.seed=-1", 2, "data.seed is -1"),
    "mistyped key": ("train.learning_rte=1", 2, "unknown key train.learning_rte - did you mean learning_rate?"),
    "mistyped section": ("trian.seed=1", 2, "unknown key trian - did you mean train?"),
    "mistyped word": ("data.overlap=alow", 2, "did you mean allow?"),
    "mistyped task": ("task=chta", 2, "did you mean chat?"),
    "no equals sign": ("train.seed", 2, "an override is section.key=value"),
    "a share above one": ("data.test=1.5", 2, "data.test is 1.5"),
    "shares that take all": ("data.test=0.95", 2, "nothing is left to learn from"),
    "beyond the positions": ("task.max_tokens=4096", 2, "4096 tokens are more than the model's context of 512"),
    "11 too long, every row": (
        "task.max_tokens=8",
        65,
        "of 48 rows are longer than task.max_tokens; the longest needs 4|more: 48 of 48",
    ),
    "11 too long and dropped": (
        "task={kind: chat, max_tokens: 8, too_long: drop}",
        65,
        "0 of 48 train rows keep a learnt token within 8 tokens; the shortest needs",
    ),
    "no such template": ("task.template=none.jinja", 2, "task.template: none.jinja: no such file"),
    "no such device": ("model.device=gpu", 2, "auto, cpu, mps, cuda or cuda:0"),
    "a GPU that is not there": ("model.device=cuda:97", 2, "model.device"),
    "no flash attention": ("model.attention=flash_attention_2", 2, "flash_attn is not installed - set it to auto"),
    "8 bits on a CPU": ("train.optimizer={states: int8}", 2, "8-bit states need a CUDA device - set it to fp32"),
    "no such rows": ("data.train=trian.jsonl", 65, "trian.jsonl: does not exist - did you mean train.jsonl?"),
    "a share in percent": ("data.test=10%", 65, "10%: does not exist"),
    "the same file to judge": ("data.test=train.jsonl", 2, "names the same file as data.train"),
    "47 a device": ("data.train=/dev/zero", 65, "not a regular file but a pipe, socket or device"),
    "47 a pipe": ("data.train=pipe", 65, "not a regular file"),
    "47 a terabyte": ("data.train=sparse.jsonl", 65, "holds 1,024 GiB; at most 20 GiB are read"),
    "a folder for a file": ("data.train=.", 65, "is a folder, not a file - name a file in it, such as"),
    "no such model": ("model.base=./lama", 65, "no such folder"),
    "rows for a model": ("model.base=train.jsonl", 65, "a model is a folder"),
    "an empty folder for a model": ("model.base=empty", 65, "the folder has no config.json"),
    "no such pack": ("evaluate.retention=neutrl", 2, "evaluate.retention: neutrl: no such file"),
    "rows for a pack": ("evaluate.retention=train.jsonl", 65, "and 50 more lines with faults"),
    "no such schema": ("evaluate.json_schema=none.json", 2, "none.json: cannot be read"),
    "no schema": ("evaluate.json_schema=bad.json", 2, "bad.json: not a JSON Schema: 'objct' is not valid"),
    "a schema that no reference meets": ("evaluate.json_schema=number.json", 2, "test rows is valid by it"),
    "a marker that no reference holds": ("evaluate.answer_after='####'", 2, "test rows holds '####' - correct it"),
    "tests that no row brings": ("evaluate.run_tests=true", 2, "test rows has a column test or tests"),
    "confidence 2": ("evaluate.confidence=2", 2, "evaluate.confidence is 2"),
    "no such group": ("data.group=patient", 65, "has no column 'patient', which data.group names"),
    "no such column": ("data.columns={messages: talk}", 65, "has no column 'talk', which data.columns names"),
    "another task's format": ("data.format=label", 2, "the task does not read label rows"),
}


@pytest.mark.parametrize(("override", "code", "words"), RECIPES.values(), ids=RECIPES.keys())
def test_recipes(check, tmp_path, override, code, words):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"type": "objct"}')
    (tmp_path / "number.json").write_text('{"type": "number"}')
    with (tmp_path / "sparse.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    done = check(None, override)
    answered(done, code)
    assert any(option in done.err for option in words.split("|")), done.err


FITS = {
    "an encoder that shall chat": ({"model": "bert"}, "the model is an encoder, which cannot write text"),
    "13 no chat template": ({"model": "gpt2"}, "the model brings no chat template - give one with task.template"),
    "label words of an encoder": ({"task": "classify", "way": "words"}, "label words need a causal language model"),
    "text for an encoder-decoder": (
        {"task": "complete", "model": "t5"},
        "continuing text needs a causal language model",
    ),
    "no markers for the middle": ({"task": "complete", "middle_share": 0.5}, "has no fill-in-the-middle tokens"),
    "a template without text": (
        {"task": "classify", "model": "gpt2", "template": "Label:"},
        "the template has no {text}",
    ),
    "26 labels that are not named": (
        {"task": "classify", "labels": ["late", "lost"]},
        "labels that are not named: fine",
    ),
}


@pytest.mark.parametrize(("job", "words"), FITS.values(), ids=FITS.keys())
def test_a_task_that_the_model_cannot_do(check, job, words):
    keys = {key: value for key, value in job.items() if key not in {"task", "model"}}
    overrides = [f"task.{key}={json.dumps(value)}" for key, value in keys.items()]
    done = check(None, *overrides, task=job.get("task", "chat"), model=job.get("model", ""))
    answered(done, 2, words)


class TestTemplates:
    @pytest.mark.parametrize(
        ("text", "code", "words"),
        [
            (b"{% for m in messages %}", 65, "the chat template refuses this conversation"),
            (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", 77, "is unsafe"),
            (b"hello", 65, "the template leaves replies out"),
            (b"\xff\xfe\0\0", 2, "not UTF-8 at byte 0 - save it as UTF-8"),
        ],
        ids=["not closed", "40 a program", "12 without replies", "binary"],
    )
    def test_that_do_not_serve(self, check, tmp_path, text, code, words):
        (tmp_path / "chat.jinja").write_bytes(text)
        answered(check(None, "task.template=chat.jinja"), code, words)


class TestSplits:
    def test_25_training_rows_that_judge(self, check, tmp_path):
        asked = "the blue van with the broken mirror left for the harbour on Monday, where is it now"
        train = [*T, talk(("user", asked), ("assistant", "at sea"))]
        test = [*T[:4], talk(("user", f"{asked} please"), ("assistant", "still at sea"))]
        (tmp_path / "test.jsonl").write_bytes(content(test))
        done = check(train, "data.test=test.jsonl")
        answered(done, 65, "5 training rows also in test (test.jsonl): 4 word for word, 1 nearly", "data.overlap=drop")
        noted(check(train, "data.test=test.jsonl", "data.overlap=allow"), "They stay, as data.overlap=allow says")
        noted(check(train, "data.test=test.jsonl", "data.overlap=drop"), "They are left out of training")

    def test_a_label_that_training_lacks(self, check, tmp_path):
        (tmp_path / "test.jsonl").write_bytes(
            content([{"text": f"never seen {n * 31}", "label": "new"} for n in range(40)])
        )
        done = check(None, "data.test=test.jsonl", task="classify")
        answered(done, 65, "test.jsonl:1: the label 'new' never stands in train", "and 20 more")

    def test_a_test_without_labels(self, check, tmp_path):
        (tmp_path / "test.jsonl").write_bytes(content(X))
        answered(
            check(None, "data.test=test.jsonl", task="classify"),
            65,
            "test.jsonl: the rows are not texts",
            "add a column label",
        )

    def test_one_class_in_the_test_alone(self, check, tmp_path):
        (tmp_path / "test.jsonl").write_bytes(
            content([{"text": f"never seen {n * 31}", "label": "late"} for n in range(40)])
        )
        noted(check(None, "data.test=test.jsonl", task="classify"), "test shows only 'late' of 3 classes")

    def test_faults_of_all_files_come_at_once(self, check, tmp_path):
        (tmp_path / "test.jsonl").write_bytes(content([*T[:9], "nonsense"]))
        done = check([*T, "rubbish"], "data.test=test.jsonl", "data.validation=none.jsonl")
        answered(done, 65, "train.jsonl:61", "test.jsonl:10", "none.jsonl: does not exist")


NOTED = {
    "2 a byte order mark": (b"\xef\xbb\xbf" + content(T), (), "no faults found"),
    "CRLF": (content(T).replace(b"\n", b"\r\n"), (), "no faults found"),
    "gzip under another name": (gzip.compress(content(T)), (), "no faults found"),
    "emoji": ([*T, talk(("user", "👩\u200d🚀 where?"), ("assistant", "🛰️"))], (), "no faults found"),
    "7 two assistants in a row": (
        [*T, talk(("user", "a b"), ("assistant", "c"), ("assistant", "d"))],
        (),
        "1 conversation has two assistant turns in a row (first at train.jsonl:61)",
    ),
    "8 one in a hundred ends with the user": (
        [*T, *MORE, talk(("user", "a"), ("assistant", "b"), ("user", "c"))],
        (),
        "1 row of 121 end without a reply (line 121): left out",
    ),
    "21 rate 0": (T, ("train.learning_rate=0",), "train.learning_rate is 0: nothing will be learnt"),
    "a rate without sense": (T, ("train.learning_rate=1e6",), "the run may diverge"),
    "23 a batch of more than all": (
        T,
        ("train.batch_size=512",),
        "train.batch_size is 512, but there are 48 training examples",
    ),
    "a row twice": ([*T, T[0]], (), "1 row repeats another row word for word"),
    "48 personal data": (
        [*T, talk(("user", "write to jane@firma.de"), ("assistant", "sk-" + "Ab3" * 12))],
        (),
        "e-mail addresses: 1 in 1 row, such as train.jsonl:61 (j…e)",
    ),
    "48 personal data left out": (
        [*T, talk(("user", "write to jane@firma.de"), ("assistant", "yes"))],
        ("data.personal_data=drop", "data.test=0.2"),
        "with personal data are left out, as data.personal_data=drop says",
    ),
}


@pytest.mark.parametrize(("lines", "overrides", "words"), NOTED.values(), ids=NOTED.keys())
def test_what_can_be_done_is_done_and_said(check, lines, overrides, words):
    done = check(lines, *overrides)
    noted(done, words)
    assert "jane@firma.de" not in done.out.partition("note:")[2]


def test_27_labels_that_differ_by_a_slip(check):
    slips = [c | {"label": ("Late", "late", "lost", "LOST")[n % 4]} for n, c in enumerate(C)]
    noted(check(slips, task="classify"), "the labels 'Late', 'late' differ only by case or spaces", "'LOST', 'lost'")


class TestStrictness:
    @pytest.mark.parametrize(
        ("turns", "words"),
        [
            (
                [("user", "a b"), ("assistant", "c"), ("assistant", "d")],
                "two assistant turns in a row, the first one here",
            ),
            ([("user", "a b"), ("assistant", "c"), ("user", "d")], "1 row of 61 end without a reply"),
        ],
    )
    def test_refuses_what_would_only_be_told(self, check, turns, words):
        answered(check([*T, talk(*turns)], "data.strict=true"), 65, "train.jsonl:61: ", words)

    def test_lets_sound_rows_pass(self, check):
        noted(check(None, "data.strict=true"), "no faults found")

    def test_personal_data_can_be_refused(self, check):
        done = check([*T, talk(("user", "I am jane@firma.de"), ("assistant", "hello"))], "data.personal_data=refuse")
        answered(done, 65, "e-mail addresses: 1 in 1 row")
        assert "jane@firma.de" not in done.err

    def test_where_all_rows_are_personal_nothing_is_left(self, check):
        lines = [talk(("user", f"I am jane{n}@firma.de and wait"), ("assistant", f"order {n * 31}")) for n in range(60)]
        answered(check(lines, "data.personal_data=drop"), 65, "no train row is without personal data")


RECIPE_FILES = {
    "not there": (None, "the recipe does not exist"),
    "a folder": ("folder", "the recipe is a folder"),
    "empty": (b"", "a recipe is a mapping of sections"),
    "a tab": (b"model:\n\tbase: x\n", "recipe.yaml:2: not YAML"),
    "not closed": (b"model: {base: x", "not YAML"),
    "a key twice": (b"model: {base: x}\nmodel: {base: y}\n", "recipe.yaml:2: model stands twice"),
    "aliases": (b"a: &a [1]\nb: [*a]\n", "aliases (*name) are not read"),
    "UTF-16": ("model: {base: x}".encode("utf-16"), "not UTF-8 at byte 0"),
    "the rows": (content(T), "not YAML"),
    "two sections": (b"model: {base: x}\n", "task is missing"),
    "a list": (b"- model\n- data\n", "a recipe is a mapping of sections"),
    "two megabytes": (b"# " + b"x" * (2 << 20), "larger than 1 MiB"),
}


@pytest.mark.parametrize(("raw", "words"), RECIPE_FILES.values(), ids=RECIPE_FILES.keys())
def test_files_of_recipes(metier, tmp_path, raw, words):
    path = tmp_path / "recipe.yaml"
    if raw == "folder":
        path.mkdir()
    elif raw is not None:
        path.write_bytes(raw)
    answered(metier("train", path), 2, words)


class TestCommands:
    @pytest.mark.parametrize(
        "words",
        [
            ("evaluate", "nowhere"),
            ("predict", "nowhere", "--data", "rows.jsonl"),
            ("chat", "nowhere", "--message", "hello"),
            ("evaluate", "."),
            ("train", "job.yaml", "--learning-rate", "3"),
            ("tarin", "job.yaml"),
            ("predict", "nowhere", "--data", "rows.jsonl", "--output", "."),
            ("runs", "rows.jsonl"),
            ("evaluate", "nowhere", "--fail-under", "exact_match=high"),
        ],
        ids=" ".join,
    )
    def test_that_lead_nowhere(self, metier, tmp_path, monkeypatch, words):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "rows.jsonl").write_bytes(content(T))
        answered(metier(*words), 2)

    def test_31_a_file_where_the_run_should_be(self, check):
        answered(
            check(None, "export.folder=train.jsonl", command="train"),
            2,
            "export.folder: train.jsonl: is a file, not a folder",
        )

    def test_init_from_what_is_not_there(self, metier, models, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        answered(metier("init", "-m", models / "llama", "-d", "none.jsonl"), 65, "none.jsonl: does not exist")
        (tmp_path / "rows.jsonl").write_bytes(content(T))
        answered(metier("init", "-m", "nollama/", "-d", "rows.jsonl"), 65, "no such folder")

    def test_weights_that_are_not_there_come_last(self, check):
        """Everything else is answered above; only a job without a fault goes on to look for weights."""
        answered(check(None, command="train"), 65, "weights")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished run, its base and its rows, in one folder."""
    root = tmp_path_factory.mktemp("tuned")
    tiny.make("llama", root / "base")
    (root / "rows.jsonl").write_bytes(content(T))
    tree = {
        "model": {"base": str(root / "base"), "device": "cpu"},
        "data": {"train": str(root / "rows.jsonl")},
        "task": "chat",
        "method": {"kind": "lora", "rank": 2},
        "train": {"max_steps": 2, "batch_size": 8, "evaluations": 1},
        "evaluate": {"rows": 2, "max_new_tokens": 4, "retention": "off", "baselines": False},
        "export": {"folder": str(root / "run")},
    }
    (root / "job.json").write_text(json.dumps(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        api.train(root / "job.json")
        yield root


def lose(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGED = {
    "no adapter": (lambda run: lose(run / "adapter"), 65, "the adapter is gone"),
    "an empty adapter folder": (lambda run: empty(run / "adapter"), 65, "the adapter lacks adapter_config.json and"),
    "an adapter without weights": (
        lambda run: lose(run / "adapter" / "adapter_model.safetensors"),
        65,
        "the adapter lacks adapter_model.safetensors",
    ),
    "cut weights": (
        lambda run: cut(run / "adapter" / "adapter_model.safetensors"),
        65,
        "the adapter's file is damaged",
    ),
    "a cut configuration": (lambda run: cut(run / "adapter" / "adapter_config.json"), 65, "the adapter does not fit"),
    "cut facts": (lambda run: cut(run / "metier.json"), 65, "metier.json: is damaged"),
    "facts of something else": (lambda run: (run / "metier.json").write_text("{}"), 65, "metier.json: is damaged"),
    "a cut recipe": (lambda run: (run / "job.resolved.yaml").write_text("model: {base"), 2, "not YAML"),
    "not finished": (lambda run: lose(run / "metier.json"), 2, "this run has not finished"),
}


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


class TestTuned:
    @pytest.mark.parametrize(("harm", "code", "words"), DAMAGED.values(), ids=DAMAGED.keys())
    def test_a_damaged_run(self, tuned, metier, tmp_path, harm, code, words):
        run = shutil.copytree(tuned / "run", tmp_path / "run")
        harm(run)
        answered(metier("evaluate", run, "--quiet"), code, words)

    def test_18_a_base_of_the_same_shapes_is_another_base(self, tuned, metier, tmp_path):
        """One number of one tensor differs."""
        from safetensors.torch import load_file, save_file

        base = shutil.copytree(tuned / "base", tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        run = shutil.copytree(tuned / "run", tmp_path / "run")
        recipe = (run / "job.resolved.yaml").read_text().replace(str(tuned / "base"), str(base))
        (run / "job.resolved.yaml").write_text(recipe)
        for words in (("evaluate", run), ("chat", run, "--message", "hello")):
            answered(
                metier(*words, "--quiet"), 65, "is not the base that this adapter was trained on: its weights differ"
            )

    def test_32_another_recipe_in_the_same_folder(self, tuned, metier):
        done = metier("train", tuned / "job.json", "train.learning_rate=0.5", "--quiet")
        answered(done, 2, "the folder holds a run of another recipe: train.learning_rate: auto -> 0.5")

    @pytest.mark.parametrize("command", ["evaluate", "predict"])
    def test_questions_that_are_none(self, tuned, metier, tmp_path, command):
        (tmp_path / "empty.jsonl").write_bytes(b"")
        (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\0\1")
        (tmp_path / "strange.jsonl").write_bytes(b'{"a": 1}\n')
        for name, words in {
            "none.jsonl": "does not exist",
            "": "is a folder, not a file",
            "empty.jsonl": "is empty",
            "binary.jsonl": "not UTF-8",
            "strange.jsonl": "columns",
        }.items():
            answered(metier(command, tuned / "run", "--data", tmp_path / name, "--quiet"), 65, words)

    def test_an_adapter_for_a_base(self, tuned, metier, tmp_path):
        done = metier(
            "train", tuned / "job.json", f"model.base={tuned / 'run'}", f"export.folder={tmp_path / 'new'}", "-q"
        )
        answered(done, 65, "this is an adapter; model.base is the model it was trained on")


ELSEWHERE = {
    "14 15 what fills a batch": "rooms/test_models.py::test_a_missing_pad_token_is_told",
    "18 an adapter of other shapes": "contracts/test_methods.py::test_an_adapter_of_another_base_is_refused",
    "19 a rate that explodes": "rooms/test_divergence.py::test_an_exploding_rate_is_stopped_before_the_step_after",
    "20 nothing unsound is saved": "rooms/test_divergence.py::test_nothing_that_is_not_finite_is_ever_saved",
    "30 nothing to resume": "rooms/test_training.py::test_no_checkpoint_is_none",
    "31 two runs, one folder": "rooms/test_run.py::test_a_living_process_is_respected",
    "32 another recipe": "rooms/test_run.py::test_another_recipe_is_refused_with_the_difference",
    "33 34 36 37 damaged checkpoints": "rooms/test_training.py::test_a_damaged_checkpoint_is_named_and_passed_over",
    "35 truncated weights": "rooms/test_models.py::test_truncated_weights_are_refused",
    "38 a full disk": "rooms/test_training.py::test_a_full_disk_leaves_the_older_checkpoint",
    "39 42 stopped": "rooms/test_cli.py::test_a_stopped_training_ends_with_75_and_the_same_command_finishes",
    "43 a pickled module": "rooms/test_pickled.py::test_a_published_module_without_its_classes",
    "44 a hostile pickle": "rooms/test_pickled.py::test_calls_are_refused_by_name",
    "45 foreign code": "rooms/test_models.py::test_foreign_code_is_refused_and_not_run",
    "46 a lying GGUF file": "rooms/test_models.py::test_a_lying_gguf_file_is_refused",
    "49 cells that are no numbers": "rooms/test_data_cells.py::test_not_finite",
    "50 genes of another kind": "rooms/test_data_cells.py::test_overlap",
    "51 too long a panel": "rooms/test_run_values.py::test_a_panel_that_is_too_long_is_refused_with_the_counts",
}
"""What needs a trained run, a damaged one, or cells is held by the tests of its own room."""
ON_A_SERVER = {41}


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_what_is_held_elsewhere_is_held(place):
    file, _, name = place.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text("utf-8")


def test_no_number_of_the_catalogue_is_forgotten():
    """Cases carry the numbers of the 51 inputs that the design lists."""
    source = Path(__file__).read_text("utf-8")
    names = re.findall(r'"((?:\d+ )+)', source) + re.findall(r"def test_(\d+)_", source)
    found = {int(number) for name in names for number in name.split()}
    assert set(range(1, 52)) - found == ON_A_SERVER
