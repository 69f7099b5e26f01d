"""What tuning must not break: every figure against a computation written out by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import tiny
import torch

from metier import tasks
from metier.core import DataError, RecipeError
from metier.data.records import Completion
from metier.evaluation import Item, compare, measure, read_pack, retention
from metier.recipe import ChatTask, EvaluateSection
from metier.tasks import causal, score

TEXTS = (
    "The cat sat on the mat.",
    "A much longer text: the dog lay on the rug near the door, 365 days and 24 hours.",
    "我的包裹还没有到。",
)
PACK = (
    *(Item(f"t:{i}", "text", "en", {"text": text}) for i, text in enumerate(TEXTS)),
    Item("r:1", "reply", "en", {"prompt": "How do I change the address?", "text": "Open the page of the order."}),
    Item("r:2", "reply", "en", {"prompt": "Hi", "text": "Hello! " * 12}),
    *(
        Item(f"c:{i}", "choice", "en", {"prompt": prompt, "choices": choices, "answer": 0})
        for i, (prompt, choices) in enumerate(
            [
                ("The cat sat on the", ["mat", "delivery address", "order", "money on the account"]),
                ("There were 24", ["hours", "cats and dogs", "x"]),
                ("Please refund one of the", ["payments", "rug", "door near the mat"]),
            ]
        )
    ),
    Item("z:1", "choice", "zh", {"prompt": "今天天气很", "choices": ["好", "包裹", "退还其中一笔"], "answer": 0}),
)


def of(kind: str, language: str = "en") -> list[Item]:
    return [item for item in PACK if (item.kind, item.language) == (kind, language)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer_with_bos(folder):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair=None, special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert causal.begin_ids(tokenizer) == [tokenizer.bos_token_id]
    return tokenizer


@pytest.fixture
def model(folder):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # far enough from uniform that a slip by one position shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture
def task(tokenizer):
    return tasks.build(ChatTask(), tokenizer, head="causal", labels=(), context=512, seed=0)


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Of every token at every position, alone in its batch, float64."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)


def nats_by_hand(model, ids: list[int], first: int) -> float:
    """Position t predicts token t + 1; tokens from `first` on are scored."""
    logp = log_probabilities(model, ids)
    total = 0.0
    for place in range(first, len(ids)):
        total -= float(logp[place - 1, ids[place]])
    return total


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TestLanguage:
    def test_text_loss_without_begin_token(self, task, model, tokenizer):
        assert tokenizer.bos_token_id is None
        found = retention.measure_language(task, model, tokenizer, PACK, batch_tokens=8192)["text_en"]
        for text, total, weight in zip(TEXTS, found.values, found.weights, strict=True):
            ids = plain_ids(tokenizer, text)
            assert weight == len(ids) - 1
            assert total == pytest.approx(nats_by_hand(model, ids, 1), rel=1e-6)

    def test_text_loss_with_begin_token(self, task, model, tokenizer_with_bos):
        rows = retention.text_rows(of("text"), tokenizer_with_bos)
        found = score(task, model, rows)
        for text, total, weight in zip(TEXTS, found.total_B.tolist(), found.weight_B.tolist(), strict=True):
            ids = [tokenizer_with_bos.bos_token_id, *plain_ids(tokenizer_with_bos, text)]
            assert weight == len(ids) - 1
            assert total == pytest.approx(nats_by_hand(model, ids, 1), rel=1e-6)

    @pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
    def test_neighbours_and_padding_change_nothing(self, task, model, tokenizer, batch_tokens):
        found = retention.measure_language(task, model, tokenizer, PACK, batch_tokens=batch_tokens)
        by_hand = [nats_by_hand(model, plain_ids(tokenizer, text), 1) for text in TEXTS]
        assert found["text_en"].values == pytest.approx(by_hand, rel=1e-6)

    def test_reply_loss_scores_the_reply_alone(self, task, model, tokenizer):
        found = retention.measure_language(task, model, tokenizer, PACK, batch_tokens=8192)["reply_en"]
        for item, total, weight in zip(of("reply"), found.values, found.weights, strict=True):
            opening = f"<|im_start|>user\n{item.keys['prompt']}<|im_end|>\n<|im_start|>assistant\n"
            prompt, reply = plain_ids(tokenizer, opening), plain_ids(tokenizer, item.keys["text"])
            assert weight == len(reply)
            assert total == pytest.approx(nats_by_hand(model, [*prompt, *reply], len(prompt)), rel=1e-6)

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_probe_picks_what_a_hand_computation_picks(self, task, model, tokenizer, language):
        space = {"en": " ", "zh": ""}[language]
        expected = []
        for item in of("choice", language):
            prompt = plain_ids(tokenizer, item.keys["prompt"])
            per_character = []
            for choice in item.keys["choices"]:
                ids = [*prompt, *plain_ids(tokenizer, f"{space}{choice}")]
                per_character.append(nats_by_hand(model, ids, len(prompt)) / len(choice))
            expected.append(per_character.index(min(per_character)))
        for answer in range(3):
            items = [Item(i.where, i.kind, i.language, {**i.keys, "answer": answer}) for i in of("choice", language)]
            hits = retention.probe_hits(task, model, tokenizer, items, batch_tokens=8192)
            assert hits.tolist() == [float(best == answer) for best in expected]

    def test_no_replies_without_a_chat_template(self, task, model, folder):
        from transformers import AutoTokenizer

        bare = AutoTokenizer.from_pretrained(folder)
        bare.chat_template = None
        found = retention.measure_language(task, model, bare, PACK, batch_tokens=8192)
        assert sorted(found) == ["probe_en", "probe_zh", "text_en"]


RECORDS = [Completion(f"r:{i}", f"Where is order {i}?", "-") for i in range(3)]
ANSWERS = [
    "It left on Monday, and the tracking page shows nothing new since then, please wait.",
    "No.",
    "Near the door",
]


class TestDivergence:
    def test_of_a_model_with_itself_is_zero(self, task, model):
        logp = retention.log_probabilities(task, model, RECORDS, ANSWERS)
        assert np.abs(retention.divergence(logp, logp)).max() == 0

    def test_equals_a_hand_computation_after_the_weights_moved(self, task, model, tokenizer):
        base_NV = retention.log_probabilities(task, model, RECORDS, ANSWERS)
        rows = task.encode([task.with_answer(r, a) for r, a in zip(RECORDS, ANSWERS, strict=True)], training=False)
        before = [log_probabilities(model, row.ids.tolist()) for row in rows]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        after = [log_probabilities(model, row.ids.tolist()) for row in rows]
        found = retention.divergence(base_NV, retention.log_probabilities(task, model, RECORDS, ANSWERS))
        by_hand = []
        for row, old, new in zip(rows, before, after, strict=True):
            places = [place for place, learnt in enumerate(row.learnt.tolist()) if learnt][: retention.KL_TOKENS]
            by_hand += [float((old[p - 1].exp() * (old[p - 1] - new[p - 1])).sum()) for p in places]
        assert found == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
        assert min(by_hand) > 1e-4

    def test_takes_the_first_tokens_of_each_answer_only(self, task, model):
        rows = task.encode([task.with_answer(r, a) for r, a in zip(RECORDS, ANSWERS, strict=True)], training=False)
        learnt = [int(row.learnt.sum()) for row in rows]
        assert max(learnt) > retention.KL_TOKENS
        found = retention.log_probabilities(task, model, RECORDS, ANSWERS)
        assert len(found) == sum(min(count, retention.KL_TOKENS) for count in learnt)

    def test_empty_answers_give_nothing(self, task, model):
        assert len(retention.log_probabilities(task, model, RECORDS, ["", "", ""])) == 0


class TestMeasuring:
    SETTINGS = EvaluateSection(max_new_tokens=6, baselines=False)

    def test_changes_neither_weights_nor_chance(self, task, model, tokenizer):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state, python_state = torch.random.get_rng_state(), random.getstate()
        measure(task, model, tokenizer, RECORDS, self.SETTINGS, PACK, base=None)
        assert torch.equal(state, torch.random.get_rng_state())
        assert random.getstate() == python_state
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_scoring_leaves_the_training_mode_as_it_was(self, task, model, tokenizer):
        rows = retention.text_rows(of("text"), tokenizer)
        for mode in (True, False):
            model.train(mode)
            score(task, model, rows)
            assert model.training is mode

    def test_dropout_never_reaches_a_figure(self, task, tokenizer, tmp_path):
        from transformers import AutoModelForCausalLM

        path = tiny.make("gpt2", tmp_path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert model.config.resid_pdrop > 0
        rows = retention.text_rows(of("text"), tokenizer)
        model.train()
        first, second = (score(task, model, rows).total_B for _ in range(2))
        assert torch.equal(first, second)

    def test_twice_the_same_model_shows_no_change(self, task, model, tokenizer):
        before = measure(task, model, tokenizer, RECORDS, self.SETTINGS, PACK, base=None)
        after = measure(task, model, tokenizer, RECORDS, self.SETTINGS, PACK, base=before)
        found = {m.name: m for m in compare(before, after, 0.95)}
        assert {
            "loss",
            "perplexity",
            "exact_match",
            "text_en",
            "reply_en",
            "probe_en",
            "probe_zh",
            "kl",
        } <= found.keys()
        assert before.answers == after.answers
        assert found["kl"].after.value == pytest.approx(0, abs=1e-9)
        for measured in found.values():
            if measured.change is not None:
                assert measured.change.value == 0
                assert measured.verdict == "no clear change"

    def test_saved_and_loaded_it_is_the_same(self, task, model, tokenizer, tmp_path):
        before = measure(task, model, tokenizer, RECORDS, self.SETTINGS, PACK, base=None)
        before.save(tmp_path / "m")
        again = type(before).load(tmp_path / "m")
        assert again.answers == before.answers
        assert list(again.rows) == list(before.rows)
        for name, rows in before.rows.items():
            assert np.array_equal(rows.values, again.rows[name].values)
            assert np.array_equal(rows.weights, again.rows[name].weights)
        assert torch.equal(before.anchors["log_probabilities"], again.anchors["log_probabilities"])
        (tmp_path / "m" / "measured.json").unlink()
        assert type(before).load(tmp_path / "m") is None


@pytest.fixture(scope="module", params=tiny.ENCODERS)
def encoder(request, tmp_path_factory):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tiny.make(request.param, tmp_path_factory.mktemp(request.param))
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


class TestEncoder:
    def test_embeddings_are_means_over_real_tokens(self, encoder):
        model, tokenizer = encoder
        found = retention.embeddings(model, tokenizer, TEXTS)
        assert len({len(tokenizer(text)["input_ids"]) for text in TEXTS}) == len(TEXTS)
        for vector, text in zip(found, TEXTS, strict=True):
            with torch.no_grad():
                hidden = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
            mean = sum(hidden[place] for place in range(len(hidden))) / len(hidden)
            assert torch.allclose(vector.double(), mean / math.sqrt(float((mean * mean).sum())), atol=1e-6)

    def test_more_texts_than_a_batch_keep_their_order(self, encoder):
        texts = [f"order {'very ' * (i % 7)}{i}" for i in range(40)]
        found = retention.embeddings(*encoder, texts)
        alone = torch.cat([retention.embeddings(*encoder, [text]) for text in texts[30:36]])
        assert torch.allclose(found[30:36], alone, atol=1e-6)

    def test_paraphrase_probe(self, encoder):
        items = [
            Item("1", "triple", "en", {"anchor": TEXTS[0], "same": TEXTS[0], "other": TEXTS[1]}),
            Item("2", "triple", "en", {"anchor": TEXTS[0], "same": TEXTS[1], "other": TEXTS[2]}),
        ]
        rows, vectors = retention.measure_encoder(*encoder, items)
        assert rows["paraphrase_en"].values.tolist() == [1, 0]
        assert vectors.shape[0] == 6


class TestPack:
    def test_shipped_pack(self):
        items = read_pack("neutral")
        ids = [item.keys["id"] for item in items]
        assert len(items) >= 200
        assert len(set(ids)) == len(ids)
        kinds = Counter((item.kind, item.language) for item in items)
        assert set(kinds) == {
            (kind, language) for kind in ("text", "reply", "choice", "triple") for language in ("en", "zh")
        }
        assert min(kinds.values()) >= 10

    def test_right_choices_stand_in_every_place(self):
        choices = [item for item in read_pack("neutral") if item.kind == "choice"]
        places = Counter(item.keys["answer"] for item in choices)
        assert max(places.values()) < 0.5 * len(choices)

    def test_by_language_and_off(self):
        english, chinese = read_pack("neutral-en"), read_pack("neutral-zh")
        assert {item.language for item in english} == {"en"}
        assert {item.language for item in chinese} == {"zh"}
        assert len(english) + len(chinese) == len(read_pack("neutral"))
        assert read_pack("off") == ()

    def test_every_fault_of_a_bad_pack_with_its_line(self, tmp_path):
        path = tmp_path / "pack.jsonl"
        choice = {"kind": "choice", "prompt": "p", "choices": ["a", "b"], "answer": 0}
        bad = [
            "{",
            "[]",
            json.dumps({"kind": "poem", "text": "x"}),
            json.dumps({"kind": "text"}),
            json.dumps({"kind": "text", "text": 5}),
            json.dumps({"kind": "reply", "prompt": "p", "text": ["t"]}),
            json.dumps({**choice, "answer": 2}),
            json.dumps({**choice, "answer": True}),
            json.dumps({**choice, "choices": ["a", 1]}),
            json.dumps({**choice, "choices": ["a", ""]}),
            json.dumps({**choice, "choices": "ab"}),
            json.dumps({"kind": "triple", "anchor": "a", "same": "b"}),
        ]
        path.write_text("\n".join([json.dumps(choice), "", *bad]))
        with pytest.raises(DataError) as caught:
            read_pack(str(path))
        *shown, rest = caught.value.faults
        assert [fault.where for fault in shown] == [f"{path}:{line}" for line in range(3, 13)]
        assert rest.what.startswith("and 2 more")

    def test_a_good_file_of_ones_own(self, tmp_path):
        path = tmp_path / "pack.jsonl"
        path.write_text('\ufeff{"kind": "text", "text": "a text"}\n\n', "utf-8")
        assert [item.where for item in read_pack(str(path))] == [f"{path}:1"]

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_empty_file(self, tmp_path, content):
        path = tmp_path / "pack.jsonl"
        path.write_text(content)
        with pytest.raises(DataError, match="no items"):
            read_pack(str(path))

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "pack.jsonl"
        path.write_bytes(b'{"kind": "text", "text": "\xff\xfe"}\n')
        with pytest.raises(DataError, match="UTF-8"):
            read_pack(str(path))

    def test_missing_file_names_what_there_is(self, tmp_path):
        with pytest.raises(RecipeError, match="neutral"):
            read_pack(str(tmp_path / "none.jsonl"))
