"""Sets that outgrow memory: read, checked and encoded just as small ones are, with little held of each row."""

import csv
import gzip
import io
import json
import os
import random

import numpy as np
import pytest
import torch

from metier import tasks
from metier.core import DataError
from metier.data import convert, disk, files, lines, read, similar, strict_json
from metier.data.records import Document, Records
from metier.recipe import DataSection
from metier.tasks import store
from metier.tasks.causal import TokenRow, token_row
from metier.tasks.classify import ClassRow
from metier.tasks.seq2seq import PairRow

PROMPTS = ("prompt", "text")


@pytest.fixture
def tight(monkeypatch, tmp_path):
    """Nothing stays in memory: files are read where they stand, columns go to disk, records are made anew."""
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 50)
    monkeypatch.setattr(strict_json, "LITTLE", 20)
    monkeypatch.setattr(disk, "IN_MEMORY_BYTES", 64)
    monkeypatch.setattr(convert, "KEPT_CHARACTERS", 0)
    monkeypatch.setattr(similar, "PRODUCTS_AT_ONCE", 50)
    monkeypatch.setattr(similar, "CHARACTERS_AT_ONCE", 200)


def rows(count=200):
    chance = random.Random(0)
    vocabulary = [f"w{n}" for n in range(300)]
    base = [" ".join(chance.choices(vocabulary, k=chance.randint(3, 40))) for _ in range(count)]
    made = [{"prompt": f"Please answer with care: {text}", "completion": f"c{n}"} for n, text in enumerate(base)]
    near = [{"prompt": f"Please answer with care: {text} w0", "completion": "n"} for text in base[:20]]
    return made + near + made[:5]


def write(path, content):
    raw = FORMS[path.suffixes[0]](content).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def as_lines(content):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)


def as_table(content):
    written = io.StringIO(newline="")
    table = csv.DictWriter(written, list(content[0]))
    table.writeheader()
    table.writerows(content)
    return "\ufeff" + written.getvalue()


FORMS = {".jsonl": as_lines, ".json": json.dumps, ".csv": as_table}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz"])
def test_a_large_set_is_read_as_a_small_one(tmp_path, request, name):
    path, other = write(tmp_path / name, rows()), write(tmp_path / "other.jsonl", rows()[150:160])
    sections = (DataSection(train=path), DataSection(train=path, test=other, overlap="drop", max_rows=150))
    small = [read(section, accepts=PROMPTS) for section in sections]
    request.getfixturevalue("tight")
    assert [read(section, accepts=PROMPTS) for section in sections] == small


ODD = [
    {"text": 'quoted "a, b"\nthen another line\r\n, and 你好 \U0001f600', "label": "1"},
    {"text": "", "label": "2"},
    {"text": "x" * 200, "label": "3"},
]


@pytest.mark.parametrize("indent", [None, 1])
def test_elements_of_an_array_are_found_wherever_it_is_cut(tmp_path, monkeypatch, indent):
    numbers = [{"n": [1, -2.5e-7, 1e300, 10**30, True, None, "\\", "\u4f60"], **row} for row in ODD]
    path = tmp_path / "a.json"
    text = " \n\t" + json.dumps(numbers, indent=indent)
    path.write_text(text)
    monkeypatch.setattr(strict_json, "LITTLE", 1)
    for size in range(4, 80):
        monkeypatch.setattr(lines, "BLOCK_BYTES", size)
        found = files.read_table(str(path)).rows
        assert [row.values for row in found] == numbers
        assert [row.line for row in found] == [2 if indent is None else 3 + 14 * place for place in range(3)]
    cut = text[:-1].rstrip()
    path.write_text(cut + ", {]")
    for size in range(4, 80):
        monkeypatch.setattr(lines, "BLOCK_BYTES", size)
        table = files.read_table(str(path))
        column = len(cut.rpartition("\n")[2]) + 4
        line = cut.count("\n") + 1
        assert not len(table.rows)
        assert [fault.where for fault in table.faults.shown()] == [f"{path}:{line}"]
        assert f"at column {column}" in next(table.faults.shown()).what


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cells_with_line_breaks_are_read_where_they_stand(tmp_path, end):
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"], lineterminator=end)
        table.writeheader()
        file.write(end)
        table.writerows(ODD)
    found = files.read_table(str(path)).rows
    assert [row.values for row in found] == ODD
    assert [row.line for row in found] == [3, 6, 7]
    assert [found[2].values, found[0].values] == [ODD[2], ODD[0]]


def test_faults_of_a_large_file_keep_their_lines_and_order(tmp_path, request):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "one", "completion": "two"}).encode()
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b'{"a": 1,}', b"", b'{"a": "\xff"}', b"[1]\r", good, b"\xe4"]))
    found = []
    for _ in range(2):
        with pytest.raises(DataError) as error:
            read(DataSection(train=str(path)), accepts=PROMPTS)
        found.append([(fault.where, fault.what, fault.hint) for fault in error.value.faults])
        request.getfixturevalue("tight")
    assert found[0] == found[1]
    assert [where.rpartition(":")[2] for where, _, _ in found[0]] == ["4", "2", "5"]
    assert "byte 8, and 1 more line likewise" in found[0][0][1]


@pytest.mark.usefixtures("tight")
def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", rows())
    splits = read(DataSection(train=path), accepts=PROMPTS)
    assert splits.train[0].prompt
    write(tmp_path / "a.jsonl", rows(201))
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match="has changed since it was checked"):
        splits.train[0]


def test_records_are_a_sequence():
    made = Records(lambda place: Document(f"f:{place}", str(place)), [4, 5, 7])
    assert [record.text for record in made] == ["4", "5", "7"]
    assert (made[-1].text, made[1:][0].text, made.pick([2, 0])[0].text) == ("7", "5", "7")
    assert made == list(made)
    assert made != made[:2]


def examples():
    return [
        [token_row(f"a.jsonl:{n // 2}", list(range(n, 3 * n + 2)), learnt_from=n) for n in range(50)],
        [ClassRow("no line", torch.arange(n + 1), n % 3) for n in range(50)],
        [PairRow(f"a:0{n}", torch.arange(n), torch.arange(3)) for n in range(50)],
    ]


@pytest.mark.parametrize("made", examples(), ids=["tokens", "classes", "pairs"])
@pytest.mark.parametrize("vocabulary", [1000, 100_000])
def test_kept_examples_are_those_that_were_given(request, made, vocabulary):
    for _ in range(2):
        kept = store.keep(iter(made), vocabulary=vocabulary)
        assert len(kept) == len(made)
        for one, other in zip([*kept, kept[-1], kept[3:5][1]], [*made, made[-1], made[4]], strict=True):
            assert type(one) is type(other)
            for name in type(one).__slots__:
                left, right = getattr(one, name), getattr(other, name)
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
                assert not isinstance(left, torch.Tensor) or left.dtype == right.dtype
        assert store.rows_behind(kept) == len({row.where for row in made})
        request.getfixturevalue("tight")


def test_sizes_are_told_without_reading_tokens(monkeypatch):
    class Task:
        def size(self, example):
            return len(example.ids)

    made = examples()[0]
    kept = store.keep(made, vocabulary=100)
    monkeypatch.setattr(store.Stored, "__getitem__", None)
    assert list(tasks.sizes(Task(), kept)) == list(tasks.sizes(Task(), made))


def test_nothing_is_kept_of_nothing():
    assert store.keep([], vocabulary=10) == []


@pytest.mark.usefixtures("tight")
def test_a_column_on_disk_reads_as_written_and_leaves_no_file(tmp_path):
    writer = disk.Writer(np.int32, in_memory=64)
    for start in range(0, 1000, 10):
        writer.add(np.arange(start, start + 10))
    column = writer.done()
    assert len(column) == 1000
    for _ in range(disk.READS_KEPT + 1):
        assert column.read(500, 503).tolist() == [500, 501, 502]
    assert not list((tmp_path / "cache").iterdir())


def test_one_place_costs_its_tokens_and_little_else():
    kept = store.keep((TokenRow("a.jsonl:1", torch.arange(4), torch.arange(4) > 1) for _ in range(1000)), vocabulary=9)
    (ids, _), (learnt, _) = kept._tensors["ids"], kept._tensors["learnt"]
    assert (ids.dtype, learnt.dtype) == (np.uint16, np.bool_)
