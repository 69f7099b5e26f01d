"""Replay: how many general rows, which, none that is judged, and that practising them keeps what they practise."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import metier
from metier import adapt, evaluation, run
from metier.core import DataError, RecipeError
from metier.recipe import LoRAMethod, parse
from metier.run import replay
from metier.run.guards import learnt


def chat(question, answer) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat(f"Message {i}: the order {i * 37} came {i % 9} days late", f"team {i % 3}, number {i}") for i in range(48)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("replay")
    for name in ("llama", "t5", "bert"):
        tiny.make(name, root / name)
    write(root / "train.jsonl", ROWS[:40])
    write(root / "test.jsonl", ROWS[40:])
    write(root / "class.jsonl", [{"text": f"message {i} came late", "label": "abc"[i % 3]} for i in range(48)])
    return root


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def job(
    place, *, model="llama", name="run", train="train", test="test.jsonl", task="chat", data=None, **training
) -> dict:
    test = str(place / test) if isinstance(test, str) else test
    return {
        "model": {"base": str(place / model), "device": "cpu"},
        "data": {
            "train": str(place / f"{train}.jsonl"),
            "validation": 0.1,
            "test": test,
            "overlap": "allow",
            **(data or {}),
        },
        "task": task,
        "method": "full",
        "train": {"max_steps": 12, "batch_size": 8, "evaluations": 1, "learning_rate": 0.01, **training},
        "evaluate": {"generate": False, "rows": 6, "retention": "neutral-en"},
        "export": {"folder": str(place / "runs" / name)},
    }


@pytest.mark.parametrize(("rows", "general", "share"), [(95, 7, 0.05), (10, 40, 0.5), (30, 3, 0.01), (8, 5, 0.9)])
def test_the_share_of_a_pass_is_as_asked_and_every_row_has_its_turn(rows, general, share):
    drawn = replay.draw(rows, general, share, 0)
    assert len(drawn) == max(1, round(rows * share / (1 - share)))
    turns = Counter(drawn.tolist())
    assert max(turns.values()) - min(turns.get(i, 0) for i in range(general)) <= 1
    assert drawn.tolist() == replay.draw(rows, general, share, 0).tolist()


def test_all_rows_stay_and_general_ones_are_added(place):
    plain, mixed = (metier.check(job(place, data=data)) for data in (None, {"replay": {"share": 0.25}}))
    count = len(plain.train)
    assert len(mixed.train) == count + round(count / 3)
    assert [row.where for row in mixed.train[:count]] == [row.where for row in plain.train[:count]]
    items = {item.where for item in evaluation.general_items("replay", ["en"])}
    assert {row.where for row in mixed.train[count:]} <= items
    assert any("replay: " in note and "general ones" in note for note in mixed.notes)
    assert len(mixed.validation) == len(plain.validation)


def test_a_file_of_ones_own_without_the_rows_that_are_judged(place):
    write(place / "own.jsonl", [*ROWS[44:46], chat("How high is the tower by the river?", "About forty metres.")])
    found = metier.check(job(place, data={"replay": {"rows": str(place / "own.jsonl"), "share": 0.1}}))
    assert any("2 general rows are like a test or validation row" in note for note in found.notes)
    assert len({row.where for row in found.train[len(found.splits.train) :]}) == 1
    write(place / "leak.jsonl", ROWS[44:46])
    with pytest.raises(DataError, match="no row is left to replay"):
        metier.check(job(place, data={"replay": {"rows": str(place / "leak.jsonl")}}))


@pytest.mark.parametrize(("model", "train", "task"), [("t5", "train", "chat"), ("bert", "class", "classify")])
def test_shipped_texts_are_refused_where_they_teach_nothing(place, model, train, task):
    test = 0.1 if train == "class" else "test.jsonl"
    with pytest.raises(RecipeError, match="no target that this task could learn"):
        metier.check(job(place, model=model, train=train, task=task, test=test, data={"replay": {}}))


def test_the_base_answers_and_its_answers_are_what_is_practised(place):
    tree = job(place, data={"replay": {"rows": "base", "share": 0.4}})
    prepared = run.prepare(parse(tree))
    model = prepared.load()
    rows = learnt(replace(prepared, task=prepared.task.suited(model.module)), model.module).train
    general = rows[len(prepared.splits.train) :]
    assert {row.where for row in general} == {
        item.where for item in evaluation.general_items("replay", ["en"]) if item.kind == "reply"
    }
    end = model.tokenizer.eos_token_id
    for row in {row.where: row for row in general}.values():
        # Every answered token is the likeliest one, by transformers' own scores.
        with torch.no_grad():
            likeliest = model.module(input_ids=row.ids[None]).logits[0].argmax(dim=-1)
        places = row.learnt.nonzero()[:, 0]
        assert torch.equal(row.ids[places], likeliest[places - 1])
        assert len(places) == 96 or row.ids[places[-1]] == end
        assert places.tolist() == list(range(int(places[0]), len(row.ids)))
    found = metier.train(tree).evidence
    assert any("(base)" in note for note in found.notes)


def test_the_base_is_asked_without_the_adapter_and_once(place):
    prepared = run.prepare(parse(job(place, data={"replay": {"rows": "base", "share": 0.4}})))
    model = prepared.load()
    wanted = learnt(prepared, model.module).train.general
    adapted = adapt.adapt(model.module, LoRAMethod(rank=4), head="causal").module
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = learnt(prepared, adapted).train.general
    assert all(torch.equal(one.ids, two.ids) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("model", "train", "task"), [("t5", "train", "chat"), ("bert", "class", "classify")])
def test_what_cannot_answer_is_not_asked(place, model, train, task):
    test = 0.1 if train == "class" else "test.jsonl"
    with pytest.raises(RecipeError, match="only a causal model with a chat template answers"):
        metier.check(job(place, model=model, train=train, task=task, test=test, data={"replay": {"rows": "base"}}))


def test_what_is_practised_is_kept_better(place):
    # A network that knows nothing has nothing to lose, so it first learns which letters are common in general text.
    tiny.teach(place / "llama", to=place / "taught")
    rises = []
    for share in (None, 0.5):
        data = None if share is None else {"replay": {"share": share}}
        found = metier.train(job(place, model="taught", name=f"share-{share}", data=data)).evidence
        text = next(m for m in found.measures if m.name == "text_en")
        rises.append(text.change.value)
        assert any("replay" in note for note in found.notes) == (share is not None)
    assert rises[0] > 0.05
    assert rises[1] < 0.7 * rises[0]


def test_mixed_rows_are_sequences_like_any_other():
    mixed = replay.Mixed(["a", "b"], ["x", "y"], np.array([1, 0, 1]))
    assert list(mixed) == ["a", "b", "y", "x", "y"]
    assert mixed[1:4] == ["b", "y", "x"]
    assert mixed[-1] == "y"
