"""Ways to tune beside each other: the search, the budget, one base for all, and what happens when it is stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml

import metier
from metier import experiment, run
from metier.core import DataError, RecipeError
from metier.core.comparison import Comparison
from metier.core.evidence import Strength
from metier.evaluation.baselines import few_shot
from metier.experiment import budget, checks, parts, search
from metier.experiment.arms import arms_of
from metier.experiment.base import LoadedBase
from metier.experiment.budget import Done, Prices, Size
from metier.experiment.search import Tried
from metier.experiment.trials import Ended, made_of
from metier.recipe import LoRAMethod, parse, split_methods
from metier.render import history
from metier.report import plain
from metier.run.strength import SHARES

OWN = """
import torch
from metier import ValueTask

class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = torch.nn.Linear(40, 40), torch.nn.Linear(40, 2)

    def forward(self, x_BF):
        return self.head(torch.tanh(self.inner(x_BF)))

class Sums(ValueTask):
    names = ("sum", "difference")

    def example(self, row):
        return [float(v) for v in row["x"]], [float(row[k]) for k in self.names]

    def batch(self, contents):
        return {"x_BF": torch.tensor([x for x, _ in contents])}, torch.tensor([y for _, y in contents])
"""
TEAMS = ("billing", "delivery", "returns")
TIMES = {"seconds", "seconds_to_best", "cpu_seconds", "peak_memory_bytes", "tokens_per_second", "seconds_to_load"}
TIMES |= {"search_seconds", "predicted", "finished", "command"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network of our own with weights, a tiny encoder, rows for both."""
    root = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIER_CACHE", str(root / "cache"))
        patch.chdir(root)
        patch.syspath_prepend(str(root))
        (root / "sums_of_forty.py").write_text(OWN)
        chance = np.random.default_rng(0)
        x_NF = chance.normal(size=(240, 40)).astype(np.float32)
        rows = [
            {"x": x.tolist(), "sum": float(x[:5].sum() + 0.1 * chance.normal()), "difference": float(x[0] - x[1])}
            for x in x_NF
        ]
        write(root / "sums.jsonl", rows)
        import sums_of_forty
        from safetensors.torch import save_file

        torch.manual_seed(0)
        save_file(sums_of_forty.Net().state_dict(), root / "net.safetensors")
        tiny.make("bert", root / "bert")
        texts = [(f"Message {i}: the order {i * 37} came {i % 9} days late", TEAMS[i % 3]) for i in range(120)]
        write(root / "class.jsonl", [{"text": q, "label": a} for q, a in texts])
        yield root


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def sums(place: Path, folder: str, **sections) -> dict:
    tree = {
        "model": {"base": str(place / "net.safetensors"), "use": "sums_of_forty:Net", "device": "cpu"},
        "data": {"train": str(place / "sums.jsonl"), "overlap": "allow", "validation": 0.2, "test": 0.2},
        "task": {"kind": "own", "use": "sums_of_forty:Sums"},
        "train": {"epochs": 10, "max_steps": 60, "batch_size": 16, "evaluations": 4},
        "evaluate": {"rows": None, "baselines": False},
        "compare": {"seeds": 2, "methods": ["lora:rank=4", "full"]},
        "export": {"folder": str(place / "runs" / folder)},
    }
    return changed(tree, sections)


def teams(place: Path, folder: str, **sections) -> dict:
    tree = {
        "model": {"base": str(place / "bert"), "device": "cpu"},
        "data": {"train": str(place / "class.jsonl"), "overlap": "allow", "validation": 0.2, "test": 0.2},
        "task": "classify",
        "train": {"max_steps": 6, "batch_size": 8, "evaluations": 2},
        "evaluate": {"retention": "neutral-en"},
        "compare": {"seeds": 2, "trials": 3, "methods": ["full", "lora:rank=2"], "data_curve": [50]},
        "export": {"folder": str(place / "runs" / folder)},
    }
    return changed(tree, sections)


def changed(tree: dict, sections: dict) -> dict:
    for section, keys in sections.items():
        tree[section] = {**tree[section], **keys} if isinstance(tree.get(section), dict) else keys
    return tree


def read(path: Path) -> Ended:
    """How a training ended."""
    return Ended.model_validate_json(path.read_text("utf-8"))


def searched(centre: float, loss, *, fine: bool = True, most: float = math.inf) -> list[Tried]:
    """The search to its end, where a rate has this validation loss; above 2 it is worse than the base."""
    tried: list[Tried] = []
    while (point := search.next_point(centre, tried, fine=fine, most=most)) is not None:
        assert len(tried) < 20
        found = loss(point.rate)
        tried.append(Tried(point.rate, point.stage, found, not found < 2))
    return tried


def valley(best: float):
    return lambda rate: 1 + 0.1 * math.log(rate / best) ** 2


class TestSearch:
    def test_three_coarse_points_then_one_finer_on_each_side_of_the_best(self):
        tried = searched(3e-4, valley(3e-4))
        assert [t.stage for t in tried] == ["coarse"] * 3 + ["fine"] * 2
        assert [t.rate for t in tried] == [3e-4, 9e-4, 1e-4, 5.2e-4, 1.73e-4]
        assert search.chosen(tried).rate == 3e-4
        assert not search.is_at_edge(tried)

    @pytest.mark.parametrize("best", [3e-6, 3e-5, 1e-3, 2e-2])
    def test_moves_on_where_the_best_lies_at_an_end(self, best):
        tried = searched(3e-4, valley(best))
        assert "edge" in {t.stage for t in tried}
        assert abs(math.log(search.chosen(tried).rate / best)) < math.log(3) / 2 + 0.01
        assert not search.is_at_edge(tried)

    def test_says_that_the_end_was_reached(self):
        tried = searched(1e-4, valley(1.0))
        assert sum(t.stage == "edge" for t in tried) == search.MOST_EDGES
        assert search.is_at_edge([t for t in tried if t.stage != "fine"])

    def test_nothing_is_tried_above_a_rate_that_diverged(self):
        tried = searched(1e-3, lambda rate: math.inf if rate > 2e-3 else valley(1e-3)(rate))
        assert [t.rate for t in tried if not math.isfinite(t.loss)] == [3e-3]
        assert max(t.rate for t in tried) == 3e-3
        tried = searched(1e-2, lambda rate: math.inf if rate > 2e-3 else valley(1e-3)(rate))
        assert search.chosen(tried).rate < 2e-3
        assert [t.rate for t in tried if t.rate >= 1e-2] == [1e-2]

    def test_nothing_above_the_cap(self):
        assert max(t.rate for t in searched(1e-3, valley(1e-2), most=2e-3)) <= 2e-3

    def test_where_everything_diverges_nothing_is_chosen(self):
        assert search.chosen(searched(1e-3, lambda _: math.inf)) is None

    def test_where_nothing_beats_the_base_the_least_bad_is_chosen(self):
        tried = searched(1e-3, lambda rate: 2 + rate)
        assert search.chosen(tried).rate == min(t.rate for t in tried)

    def test_a_flat_valley_stays_where_it_began(self):
        tried = searched(1e-3, lambda rate: 1 + 1e-7 * rate)
        assert search.chosen(tried).rate == 1e-3
        assert len(tried) == 5

    def test_sensitivity_is_the_rise_a_factor_of_three_away(self):
        tried = searched(3e-4, valley(3e-4), fine=False)
        assert search.sensitivity(tried) == pytest.approx(0.1 * math.log(3) ** 2, rel=0.1)
        assert search.sensitivity(tried[:1]) is None


class TestSettling:
    tried = tuple(Tried(rate, "coarse", 1.0, diverged=False) for rate in (1e-3, 1.73e-3, 3e-3))

    @pytest.mark.parametrize(
        ("best", "below"),
        [(1.73e-3, 1e-3), (3e-3, 1.73e-3), (1e-3, 5.77e-4)],
        ids=["tried, rounded", "tried", "never tried"],
    )
    def test_the_best_is_trained_whole_and_so_is_the_rate_below_as_it_was_written_where_it_was_tried(self, best, below):
        asked = []
        assert search.settled(self.tried, best, lambda rate: asked.append(rate) or 1.0) == best
        assert asked == [best, below]

    def test_the_rate_below_is_taken_where_its_loss_is_lower(self):
        assert search.settled(self.tried, 3e-3, {3e-3: 1.0, 1.73e-3: 0.9}.get) == 1.73e-3
        assert search.settled(self.tried, 3e-3, {3e-3: math.inf, 1.73e-3: 0.9}.get) == 1.73e-3
        assert search.settled(self.tried, 3e-3, {3e-3: 1.0, 1.73e-3: math.inf}.get) == 3e-3

    def test_a_loss_is_lower_by_more_than_nothing(self):
        assert search.is_lower(0.9, 1.0)
        assert search.is_lower(-1.0, -0.9)
        assert search.is_lower(1.0, math.inf)
        assert not search.is_lower(0.99999, 1.0)
        assert not search.is_lower(math.inf, math.inf)
        assert not search.is_lower(math.inf, 1.0)


class TestBudget:
    size = Size(arms=("lora", "full"), trials=5, seeds=3, shares=(0.25, 0.5), rows=400)
    prices = Prices({"lora": 60.0, "full": 60.0}, row=0.1, once=10.0)

    def left_out(self, seconds: float) -> tuple[str, ...]:
        return budget.left_out(self.size, budget.fit(self.size, self.prices, seconds))

    def test_nothing_is_left_out_without_one_or_where_all_fits(self):
        whole = budget.seconds_left(self.size, self.prices, Done())
        assert budget.fit(self.size, self.prices, None) == self.size
        assert self.left_out(whole) == ()
        assert self.left_out(whole - 1) == ("no training on 50% of the rows",)

    def test_shrinks_in_the_stated_order_and_keeps_to_it(self):
        seen: list[str] = []
        for seconds in range(2000, 120, -20):
            try:
                size = budget.fit(self.size, self.prices, seconds)
            except RecipeError:
                break
            assert budget.seconds_left(size, self.prices, Done()) <= seconds
            seen += [text.split()[1] + text.split()[-1] for text in budget.left_out(self.size, size)][len(seen) :]
        assert size.seeds == budget.LEAST_SEEDS
        assert size.rows == budget.LEAST_ROWS
        assert size.arms == ("lora",)
        assert size.trials == 3

    def test_what_fits_not_even_one_arm_is_refused_with_what_would_be_enough(self):
        with pytest.raises(RecipeError, match=r"not enough for even one method: lora alone.*allow \d+min or more"):
            budget.fit(self.size, self.prices, 30)
        enough = 6 * 60
        assert budget.fit(self.size, self.prices, enough).arms == ("lora",)

    def test_fine_points_bring_one_whole_training_more_for_each_method(self):
        coarse = replace(self.size, trials=3)
        fine, less = (budget.seconds_left(size, self.prices, Done()) for size in (self.size, coarse))
        assert fine - less == pytest.approx(2 * (2 * 60 / 3 + 60))
        assert self.size.trainings - coarse.trainings == 2 * 3
        made = Done(search={"lora": 5, "full": 5}, whole={"lora": 1, "full": 1})
        assert fine - budget.seconds_left(self.size, self.prices, made) == pytest.approx(2 * (5 * 60 / 3 + 60))

    def test_what_was_made_already_is_not_left_out(self):
        done = Done(spent=400, search={"lora": 5, "full": 5}, base=True)
        size = budget.fit(self.size, self.prices, 900, done)
        assert size.rows == 400
        assert size.seeds < 3


class TestArms:
    def test_settings_stand_on_the_recipes_own(self, place):
        recipe = parse(
            sums(place, "x", method={"kind": "lora", "rank": 3, "alpha": 8}, compare={"methods": ["lora", "lora:r=8"]})
        )
        assert [arm.method for arm in arms_of(recipe)] == [LoRAMethod(rank=3, alpha=8), LoRAMethod(rank=8, alpha=8)]

    @pytest.mark.parametrize(
        ("methods", "said"),
        [
            (["lora", "ful"], "did you mean full"),
            (["lora", "lora"], "stands twice"),
            (["lora:rnk=8"], "did you mean rank"),
            (["lora:rank=0"], "rank"),
            (["full:rank=8"], "it has none"),
        ],
    )
    def test_what_is_no_method_is_refused_with_the_nearest(self, place, methods, said):
        with pytest.raises(RecipeError, match=said):
            parse(sums(place, "x", compare={"methods": methods}))

    def test_one_method_in_two_words_is_refused(self, place):
        with pytest.raises(RecipeError, match="are the same"):
            arms_of(parse(sums(place, "x", compare={"methods": ["lora", "lora:rank=16"]})))

    def test_a_list_of_words_keeps_settings_together(self):
        assert split_methods("lora:rank=8,alpha=16, full,freeze") == ["lora:rank=8,alpha=16", "full", "freeze"]

    def test_fewer_steps_keep_the_whole_schedule(self, place):
        recipe = parse(
            sums(place, "x", train={"epochs": 30, "max_steps": None, "schedule": {"kind": "step", "gamma": 0.9}})
        )
        third = made_of(recipe, 160, rate=1e-3, seed=0, length=1 / 3)
        assert third.train.max_steps == 100
        assert third.train.schedule.gamma == pytest.approx(0.9**3)
        assert third.train.evaluations == 2

    def test_fewer_steps_take_a_higher_rate(self, place):
        recipe = parse(sums(place, "x"))
        peaks = [made_of(recipe, 160, rate=1e-3, seed=0, length=n).train.learning_rate for n in (1, 1 / 3)]
        assert peaks == [1e-3, pytest.approx(1e-3 * 3**0.5)]


class TestChecks:
    def test_too_few_rows_and_lacking_classes_are_told_together(self, place):
        job = run.prepare(parse(teams(place, "x", data={"test": 0.1, "validation": 0.05})))
        with pytest.raises(DataError) as told:
            checks.check(job)
        assert "validation rows are too few" in str(told.value)
        assert "test rows are too few" in str(told.value)
        assert "at least 20 are needed" in str(told.value)

    def test_a_class_that_a_split_lacks(self, place, tmp_path):
        rows = [{"text": f"note {i} of {i % 7}", "label": TEAMS[i % 2]} for i in range(30)]
        write(tmp_path / "test.jsonl", rows)
        job = run.prepare(parse(teams(place, "x", data={"test": str(tmp_path / "test.jsonl")})))
        with pytest.raises(DataError, match="no row of class returns"):
            checks.check(job)

    def test_a_part_too_small_for_a_step(self, place):
        job = run.prepare(parse(teams(place, "x", compare={"data_curve": [2, 100]})))
        with pytest.raises(RecipeError, match=r"begin at 11\.1 % or more"):
            checks.check(job)


def test_parts_lie_in_each_other_and_keep_every_class():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    order = parts.nested(labels, seed=3)
    assert sorted(order) == list(range(100))
    for size in (20, 50):
        chosen = [labels[i] for i in order[:size]]
        assert {name: chosen.count(name) for name in "abc"} == {
            name: pytest.approx(size * labels.count(name) / 100, abs=2) for name in "abc"
        }


def bits(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict().items()}


def test_the_base_is_the_base_again_after_every_arm_and_heads_follow_the_seed(place, tmp_path):
    recipe = parse(teams(place, "bits", compare={"methods": ["full", "lora:rank=2", "freeze:blocks=1"]}))
    job = run.prepare(recipe)
    base = LoadedBase(job, tmp_path, whole=True)
    before = bits(base.model.module)
    heads = {}
    for seed in (0, 1):
        for arm in arms_of(recipe):
            made = recipe.tuned(arm.tuning).with_train(learning_rate=0.1, seed=seed, max_steps=2, evaluations=1)
            with base.ready(run.prepare(made)) as ready:
                named = dict(ready.adapted.module.named_parameters())
                head = next(
                    p
                    for name, p in named.items()
                    if name.endswith("classifier.weight") or "classifier.modules_to_save" in name
                )
                heads.setdefault(seed, []).append(head.detach().clone())
                for parameter in named.values():
                    if parameter.requires_grad:
                        parameter.data += 1
                        parameter.grad = torch.ones_like(parameter)
            # A gradient that stays is as large as the network, and is counted as the next arm's memory.
            assert all(parameter.grad is None for parameter in base.model.module.parameters())
            assert bits(base.model.module) == before, (seed, arm.name)
    assert all(torch.equal(head, heads[0][0]) for head in heads[0])
    assert all(torch.equal(head, heads[1][0]) for head in heads[1])
    assert not torch.equal(heads[0][0], heads[1][0])
    base.close()
    assert not list(tmp_path.iterdir())


def answering(folder, task, rows):
    """A job whose base can be asked."""
    write(folder / "rows.jsonl", rows)
    tiny.make("llama", folder / "llama")
    tree = {
        "model": {"base": str(folder / "llama"), "device": "cpu"},
        "data": {"train": str(folder / "rows.jsonl"), "overlap": "allow"},
        "task": task,
        "evaluate": {"rows": 3, "max_new_tokens": 4, "retention": "off"},
    }
    return run.prepare(parse(tree))


def test_the_base_is_also_asked_after_it_was_shown_examples(place, tmp_path):
    rows = [{"prompt": f"Where is parcel {i}?", "completion": f"{TEAMS[i % 3]} {i}"} for i in range(60)]
    job = answering(tmp_path, "chat", rows)
    (found,) = job.prompted(job.load())
    assert found.name == "few_shot"
    assert 0 < int(found.how.split("shown ")[1].split()[0]) <= 8
    assert {figure.name for figure in found.figures} >= {"exact_match"}
    asked = job.task.with_examples(job.test[0], list(job.splits.train[:2]))
    text = job.task.tokenizer.decode(job.task.prompt(asked))
    answer, question = job.task.reference(job.splits.train[1]), job.task.question(job.test[0])
    assert 0 < text.index(answer) < text.index(question)


def test_a_base_that_completes_is_shown_whole_rows_and_its_answer_ends_where_the_next_would_begin(place, tmp_path):
    rows = [{"prompt": f"def f{i}():\n", "completion": f"    return {i}\n"} for i in range(60)]
    job = answering(tmp_path, "complete", rows)
    asked = job.task.with_examples(job.test[0], list(job.splits.train[:2]))
    shown = [job.task.question(row) + job.task.reference(row).rstrip() for row in job.splits.train[:2]]
    assert job.task.question(asked) == "\n\n\n".join([*shown, job.task.question(job.test[0])])

    class Rambling:
        question, with_examples, prompt = job.task.question, job.task.with_examples, job.task.prompt
        between = job.task.between

        @staticmethod
        def answer(model, records, how):
            return ["    return 1\n\n\ndef g():\n"] * len(records)

    seen = []
    few_shot(
        Rambling(), None, job.splits.train, job.test, SimpleNamespace(max_new_tokens=4),
        lambda answers: seen.append(list(answers)) or (), context=tiny.CONTEXT, seed=0,
    )  # fmt: skip
    assert seen == [["    return 1"] * len(job.test)]
    (found,) = job.prompted(job.load())
    assert found.name == "few_shot"


@pytest.fixture(scope="module")
def compared(place):
    """Two methods on numbers."""
    return metier.compare(sums(place, "sums"))


@pytest.fixture(scope="module")
def compared_text(place):
    """Two methods on classes, a new head and a data curve."""
    return metier.compare(teams(place, "teams"))


class TestFindings:
    def test_every_arm_has_its_search_and_every_seed(self, compared):
        found = compared.comparison
        assert [arm.name for arm in found.arms] == ["lora:rank=4", "full"]
        assert found.seeds == (0, 1)
        for arm in found.arms:
            assert [t.stage for t in arm.trials].count("coarse") == 3
            assert [cell.seed for cell in arm.cells] == [0, 1]
            assert arm.learning_rate in {t.rate for t in arm.trials}
            assert {cell.steps for cell in arm.cells} == {60}
            assert all(0 < cell.seconds_to_best <= cell.seconds for cell in arm.cells)
            assert arm.bytes_on_disk > arm.parameters_moved * 4
            sound = [trial.seconds for trial in arm.trials if trial.loss is not None]
            by_trials = 3 * sum(sound) / len(sound)
            assert arm.predicted.seconds_by_trials == pytest.approx(by_trials)
            assert arm.predicted.peak_memory_bytes_by_trials > 0
        lora, full = found.arms
        assert lora.parameters_moved < full.parameters_moved

    def test_the_first_seed_is_trained_whole_with_two_rates_and_the_better_one_is_taken(self, compared):
        for arm in compared.comparison.arms:
            folder = compared.path / "trials" / arm.name.replace(":rank=", "-rank-")
            (dropped,) = folder.glob("final-*-0/dropped.json")
            (taken,) = folder.glob("final-*-0/result.json")
            assert {path.name for path in dropped.parent.iterdir()} == {"dropped.json", "metrics.jsonl"}
            rates = [float(path.parent.name.split("-", 1)[1].rsplit("-", 1)[0]) for path in (taken, dropped)]
            assert rates[0] == arm.learning_rate
            assert abs(math.log(rates[0] / rates[1])) == pytest.approx(math.log(search.FINE), abs=search.SAME)
            losses = [read(path).loss for path in (taken, dropped)]
            if rates[0] < rates[1]:
                assert search.is_lower(*losses)
                (said,) = (note for note in compared.comparison.notes if note.startswith(arm.name))
                assert f"take the learning rate {rates[0]:g}, a finer step below" in said
            else:
                assert not search.is_lower(losses[1], losses[0])

    def test_full_begins_at_a_tenth_of_the_adapters_rate(self, compared):
        lora, full = compared.comparison.arms
        best = min((t for t in lora.trials if t.loss is not None), key=lambda t: t.loss)
        assert full.trials[0].rate == pytest.approx(best.rate / 10, rel=0.01)

    def test_tuning_is_better_than_the_base_and_says_so(self, compared):
        found = compared.comparison
        assert found.primary == "mse"
        beside = {(p.left, p.right): p for p in found.pairs if p.primary}
        assert set(beside) == {("base", "lora:rank=4"), ("base", "full"), ("lora:rank=4", "full")}
        assert beside["base", "full"].verdict == "better"
        assert found.pairs[0].primary
        assert len(found.verdict) == 3

    def test_arms_with_the_same_seed_meet_the_same_rows_in_the_same_order(self, compared):
        cells = sorted(path.parent for path in (compared.path / "trials").glob("*/final-*/result.json"))
        assert len(cells) == 4
        tokens = [[line["weight"], line["tokens"], line["epoch"]] for cell in cells for line in lines(cell)[:1]]
        assert all(one == tokens[0] for one in tokens)

    def test_a_new_head_has_no_base_and_arms_are_told_side_by_side(self, compared_text):
        found = compared_text.comparison
        assert "accuracy" not in found.base
        assert ("full", "lora:rank=2") in {(p.left, p.right) for p in found.pairs if p.measure == "accuracy"}
        assert set(found.told[0].answers) == {"full", "lora:rank=2"}
        assert all(0.5 < arm.kept.value <= 1 for arm in found.arms)
        assert {"nearest_class", "frozen_linear"} <= {baseline.name for baseline in found.baselines}

    def test_the_curve_has_every_arm_on_every_part(self, compared_text):
        points = [(p.arm, p.share) for p in compared_text.comparison.curve]
        assert len(points) == 4
        assert {share for _, share in points} == {0.5, 1.0}
        half = next(p for p in compared_text.comparison.curve if p.share == 0.5)
        assert half.rows == 36
        assert len(half.values) == 2

    def test_it_has_a_page(self, compared, compared_text):
        for made in (compared, compared_text):
            page = made.report.read_text("utf-8")
            assert "<svg" in page
            assert "Full fine-tuning" in page

    def test_comparison_json_holds_to_its_schema(self, compared, compared_text):
        import jsonschema

        validator = jsonschema.Draft202012Validator(Comparison.model_json_schema())
        for made in (compared, compared_text):
            validator.validate(json.loads((made.path / "comparison.json").read_text()))

    def test_nothing_is_left_of_the_way_there(self, compared):
        left = {p.name for p in (compared.path / "trials").rglob("*") if p.is_file()}
        assert not {
            name for name in left if name.endswith((".pt",)) or name in {"weights.safetensors", "base.safetensors"}
        }

    def test_the_same_call_makes_nothing_twice_and_more_seeds_go_on_from_there(self, place, compared):
        before = {p: p.stat().st_mtime_ns for p in (compared.path / "trials").glob("*/*/result.json")}
        again = metier.compare(sums(place, "sums"), seeds=3)
        after = {p: p.stat().st_mtime_ns for p in (compared.path / "trials").glob("*/*/result.json")}
        assert before.items() <= after.items()
        assert len(after) == len(before) + 2
        assert again.comparison.seeds == (0, 1, 2)
        metier.compare(sums(place, "sums"))

    def test_another_recipe_is_not_mixed_in(self, place, compared):
        with pytest.raises(RecipeError, match=r"another recipe: train\.batch_size: 16 -> 8"):
            metier.compare(sums(place, "sums"), "train.batch_size=8")


def lines(cell: Path) -> list[dict]:
    return [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines() if '"step", "step"' in line]


def without_times(value):
    """All that does not depend on how fast the machine was."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


class TestFloor:
    def test_every_training_is_dialled_and_the_search_judges_what_keeps_the_floor(self, place):
        floored = metier.compare(
            teams(place, "floored", train={"retain": 0.98}, compare={"methods": ["full"], "data_curve": []})
        )
        (arm,) = floored.comparison.arms
        trials = [read(path) for path in sorted((floored.path / "trials").glob("full/*/result.json"))]
        assert len(trials) == len(arm.trials) + 2
        for ended in trials:
            assert sum(one.chosen for one in ended.strengths) == 1
            assert len(ended.strengths) == len(SHARES)
        searched = {f"{trial.rate:g}": trial.loss for trial in arm.trials}
        for path in (floored.path / "trials" / "full").glob("coarse-*/result.json"):
            rate = path.parent.name.removeprefix("coarse-").removesuffix("-0")
            assert searched[rate] == pytest.approx(read(path).loss_under(0.98))

    def test_the_test_rows_are_measured_with_what_the_floor_allows(self, place):
        far = {"retain": 0.98, "learning_rate": 0.003}
        found = metier.compare(
            teams(place, "far", train=far, compare={"methods": ["full"], "trials": 0, "data_curve": []})
        ).comparison
        (arm,) = found.arms
        assert found.floor == 0.98
        for cell in arm.cells:
            (chosen,) = [one for one in cell.strengths if one.chosen]
            assert chosen.share < 1
            whole = next(one for one in cell.strengths if one.share == 1)
            assert cell.kept > whole.kept
        assert any("to keep the floor, these shares" in note for note in found.notes)

    @pytest.mark.parametrize(
        ("kept", "gain", "loss"), [(0.99, 0.4, 0.6), (0.99, -0.1, 1.0), (0.97, 0.4, 1.0)], ids=["kept", "worse", "lost"]
    )
    def test_what_a_trial_is_worth_under_a_floor(self, kept, gain, loss):
        one = Strength(share=0.5, gain=gain, kept=kept, chosen=True)
        ended = Ended.model_construct(loss=0.2, first_loss=1.0, strengths=(one,))
        assert ended.loss_under(0.98) == pytest.approx(loss)
        assert ended.is_above_base(0.98) == (loss == 1.0)
        assert ended.loss_under(None) == 0.2
        assert not ended.is_above_base(None)
        assert Ended.model_construct(loss=None, first_loss=1.0, strengths=()).loss_under(0.98) == math.inf

    def test_trying_shares_after_every_training_takes_its_time(self):
        size = Size(arms=("full",), trials=3, seeds=2, shares=(0.5,), rows=100)
        seconds = [
            budget.seconds_left(size, Prices({"full": 60.0}, strengths=10.0, has_floor=floor), Done())
            for floor in (False, True)
        ]
        assert seconds[1] - seconds[0] == pytest.approx(10 * (3 + 2 + 3))


class TestStopped:
    def start(self, place: Path, job: Path) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
        return subprocess.Popen(
            [sys.executable, "-m", "metier", "compare", str(job), "--quiet"],
            cwd=place,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_for(self, process: subprocess.Popen, folder: Path, pattern: str, count: int) -> None:
        while process.poll() is None and len(list(folder.glob(pattern))) < count:
            time.sleep(0.02)

    def test_killed_at_any_point_the_same_command_ends_with_the_same_numbers(self, place, compared):
        job = place / "killed.yaml"
        job.write_text(yaml.safe_dump(sums(place, "killed")))
        trials = place / "runs" / "killed-compare" / "trials"
        for pattern, count in (("*/*/metrics.jsonl", 2), ("*/final-*/result.json", 1), ("*/final-*/metrics.jsonl", 3)):
            process = self.start(place, job)
            self.wait_for(process, trials, pattern, count)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (trials.parent / "comparison.json").exists()
        (left,) = history.rows(trials.parent)
        whole = len(list(trials.glob("*/*/result.json")))
        assert left["state"] == "unfinished"
        assert left["next"].startswith(f"metier compare {trials.parent / 'compare.resolved.yaml'} goes on")
        assert left["next"].endswith(f": {whole}")
        made = metier.compare(job)
        (row,) = history.rows(trials.parent)
        assert row["state"] == "finished"
        assert row["method"] == "lora:rank=4, full"
        assert row["result"] == plain(made.comparison.verdict[0])
        one, two = (json.loads((m.path / "comparison.json").read_text()) for m in (compared, made))
        one["verdict"], two["verdict"] = one["verdict"][:1], two["verdict"][:1]  # the other lines tell of time
        assert without_times(one) == without_times(two)

    def test_a_signal_ends_it_with_75(self, place):
        job = place / "stopped.yaml"
        tree = sums(place, "stopped", train={"max_steps": 20_000}, compare={"methods": ["full"], "trials": 0})
        job.write_text(yaml.safe_dump(tree))
        process = self.start(place, job)
        self.wait_for(process, place / "runs" / "stopped-compare" / "trials", "*/*/metrics.jsonl", 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
        spent = json.loads(next((place / "runs" / "stopped-compare").rglob("spent.json")).read_text())
        assert spent["seconds"] > 0


class TestPlan:
    def test_says_what_it_would_do_and_writes_nothing(self, place):
        found = experiment.plan(parse(teams(place, "planned")))
        assert found.trainings == 2 * (3 + 2 + 2 + 3)
        assert [arm.name for arm in found.arms] == ["full", "lora:rank=2"]
        assert all(arm.peak_memory_bytes > 0 and arm.seconds > 0 for arm in found.arms)
        assert not (place / "runs" / "planned-compare").exists()

    def test_a_budget_leaves_out_what_it_says(self, place):
        recipe = parse(teams(place, "planned"), ["train.max_steps=30000", "train.epochs=9000", "compare.budget=5s"])
        with pytest.raises(RecipeError, match="not enough for even one method"):
            experiment.plan(recipe)


@pytest.fixture(scope="module")
def jobs(place):
    tiny.make("llama", place / "llama")
    for name, answer in (("teams", lambda i: TEAMS[i % 3]), ("numbers", lambda i: str(i % 4))):
        rows = [{"prompt": f"{name}: parcel {i}", "completion": answer(i)} for i in range(100)]
        write(place / f"{name}.jsonl", rows)
        tree = {
            "model": {"base": str(place / "llama"), "device": "cpu"},
            "data": {"train": str(place / f"{name}.jsonl"), "overlap": "allow", "validation": 0.2, "test": 0.2},
            "task": "chat",
            "method": {"kind": "lora", "rank": 4},
            "train": {"max_steps": 6, "batch_size": 8, "evaluations": 2, "learning_rate": 0.01},
            "evaluate": {"generate": False, "retention": "off"},
            "compare": {"trials": 0},
            "export": {"folder": str(place / "runs" / "several")},
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return [place / "teams.yaml", place / "numbers.yaml"]


def values(way):
    """The scores of a way without their intervals."""
    return [[score.value for score in row] for row in way.scores]


class TestSeveralTasks:
    def test_every_way_is_measured_on_every_task_and_nothing_twice(self, jobs):
        found = metier.compare_tasks(jobs, seeds=2)
        held = found.interference
        assert held.tasks == ("teams", "numbers")
        assert held.measure == ("loss", "loss")
        assert held.seeds == (0, 1)
        assert held.learning_rates == (0.01, 0.01)
        ways = {way.name: way for way in held.ways}
        assert set(ways) == {"switched", "linear", "ties", "dare", "joint", "sequence"}
        switched, sequence = values(ways["switched"]), ways["sequence"]
        ended = values(sequence)
        for task in range(2):
            assert switched[task][task] < held.base[task].value
            assert switched[task][task] < switched[1 - task][task]
            other = ways["linear"].beside_own[task]
            assert other.difference.value == pytest.approx(values(ways["linear"])[0][task] - switched[task][task])
            assert other.difference.seeds == 2
        assert ended[0] == pytest.approx(switched[0])
        assert sequence.forgotten[0] == pytest.approx(ended[1][0] - ended[0][0])  # a loss that rose was forgotten
        assert sequence.forgotten[1] == 0
        assert ways["switched"].beside_own == ()
        assert ways["switched"].seconds_to_switch > 0
        assert found.report.exists()
        (row,) = history.rows(found.path)
        assert (row["state"], row["method"], row["result"][:7]) == ("finished", "tasks", "2 tasks")
        before = {p: p.stat().st_mtime_ns for p in found.path.rglob("*.json") if "measured" in p.parts}
        assert len(before) > 2 * 2 * 7
        assert metier.compare_tasks(jobs, seeds=2).interference.ways[1:] == held.ways[1:]
        assert before == {p: p.stat().st_mtime_ns for p in before}

    def test_each_task_and_joint_training_have_a_rate_of_their_own(self, place, jobs, capsys):
        folder = f"export.folder={place / 'runs' / 'searched'}"
        # At a part of what this network bears, every search has to go up.
        found = metier.compare_tasks(jobs, "compare.trials=5", "train.learning_rate=2e-3", folder, seeds=1)
        said = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"trainings"' in line]
        held, trials = found.interference, found.path / "trials"
        rates = {f"task-{i}": rate for i, rate in enumerate(held.learning_rates)}
        rates["joint"] = held.joint_learning_rate
        for name, rate in rates.items():
            tried = {float(one.name.partition("-")[2]) for one in (trials / "search" / name).iterdir()}
            assert rate > 2e-3
            assert len(tried) >= 5
            # The search looks at short trainings; the first seed was trained whole with two rates, one of which stays.
            whole = {float(one.name.rpartition(f"{name}-")[2]): one for one in (trials / "seed-0").glob(f"{name}-*")}
            assert len(whole) == 2
            losses = {at: json.loads((one / "result.json").read_text())["loss"] for at, one in whole.items()}
            assert losses[rate] <= min(losses.values()) * (1 + 1e-4)
        before = {p: p.stat().st_mtime_ns for p in trials.rglob("result.json")}
        # 5 trials and 2 whole trainings of each of three, one of them again in sequence; more where a grid moved on.
        moved_on = len(list((trials / "search").glob("*/edge-*")))
        assert said[0]["trainings"] == 22 == len(before) - moved_on
        assert said[0]["seconds"] > 0
        again = metier.compare_tasks(jobs, "compare.trials=5", "train.learning_rate=2e-3", folder, seeds=1)
        assert again.interference.ways[1:] == held.ways[1:]
        assert before == {p: p.stat().st_mtime_ns for p in trials.rglob("result.json")}

    def test_tasks_that_do_not_share_a_base_are_refused(self, place, jobs):
        other = place / "other.yaml"
        tree = yaml.safe_load(jobs[1].read_text())
        tree["model"]["base"] = str(place / "bert")
        other.write_text(yaml.safe_dump(tree))
        with pytest.raises(RecipeError, match="name one base in both"):
            metier.compare_tasks([jobs[0], other])
