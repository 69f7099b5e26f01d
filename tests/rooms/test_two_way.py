"""Rows and seeds as two kinds of chance: against scipy, against each other, and at the ends of what can happen."""

from __future__ import annotations

import numpy as np
import pytest

from metier import evaluation
from metier.core.comparison import Difference
from metier.evaluation import statistics, suite, two_way
from metier.evaluation.measured import Rows


def rows(values, kind="mean", weights=None, unit="score", title="A measure") -> Rows:
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    return Rows(title, "domain", kind, unit, True, values, weights)


def pair(left, right, *, name="some", primary=True, delta=0.01, confidence=0.95, clusters=None):
    given = {"primary": primary, "delta": delta, "confidence": confidence, "clusters": clusters}
    return evaluation.pair(name, ("left", left), ("right", right), **given)


@pytest.fixture
def table() -> np.ndarray:
    """Differences of 4 seeds and 60 rows in which both rows and seeds have their own part."""
    generator = np.random.default_rng(4)
    luck = np.array([[-0.15], [-0.05], [0.05], [0.15]])
    return 0.2 + luck + generator.normal(0, 0.5, 60) + generator.normal(0, 0.3, (4, 60))


class TestParts:
    def test_are_what_they_were_drawn_with(self):
        generator = np.random.default_rng(0)
        drawn = generator.normal(0, 3, (400, 1, 40)) + generator.normal(0, 1, (400, 5, 1))
        found = two_way.spread(drawn + generator.normal(0, 2, (400, 5, 40)))
        rest = 4 / (5 * 40)
        assert found.of_rest.mean() == pytest.approx(rest, rel=0.05)
        assert found.of_rows.mean() == pytest.approx(9 / 40 + rest, rel=0.1)
        assert found.of_seeds.mean() == pytest.approx(1 / 5 + rest, rel=0.1)
        assert found.variance.mean() == pytest.approx(found.value.var(), rel=0.2)

    def test_a_bootstrap_of_a_mean_finds_the_same(self, table):
        plain = two_way.spread(table)
        generator = np.random.default_rng(1)
        chosen = generator.integers(0, 60, (4000, 60))
        drawn = two_way.spread_of_draws(table.mean(axis=1), table[:, chosen].mean(axis=2).T, 60)
        assert drawn.value == pytest.approx(plain.value)
        assert drawn.of_rows == pytest.approx(plain.of_rows, rel=0.1)
        assert drawn.of_seeds == pytest.approx(plain.of_seeds)
        assert drawn.of_rest == pytest.approx(plain.of_rest, rel=0.1)

    def test_of_another_size(self, table):
        found = two_way.spread(table)
        same, more = found.at(60, 4), found.at(60_000_000, 4)
        assert same.variance == pytest.approx(found.variance)
        assert same.degrees_of_freedom == pytest.approx(found.degrees_of_freedom)
        assert more.variance == pytest.approx(found.of_seeds - found.of_rest, rel=1e-3)
        assert more.degrees_of_freedom == pytest.approx(3, rel=1e-3)


class TestPair:
    def test_one_seed_is_the_paired_t_test_of_scipy(self, table):
        from scipy.stats import ttest_rel

        left, right = np.zeros(60), table[0]
        theirs = ttest_rel(right, left)
        low, high = theirs.confidence_interval(0.95)
        found = pair([rows(left)], [rows(right)])
        assert (found.difference.low, found.difference.high) == pytest.approx((low, high))
        assert found.difference.p == pytest.approx(theirs.pvalue)
        assert (found.difference.seeds, found.seeds_needed) == (1, None)

    def test_seeds_without_luck_are_the_paired_t_test_of_their_mean(self):
        from scipy.stats import t

        generator = np.random.default_rng(6)
        # Seeds that are moved to the same mean exactly have nothing of their own.
        drawn = generator.normal(0.1, 1, (3, 50))
        drawn += 0.1 - drawn.mean(axis=1, keepdims=True)
        found = pair([rows(np.zeros(50))], [rows(seed) for seed in drawn]).difference
        mean = drawn.mean(axis=0)
        half = t.ppf(0.975, 49) * mean.std(ddof=1) / 50**0.5
        assert (found.low, found.high) == pytest.approx((0.1 - half, 0.1 + half))

    def test_seeds_that_differ_widen_the_interval(self, table):
        near = pair([rows(np.zeros(60))], [rows(seed) for seed in table]).difference
        far = pair([rows(np.zeros(60))], [rows(seed + 3 * (s - 1.5)) for s, seed in enumerate(table)]).difference
        assert far.value == pytest.approx(near.value)
        assert far.high - far.low > 5 * (near.high - near.low)
        assert far.degrees_of_freedom == pytest.approx(3, abs=0.3)

    def test_the_base_stands_beside_every_seed(self, table):
        base = np.random.default_rng(7).normal(0, 1, 60)
        once = pair([rows(base)], [rows(base + seed) for seed in table])
        each = pair([rows(base)] * 4, [rows(base + seed) for seed in table])
        assert once == each

    def test_turned_round(self, table):
        zero, some = [rows(np.zeros(60))] * 4, [rows(seed) for seed in table]
        there, back = pair(zero, some).difference, pair(some, zero).difference
        assert (there.value, there.low, there.p) == pytest.approx((-back.value, -back.high, back.p))

    def test_a_ratio_of_one_seed_is_the_ratio_of_a_single_run(self):
        generator = np.random.default_rng(8)
        weights = generator.integers(5, 90, 70).astype(float)
        before, after = (weights * generator.normal(2, 0.3, 70) for _ in range(2))
        for kind, exponential in (("ratio", False), ("perplexity", True)):
            found = pair([rows(before, kind, weights)], [rows(after, kind, weights)]).difference
            alone = statistics.ratio_change((before, weights), (after, weights), 0.95, exponential=exponential)
            assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high))

    def test_rows_that_came_together_are_one(self, table):
        table = table - table.mean(axis=1, keepdims=True)
        alone = pair([rows(np.zeros(60))], [rows(seed) for seed in table]).difference
        zeros, five = [rows(np.zeros(300))], [rows(np.repeat(seed, 5)) for seed in table]
        together = pair(zeros, five, clusters=[f"page {i // 5}" for i in range(300)]).difference
        assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
        assert (together.rows, together.clusters) == (300, 60)
        apart = pair(zeros, five).difference
        assert apart.high - apart.low < 0.6 * (together.high - together.low)

    def test_groups_of_unlike_size_keep_the_mean_over_rows(self, table):
        clusters = ["a"] * 30 + ["b"] * 20 + list("cdefghijkl")
        found = pair([rows(np.zeros(60))], [rows(seed) for seed in table], clusters=clusters).difference
        assert found.value == pytest.approx(table.mean())
        assert found.clusters == 12

    @pytest.mark.parametrize(("name", "kind"), [("macro_f1", "whole"), ("some", "median")])
    def test_figures_that_are_no_mean(self, name, kind):
        generator = np.random.default_rng(9)
        wanted = generator.integers(0, 4, 200).astype(float)
        worse, better = (
            [np.where(generator.random(200) < share, wanted, generator.integers(0, 4, 200)) for _ in range(3)]
            for share in (0.3, 0.8)
        )
        left, right = ([rows(given, kind, wanted) for given in arm] for arm in (worse, better))
        found = pair(left, right, name=name).difference
        figures = [[suite.figure(name, cell, np.arange(200)) for cell in arm] for arm in (left, right)]
        assert found.value == pytest.approx(np.mean(figures[1]) - np.mean(figures[0]))
        if kind == "whole":
            assert found.low > 0.2
            one = pair(left[:1], right[:1], name=name).difference
            alone = suite._change(name, left[0], right[0], 0.95)
            assert one.high - one.low == pytest.approx(alone.high - alone.low, rel=0.1)

    def test_what_does_not_pair_is_said(self, table):
        some = [rows(seed) for seed in table]
        with pytest.raises(ValueError, match="2 seeds beside 4"):
            pair(some[:2], some)
        with pytest.raises(ValueError, match="rows differ"):
            pair([rows(np.zeros(59))], some)
        with pytest.raises(ValueError, match="2 ids of clusters for 60 rows"):
            pair(some, some, clusters=["a", "b"])

    def test_one_group_says_nothing(self, table):
        some = [rows(seed) for seed in table]
        assert pair(some, some, clusters=["a"] * 60) is None
        assert evaluation.over_seeds("some", some, 0.95, ["a"] * 60).interval == "none: one group of rows"


class TestNoDifference:
    def test_the_same_to_the_last_bit(self, table):
        some = [rows(seed) for seed in table]
        found = pair(some, some)
        assert found.verdict == "equivalent"
        assert (found.difference.low, found.difference.high, found.difference.p) == (0, 0, 1)
        assert found.difference.smallest_seen == 0

    @pytest.mark.parametrize(("count", "said"), [(30, "inconclusive"), (1000, "equivalent")])
    def test_agreement_on_few_rows_is_no_proof(self, count, said):
        right = [rows((np.arange(count) % 3 > 0), "share", unit="share")] * 3
        found = pair(right, right)
        assert found.difference.value == 0
        assert found.difference.high > 1.5 / count
        assert found.verdict == said


class TestOneArm:
    def test_one_seed_has_the_interval_of_a_single_run(self):
        cell = rows([1] * 20 + [0] * 10, "share", unit="share")
        assert evaluation.over_seeds("some", [cell], 0.95) == statistics.share(cell.values, 0.95)

    def test_seeds_and_rows(self, table):
        found = evaluation.over_seeds("some", [rows(seed) for seed in table], 0.95)
        assert found.value == pytest.approx(table.mean())
        assert found.interval == "two-way t"
        assert found.high - found.low > 2 * 1.96 * float(two_way.spread(table).of_rows) ** 0.5

    def test_all_right_is_not_certain(self):
        found = evaluation.over_seeds("some", [rows(np.ones(50), "share", unit="share")] * 3, 0.95)
        assert (found.value, found.high) == (1, 1)
        assert 0.9 < found.low < 0.99


class TestVerdict:
    @pytest.mark.parametrize(
        ("narrow", "p", "value", "higher", "said"),
        [
            ((0.02, 0.08), 0.001, 0.05, True, "better"),
            ((0.02, 0.08), 0.001, 0.05, False, "worse"),
            ((-0.08, -0.02), 0.001, -0.05, True, "worse"),
            ((0.001, 0.009), 0.001, 0.005, True, "equivalent"),
            ((-0.009, 0.009), 0.9, 0.0, True, "equivalent"),
            ((-0.02, 0.03), 0.6, 0.005, True, "inconclusive"),
            ((0.005, 0.03), 0.06, 0.02, True, "inconclusive"),
        ],
    )
    def test_reads_the_intervals(self, narrow, p, value, higher, said):
        found = Difference(
            value=value,
            low=narrow[0] - 0.01,
            high=narrow[1] + 0.01,
            narrow_low=narrow[0],
            narrow_high=narrow[1],
            degrees_of_freedom=9,
            rows=10,
            clusters=10,
            seeds=3,
            p=p,
            p_adjusted=p,
            smallest_seen=0.1,
        )
        assert two_way.verdict(found, 0.01, 0.95, higher_is_better=higher) == said

    def test_holm_by_hand(self):
        assert two_way.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
        assert two_way.holm([0.6, 0.9]) == pytest.approx((1, 1))
        assert two_way.holm([]) == ()

    def test_many_secondary_measures_are_held_to_more(self):
        generator = np.random.default_rng(3)
        base, some = np.zeros(100), generator.normal(0, 1, (3, 100))
        # A p value of 0.02: enough alone, not enough among ten.
        moved = [rows(seed - seed.mean() + 0.14) for seed in some]
        one = pair([rows(base)], moved, primary=False)
        assert 0.005 < one.difference.p < 0.05
        primary = pair([rows(base)], moved)
        made = evaluation.adjusted([primary, *[one] * 10], 0.95)
        assert (made[0].verdict, made[0].difference.p_adjusted) == ("better", one.difference.p)
        assert {found.verdict for found in made[1:]} == {"inconclusive"}
        assert made[1].difference.p_adjusted == pytest.approx(10 * one.difference.p)
        assert made[1].rows_needed is not None

    def test_what_is_too_small_to_count(self):
        assert evaluation.usual_delta(rows([1], unit="share"), 0.8) == 0.01
        assert evaluation.usual_delta(rows([1], unit="nats"), 2.5) == 0.025


class TestNeeded:
    def test_is_the_smallest_size_that_settles(self, table):
        found = two_way.spread(table - table.mean() + 0.05)
        more_rows = two_way.rows_needed(found, 60, 0.01, 0.95)
        assert more_rows is None, "seeds that differ by a tenth hide a twentieth, however many the rows"
        calm = two_way.spread(table - table.mean(axis=1, keepdims=True) + 0.05)
        needed = two_way.rows_needed(calm, 60, 0.01, 0.95)
        assert two_way.reach(calm.at(needed, 4), 0.95, sides=2) <= 0.05
        assert two_way.reach(calm.at(needed - 1, 4), 0.95, sides=2) > 0.05

    def test_rows_in_groups_are_counted_as_rows(self, table):
        calm = two_way.spread(table - table.mean(axis=1, keepdims=True) + 0.05)
        assert two_way.rows_needed(calm, 600, 0.01, 0.95) == 10 * two_way.rows_needed(calm, 60, 0.01, 0.95)

    def test_seeds_help_where_rows_are_many(self):
        generator = np.random.default_rng(2)
        table = 0.02 + generator.normal(0, 0.03, (3, 1)) + generator.normal(0, 0.1, (3, 4000))
        found = two_way.spread(table - table.mean() + 0.02)
        assert two_way.rows_needed(found, 4000, 0.001, 0.95) is None
        assert 3 < two_way.seeds_needed(found, 0.001, 0.95) < 60

    def test_a_difference_of_the_smallest_size_is_found_four_times_in_five(self):
        from scipy.stats import t

        generator = np.random.default_rng(5)
        truth = two_way.Spread(np.asarray(0.0), *map(np.asarray, (1 / 200, 0.01 / 4 + 1 / 800, 1 / 800)), 200, 4)
        size = two_way.reach(truth, 0.95, sides=2)
        drawn = size + generator.normal(0, 0.75**0.5, (2000, 1, 200)) + generator.normal(0, 0.1, (2000, 4, 1))
        found = two_way.spread(drawn + generator.normal(0, 1, (2000, 4, 200)))
        shown = found.value > found.variance**0.5 * t.ppf(0.975, found.degrees_of_freedom)
        assert shown.mean() == pytest.approx(0.8, abs=0.06)
