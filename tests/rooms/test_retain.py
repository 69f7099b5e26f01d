"""A floor of what must be kept: which share of the update is used, where it is written, and when it is refused."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import tiny
import torch

import metier
from metier import evaluation, models
from metier.core import RecipeError
from metier.core.evidence import Strength
from metier.data.similar import pairs_between
from metier.evaluation.measured import Measured, Rows
from metier.recipe import ChatTask, ModelSection
from metier.run import strength
from metier.tasks import build

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Message {i}: the order {i * 37} came {i % 9} days late"},
            {"role": "assistant", "content": f"team {i % 3}, number {i}"},
        ]
    }
    for i in range(48)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("retain")
    for name in ("llama", "bert", "t5"):
        tiny.make(name, root / name)
    tiny.teach(root / "llama")
    for name, rows in (
        ("chat", ROWS),
        ("class", [{"text": f"message {i} came late", "label": "abc"[i % 3]} for i in range(48)]),
    ):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return root


def job(place, name, data, task, method, **sections) -> dict:
    train = {
        "max_steps": 12,
        "batch_size": 8,
        "evaluations": 2,
        "learning_rate": 0.003 if name == "bert" else 0.02,
        **sections.pop("train", {}),
    }
    evaluate = {"max_new_tokens": 4, "rows": 6, "retention": "neutral-en", **sections.pop("evaluate", {})}
    return {
        "model": {"base": str(place / name), "device": "cpu"},
        "data": {"train": str(place / f"{data}.jsonl"), "overlap": "allow"},
        "task": task,
        "method": method,
        "train": train,
        "evaluate": evaluate,
        "export": {"folder": str(place / "runs" / f"{name}-{data}-{method}-{train.get('retain')}")},
    }


@pytest.mark.parametrize(
    ("name", "data", "task", "method"),
    [("llama", "chat", "chat", "lora"), ("llama", "chat", "chat", "full"), ("bert", "class", "classify", "full")],
)
def test_the_floor_chooses_a_share_and_the_result_has_it(place, name, data, task, method):
    # What the whole update keeps is known only once it is measured; a floor above it then asks for less of it.
    whole = metier.train(job(place, name, data, task, method, train={"retain": 0.01}))
    first = whole.evidence.strengths
    assert [s.share for s in first] == list(strength.SHARES)
    floor = min(0.9999, (first[1].kept + first[2].kept) / 2)
    assert first[0].kept < floor, "the whole update must cost something for this test to say anything"
    run = metier.train(job(place, name, data, task, method, train={"retain": floor}))
    found = run.evidence
    (chosen,) = (s for s in found.strengths if s.chosen)
    assert chosen.share < 1
    assert chosen.kept >= floor
    assert found.floor == floor
    assert json.loads((run.path / "metier.json").read_text("utf-8"))["strength"] == chosen.share
    assert any("of the update is used" in note for note in found.notes)
    assert "of the update is used" in (run.path / "README.md").read_text("utf-8")
    # What was chosen on other texts also shows on those that are reported.
    distance = "kl" if name == "llama" else "drift"
    before, after = (next(m.after.value for m in one.measures if m.name == distance) for one in (whole.evidence, found))
    assert after < before
    # The saved network is the dialled one.
    assert {m.name: m.after.value for m in found.measures if m.group == "domain"} == pytest.approx(
        {m.name: m.after.value for m in metier.load(run.path).evaluate()}, abs=1e-5
    )


def test_a_low_floor_and_none_give_the_same_network(place):
    free, floored = (
        metier.train(job(place, "llama", "chat", "chat", "lora", train={"retain": floor})) for floor in (None, 0.01)
    )
    assert free.evidence.strengths == ()
    assert free.evidence.floor is None
    (chosen,) = (s for s in floored.evidence.strengths if s.chosen)
    if chosen.share == 1:
        names = [m.name for m in free.evidence.measures]
        figures = [[m.after.value for m in run.evidence.measures] for run in (free, floored)]
        assert dict(zip(names, figures[0], strict=True)) == pytest.approx(dict(zip(names, figures[1], strict=True)))
    assert chosen.gain == max(s.gain for s in floored.evidence.strengths)


@pytest.mark.parametrize(
    ("name", "task", "evaluate"),
    [("t5", "chat", {}), ("llama", "chat", {"retention": "off"})],
)
def test_is_refused_where_nothing_says_what_is_kept(place, name, task, evaluate):
    with pytest.raises(RecipeError, match="nothing tells what a model for chat must keep"):
        metier.train(job(place, name, "chat", task, "full", train={"retain": 0.9}, evaluate=evaluate))


def path(*points) -> list[Strength]:
    return [Strength(share=share, gain=gain, kept=kept, chosen=False) for share, gain, kept in points]


class TestChoice:
    def test_takes_what_gains_most_of_what_keeps_enough(self):
        found = strength.choose(path((1, 0.5, 0.9), (0.7, 0.6, 0.97), (0.5, 0.4, 0.99), (0.3, 0.41, 0.995)), 0.98)
        assert [s.chosen for s in found] == [False, False, False, True]
        assert "30% of the update is used: 99.5% of the general ability kept" in strength.said(found, 0.98)

    def test_less_of_the_update_may_gain_more(self):
        found = strength.choose(path((1, 0.5, 0.99), (0.7, 0.6, 0.995)), 0.9)
        assert found[1].chosen

    def test_a_floor_that_is_out_of_reach_is_said(self):
        found = strength.choose(path((1, 0.5, 0.5), (0.15, 0.1, 0.8)), 0.98)
        assert found[1].chosen
        assert "the floor was not kept" in strength.said(found, 0.98)


class TestKept:
    def rows(self, values, weights=None, kind="ratio") -> Rows:
        values = np.array(values, dtype=float)
        weights = np.ones(len(values)) if weights is None else np.array(weights, dtype=float)
        return Rows("x", "retention", kind, "nats", False, values, weights)

    def test_is_by_token_over_all_languages_and_texts_alone(self):
        tokens = [10, 30]
        before = Measured({"text_en": self.rows([20, 60], tokens), "reply_en": self.rows([1])}, ())
        after = Measured({"text_en": self.rows([22, 62], tokens), "reply_en": self.rows([9])}, ())
        assert evaluation.kept(before, after) == pytest.approx(math.exp(-4 / 40))
        assert evaluation.kept(after, before) == 1

    def test_of_an_encoder_is_the_mean_cosine(self):
        after = Measured({"paraphrase_en": self.rows([1], kind="share"), "drift": self.rows([0.1, 0.3])}, ())
        assert evaluation.kept(Measured({}, ()), after) == pytest.approx(0.8)

    def test_of_numbers_is_not_known(self):
        assert evaluation.kept(Measured({}, ()), Measured({"drift": self.rows([9.0])}, ())) is None

    def test_while_training_falls_as_the_network_moves(self, place):
        model = models.load(ModelSection(base=str(place / "llama")), head="causal")
        task = build(ChatTask(), model.tokenizer, head="causal", labels=(), context=tiny.CONTEXT, seed=0)
        kept = evaluation.keeping(task, model.module, model.tokenizer, evaluation.general_items("choosing", ["en"]))
        assert kept() == 1
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        assert kept() < 0.97


class TestGeneralItems:
    def test_what_is_reported_what_chooses_and_what_is_replayed_have_nothing_in_common(self):
        both = ["en", "zh"]
        packs = (
            evaluation.read_pack("neutral"),
            evaluation.general_items("choosing", both),
            evaluation.general_items("replay", both),
        )
        texts = [
            [str(item.keys[key]) for item in pack for key in ("text", "prompt") if key in item.keys] for pack in packs
        ]
        assert all(len(some) > 20 for some in texts)
        for left, right in combinations(texts, 2):
            assert pairs_between(left, right) == []
