"""Guards and strengths inside a comparison: how they are asked for, what is tried, and what is said of them."""

from __future__ import annotations

import json

import pytest
import tiny

import metier
from metier import experiment
from metier.core import RecipeError
from metier.core.evidence import Strength
from metier.evaluation.front import at_matched_gain, front_moved, kept_at
from metier.experiment import budget, trials
from metier.experiment.arms import arms_of
from metier.experiment.budget import Done, Prices, Size
from metier.recipe import FullMethod, LoRAMethod, Tuning, parse, read_tuning, split_methods

TEAMS = ("billing", "delivery", "returns")
ROWS = [
    {"prompt": f"Message {i}: the order {i * 37} came {i % 9} days late", "completion": f"team {TEAMS[i % 3]}, {i % 7}"}
    for i in range(120)
]
METHODS = ["lora:rank=4", "lora:rank=4+kl=4", "full", "full+l2_sp=20", "full+replay=0.5"]
TIMES = {"seconds", "seconds_to_best", "cpu_seconds", "peak_memory_bytes", "tokens_per_second", "seconds_to_load"}
TIMES |= {"search_seconds", "predicted", "finished", "command"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny network that knows which letters are common in general text, so that it has something to lose."""
    root = tmp_path_factory.mktemp("arms")
    for name in ("llama", "bert"):
        tiny.make(name, root / name)
    tiny.teach(root / "llama")
    write(root / "rows.jsonl", ROWS)
    write(root / "class.jsonl", [{"text": row["prompt"], "label": TEAMS[i % 3]} for i, row in enumerate(ROWS)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        yield root


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def job(place, folder, methods, **sections) -> dict:
    tree = {
        "model": {"base": str(place / "llama"), "device": "cpu"},
        "data": {"train": str(place / "rows.jsonl"), "overlap": "allow", "validation": 0.2, "test": 0.2},
        "task": "chat",
        "train": {"max_steps": 10, "batch_size": 8, "evaluations": 1, "learning_rate": 0.01},
        "evaluate": {"retention": "neutral-en", "generate": False, "baselines": False},
        "compare": {"seeds": 2, "trials": 0, "methods": methods},
        "export": {"folder": str(place / "runs" / folder)},
    }
    for section, keys in sections.items():
        tree[section] = {**tree[section], **keys} if isinstance(tree.get(section), dict) else keys
    return tree


@pytest.fixture(scope="module")
def found(place):
    return metier.compare(job(place, "whole", METHODS))


def strength(share, gain, kept) -> Strength:
    return Strength(share=share, gain=gain, kept=kept, chosen=False)


class TestWords:
    usual = Tuning(method=LoRAMethod(rank=64))

    def test_a_guard_stands_behind_a_plus_sign(self):
        found = read_tuning("lora:alpha=8+kl=1e-1+mask_improbable=2.5+replay=0.05", self.usual)
        assert found.method == LoRAMethod(rank=64, alpha=8)
        assert found.guards.model_dump() == {"kl": 0.1, "mask_improbable": 2.5, "l2_sp": None}
        assert found.replay.share == 0.05
        assert found.replay.rows == "neutral"
        assert read_tuning("full", self.usual) == Tuning(method=FullMethod())

    def test_what_a_word_does_not_say_is_the_recipes(self):
        usual = parse(
            {
                "model": {"base": "x"},
                "data": {"train": "t.jsonl", "replay": {"rows": "own.jsonl", "share": 0.2}},
                "task": "chat",
                "guards": {"kl": 0.3},
            }
        ).tuning
        found = read_tuning("lora+replay=0.1", usual)
        assert found.guards.kl == 0.3
        assert (found.replay.rows, found.replay.share) == ("own.jsonl", 0.1)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("lora,lora+kl=0.1,full+l2_sp=0.01", ["lora", "lora+kl=0.1", "full+l2_sp=0.01"]),
            ("lora:rank=8,alpha=16+kl=0.1,full", ["lora:rank=8,alpha=16+kl=0.1", "full"]),
            ("lora:rank=8,lora+kl=0.1", ["lora:rank=8", "lora+kl=0.1"]),
            ("lora:rank=8 , alpha = 4, full", ["lora:rank=8,alpha=4", "full"]),
        ],
    )
    def test_commas_part_methods_and_settings(self, text, words):
        assert split_methods(text) == words

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("lora+kl", "no guard 'kl'"),
            ("lora+mask_improbably=2", "did you mean mask_improbable"),
            ("lora+kl=-1", "greater than 0"),
            ("lora+replay=2", "share"),
            ("lorra+kl=1", "did you mean lora"),
        ],
    )
    def test_what_is_none_is_told(self, word, said):
        with pytest.raises(ValueError, match=said):
            read_tuning(word, self.usual)

    def test_the_same_in_other_words_is_refused(self, place):
        with pytest.raises(RecipeError, match="are the same"):
            arms_of(parse(job(place, "x", ["lora+kl=0.1", "lora+kl=0.10"])))

    def test_guards_that_an_arm_cannot_have_are_refused_before_a_weight_is_loaded(self, place):
        with pytest.raises(RecipeError, match="an adapter begins at nothing") as refused:
            experiment.plan(parse(job(place, "x", ["full", "lora+l2_sp=0.1"])))
        assert refused.value.faults[0].where == "compare.methods: lora+l2_sp=0.1: guards.l2_sp"
        tree = job(place, "x", ["full", "full+kl=0.1", "full+replay=0.1"], task="classify")
        tree["model"]["base"], tree["data"]["train"] = str(place / "bert"), str(place / "class.jsonl")
        with pytest.raises(RecipeError) as refused:
            experiment.plan(parse(tree))
        assert [fault.where for fault in refused.value.faults] == [
            "compare.methods: full+kl=0.1: guards.kl",
            "compare.methods: full+replay=0.1: data.replay.rows: neutral",
        ]


class TestFront:
    path = (strength(0.5, 0.4, 0.99), strength(1.0, 1.0, 0.9))

    def test_between_strengths_lies_a_straight_line(self):
        assert kept_at(self.path, 1.0) == 0.9
        assert kept_at(self.path, 0.7) == pytest.approx(0.945)
        assert kept_at(self.path, 0.2) == pytest.approx(0.995)
        assert kept_at(self.path, 0.0) == 1.0

    def test_a_gain_that_less_of_the_update_reaches_as_well_keeps_more(self):
        path = (strength(0.5, 1.2, 0.97), strength(1.0, 1.0, 0.9))
        assert kept_at(path, 1.0) == pytest.approx(1 - 0.03 * 1.0 / 1.2)

    def test_a_path_with_a_start_of_its_own_has_that_for_its_base(self):
        path = [Strength(share=x, gain=x, kept=0.9 - 0.1 * x, chosen=False) for x in (0.0, 0.5, 1.0)]
        assert kept_at(path, 0.0) == 0.9
        assert kept_at(path, 0.75) == pytest.approx(0.825)
        # What is new stays as tuned, so that even the start may gain less than nothing.
        worse = [one.model_copy(update={"gain": -0.1}) for one in path]
        assert kept_at(worse, 0.0) == 0.9

    def test_gains_are_matched_by_the_smaller_one_of_both(self):
        more = (strength(1.0, 2.0, 0.8),)
        assert at_matched_gain(more, self.path) == (pytest.approx(0.9), 0.9)
        assert at_matched_gain(self.path, more) == (0.9, pytest.approx(0.9))
        assert at_matched_gain((strength(1.0, -1.0, 0.5),), self.path) == (1.0, 1.0)

    @pytest.mark.parametrize(("better", "verdict"), [(0.05, "better"), (-0.05, "worse"), (0.001, "equivalent")])
    def test_the_verdict_is_paired_by_seed(self, better, verdict):
        # Seeds differ far more from each other than the guard moves them.
        plain = [(strength(1.0, 1.0, kept),) for kept in (0.6, 0.7, 0.8)]
        guarded = [
            (strength(1.0, 1.0, kept + better + noise),)
            for kept, noise in zip((0.6, 0.7, 0.8), (0.001, -0.001, 0.0), strict=True)
        ]
        kept, without, difference, said = front_moved(guarded, plain, rows=50, delta=0.01, confidence=0.95)
        assert said == verdict
        assert (kept - without, difference.value) == (pytest.approx(better), pytest.approx(better))
        assert (difference.seeds, difference.degrees_of_freedom, difference.rows) == (3, 2, 50)

    def test_seeds_that_disagree_leave_it_open(self):
        plain = [(strength(1.0, 1.0, 0.7),)] * 2
        guarded = [(strength(1.0, 1.0, kept),) for kept in (0.7, 0.8)]
        *_, difference, said = front_moved(guarded, plain, rows=50, delta=0.01, confidence=0.95)
        assert said == "inconclusive"
        assert (difference.low, difference.high) == pytest.approx((0.05 - 0.6353, 0.05 + 0.6353), abs=1e-4)

    def test_shares_differ_by_one_at_most_whatever_two_seeds_leave_open(self):
        plain = [(strength(1.0, 1.0, kept),) for kept in (0.7, 0.2)]
        guarded = [(strength(1.0, 1.0, 0.9),)] * 2
        difference = front_moved(guarded, plain, rows=50, delta=0.01, confidence=0.95)[2]
        assert (difference.low, difference.high) == (-1.0, 1.0)


class TestExperiment:
    def test_every_seed_has_its_path_and_it_begins_at_the_base(self, found):
        for arm in found.comparison.arms:
            assert [len(cell.strengths) for cell in arm.cells] == [5, 5]
            for cell in arm.cells:
                assert [s.share for s in cell.strengths] == [0.3, 0.5, 0.7, 0.85, 1.0]
                assert not any(s.chosen for s in cell.strengths), "no floor was set"
                assert cell.strengths[0].kept > cell.strengths[-1].kept
                assert cell.strengths[-1].gain > 0

    def test_all_of_the_update_is_what_is_measured(self, place, found):
        recipe = job(place, "plain", METHODS[:1], compare={"seeds": 2, "trials": 0, "strengths": False})
        plain = metier.compare(recipe).comparison
        assert plain.arms[0].cells[0].strengths == ()
        for one, two in zip(plain.arms[0].cells, found.comparison.arms[0].cells, strict=True):
            assert one.figures == two.figures

    def test_each_guard_is_judged_beside_its_method_alone(self, found):
        guards = {(guard.arm, guard.name): guard for guard in found.comparison.guards}
        assert set(guards) == {("lora:rank=4", "kl"), ("full", "l2_sp"), ("full", "replay")}
        for guard in guards.values():
            assert guard.difference.value == pytest.approx(guard.kept - guard.kept_without)
            assert guard.difference.seeds == 2
            assert guard.figures["loss"] > 0
        assert guards["lora:rank=4", "kl"].strengths == {"kl": 4}
        assert guards["lora:rank=4", "kl"].title == "KL to the base, 4"

    def test_a_guard_moves_its_arm(self, found):
        last = {arm.name: [cell.strengths[-1].kept for cell in arm.cells] for arm in found.comparison.arms}
        for one, two in (METHODS[:2], (METHODS[2], METHODS[3]), (METHODS[2], METHODS[4])):
            assert all(guarded > plain for plain, guarded in zip(last[one], last[two], strict=True)), two

    def test_the_replay_arm_takes_steps_for_its_rows_and_says_so(self, found):
        assert any(note.startswith("full+replay=0.5: replay: ") for note in found.comparison.notes)

    def test_the_page_shows_paths_and_guards(self, found):
        page = (found.path / "comparison.html").read_text("utf-8") if (found.path / "comparison.html").exists() else ""
        page = page or next(found.path.glob("*.html")).read_text("utf-8")
        assert 'id="guards"' in page
        assert "KL to the base, 4" in page

    def test_a_guard_that_has_nothing_beside_it_is_not_judged(self, place):
        methods = ["lora:rank=2+mask_improbable=100000"]
        comparison = metier.compare(job(place, "alone", methods)).comparison
        assert comparison.guards == ()
        assert any("is not judged: compare.methods has not the same method" in note for note in comparison.notes)
        assert any("of the learnt tokens are improbable to the base" in note for note in comparison.notes)

    @pytest.mark.parametrize("method", ["lora:rank=4+kl=4", "full+l2_sp=20"])
    def test_what_was_killed_while_strengths_were_tried_ends_the_same(self, place, found, method, monkeypatch):
        recipe = job(place, f"killed-{method[:4]}", [method])
        measure = trials.Dial.turn
        turned = []

        def killed(self, share):
            turned.append(share)
            if len(turned) == 3:
                raise KeyboardInterrupt
            measure(self, share)

        monkeypatch.setattr(trials.Dial, "turn", killed)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever a signal becomes
            metier.compare(recipe)
        monkeypatch.undo()
        again = metier.compare(recipe).comparison
        one = next(arm for arm in again.arms if arm.name == method)
        two = next(arm for arm in found.comparison.arms if arm.name == method)
        assert [c.model_dump(exclude=TIMES) for c in one.cells] == [c.model_dump(exclude=TIMES) for c in two.cells]

    def test_a_floor_chooses_on_the_path(self, place):
        comparison = metier.compare(
            job(
                place,
                "floor",
                ["full"],
                train={"max_steps": 10, "batch_size": 8, "evaluations": 1, "learning_rate": 0.01, "retain": 0.9},
            )
        ).comparison
        for cell in comparison.arms[0].cells:
            assert sum(s.chosen for s in cell.strengths) == 1


def test_trying_strengths_has_its_price_in_the_plan(place):
    with_it, without = (
        experiment.plan(parse(job(place, "x", METHODS, compare={"strengths": wanted}))).seconds
        for wanted in (True, False)
    )
    assert with_it > without
    size = Size(arms=("lora", "full"), trials=5, seeds=3, shares=(0.5,), rows=100)
    left = [budget.seconds_left(size, Prices({"lora": 60.0, "full": 60.0}, strengths=s), Done()) for s in (0.0, 7.0)]
    assert left[1] - left[0] == pytest.approx(2 * 3 * 7.0)
