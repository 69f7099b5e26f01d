"""Intervals and paired changes against published figures, scipy, scikit-learn and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metier.core.evidence import Estimate
from metier.evaluation import statistics
from metier.evaluation.metrics import codes, macro_f1


def hits(count: int, of: int) -> np.ndarray:
    return np.array([1.0] * count + [0.0] * (of - count))


def paired(both: int, only_after: int, only_before: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits before and after, from the four cells of a paired table."""
    before = [1.0] * both + [0.0] * only_after + [1.0] * only_before + [0.0] * neither
    after = [1.0] * both + [1.0] * only_after + [0.0] * only_before + [0.0] * neither
    return np.array(before), np.array(after)


TABLES = [
    (1, 7, 1, 12),
    (36, 2, 12, 0),
    (0, 0, 0, 5),
    (5, 0, 0, 0),
    (0, 9, 0, 0),
    (0, 0, 9, 0),
    (3, 1, 4, 1),
    (1, 0, 0, 0),
]


class TestShare:
    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    @pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 30), (30, 30), (1, 30), (17, 30), (120, 200)])
    def test_wilson_equals_scipy(self, count, of, confidence):
        from scipy.stats import binomtest

        theirs = binomtest(count, of).proportion_ci(confidence, method="wilson")
        ours = statistics.share(hits(count, of), confidence)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert ours.value == count / of
        assert ours.n == of

    def test_newcombe_1998_table_1(self):
        # Source: Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        for count, of, low, high in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ]:
            found = statistics.share(hits(count, of), 0.95)
            assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


class TestShareChange:
    def test_published_example(self):
        # Source: Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850, airway hyper-responsiveness before and
        # after stem cell transplantation, Newcombe's interval: -0.507 to -0.026.
        before, after = paired(both=1, only_after=7, only_before=1, neither=12)
        found = statistics.share_change(after, before, 0.95)
        assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
        assert found.value == pytest.approx(-6 / 21)

    @pytest.mark.parametrize("table", TABLES)
    def test_contains_the_change_and_stays_within_one(self, table):
        found = statistics.share_change(*paired(*table), 0.95)
        assert -1 - 1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12

    @pytest.mark.parametrize("table", TABLES)
    def test_swapping_the_sides_turns_the_sign(self, table):
        before, after = paired(*table)
        there, back = statistics.share_change(before, after, 0.95), statistics.share_change(after, before, 0.95)
        assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)

    def test_from_none_to_all(self):
        found = statistics.share_change(hits(0, 40), hits(40, 40), 0.95)
        assert found.value == 1
        assert 0.8 < found.low < 1
        assert found.high == pytest.approx(1)

    def test_pairing_narrows_the_interval(self):
        together = statistics.share_change(*paired(40, 5, 1, 40), 0.95)
        apart = statistics.share_change(*paired(20, 25, 21, 20), 0.95)
        assert together.value == apart.value
        assert together.high - together.low < 0.6 * (apart.high - apart.low)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        generator = np.random.default_rng(11)
        cells = np.array([0.35, 0.2, 0.1, 0.35])
        truth, covered = 0.1, 0
        for table in generator.multinomial(60, cells, size=1500):
            found = statistics.share_change(*paired(*table), 0.95)
            covered += found.low <= truth <= found.high
        # Three standard errors of the simulation are 0.017; the score interval is a little wide by design.
        assert 0.935 <= covered / 1500 <= 0.985


class TestMean:
    def test_equals_scipy(self):
        from scipy.stats import t

        values = np.array([0.2, 0.4, 0.1, 0.9])
        low, high = t.interval(0.9, 3, loc=values.mean(), scale=values.std(ddof=1) / 2)
        found = statistics.mean(values, 0.9)
        assert (found.value, found.low, found.high) == pytest.approx((0.4, low, high))

    def test_change_is_paired(self):
        before = np.array([0.0, 10.0, 20.0, 30.0])
        found = statistics.mean_change(before, before + np.array([1.0, 1.1, 0.9, 1.0]), 0.95)
        assert 0.8 < found.low < 1 < found.high < 1.2

    def test_one_row_has_no_interval(self):
        for found in (statistics.mean(np.array([0.5]), 0.95), statistics.ratio(np.array([3.0]), np.array([2.0]), 0.95)):
            assert found.low == found.value == found.high
            assert found.interval == "none: one row"


@pytest.fixture(scope="module")
def texts() -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of 150 texts whose losses differ by text."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 400, 150).astype(float)
    return tokens * generator.normal(3.0, 0.4, 150), tokens


class TestRatio:
    def test_is_the_mean_over_tokens_not_over_rows(self):
        found = statistics.ratio(np.array([10.0, 90.0]), np.array([10.0, 30.0]), 0.95)
        assert found.value == 100 / 40

    @pytest.mark.parametrize("exponential", [False, True])
    def test_agrees_with_a_bootstrap(self, texts, exponential):
        totals, weights = texts

        def figure(chosen):
            ratio = totals[chosen].sum() / weights[chosen].sum()
            return math.exp(ratio) if exponential else float(ratio)

        ours = statistics.ratio(totals, weights, 0.95, exponential=exponential)
        drawn = statistics.bootstrap(figure, 150, 0.95)
        assert ours.value == pytest.approx(drawn.value)
        assert ours.high - ours.low == pytest.approx(drawn.high - drawn.low, rel=0.15)
        assert (ours.low, ours.high) == pytest.approx((drawn.low, drawn.high), rel=0.02)

    def test_perplexity_interval_by_the_delta_method(self, texts):
        plain, perplexity = (statistics.ratio(*texts, 0.95, exponential=flag) for flag in (False, True))
        assert perplexity.value == pytest.approx(math.exp(plain.value))
        assert perplexity.high - perplexity.value == pytest.approx(perplexity.value * (plain.high - plain.value))

    def test_change_is_paired_by_row(self, texts):
        totals, weights = texts
        found = statistics.ratio_change((totals, weights), (totals - 0.1 * weights, weights), 0.95)
        assert found.value == pytest.approx(-0.1)
        assert found.high - found.low < 1e-9

    def test_change_agrees_with_a_bootstrap(self, texts):
        totals, weights = texts
        noisy = totals * np.random.default_rng(6).normal(0.97, 0.05, len(totals))

        def figure(chosen):
            return float((noisy[chosen].sum() - totals[chosen].sum()) / weights[chosen].sum())

        ours = statistics.ratio_change((totals, weights), (noisy, weights), 0.95)
        drawn = statistics.bootstrap(figure, len(totals), 0.95)
        assert ours.high - ours.low == pytest.approx(drawn.high - drawn.low, rel=0.15)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        generator = np.random.default_rng(12)
        covered = 0
        for _ in range(800):
            weights = generator.integers(5, 60, 40).astype(float)
            found = statistics.ratio(weights * generator.normal(2, 0.5, 40), weights, 0.95)
            covered += found.low <= 2 <= found.high
        assert 0.92 <= covered / 800 <= 0.97


class TestMacroF1:
    @pytest.mark.parametrize("seed", range(6))
    def test_equals_scikit_learn(self, seed):
        from sklearn.metrics import f1_score

        generator = np.random.default_rng(seed)
        wanted, given = generator.integers(0, 6, 80), generator.integers(0, 5 + seed % 3, 80)
        assert macro_f1(given, wanted) == pytest.approx(f1_score(wanted, given, average="macro"))

    def test_counts_an_answer_that_is_no_class(self):
        from sklearn.metrics import f1_score

        wanted, given = ["a", "b", "a", "b"], ["a", "b", "nonsense", "b"]
        ours = macro_f1(*codes(given, wanted))
        assert ours == pytest.approx(f1_score(wanted, given, average="macro", zero_division=0))
        assert ours < 1


class TestBootstrap:
    def test_same_rows_same_interval(self):
        values = np.random.default_rng(1).random(50)
        first, second = (statistics.bootstrap(lambda chosen: float(values[chosen].mean()), 50, 0.95) for _ in range(2))
        assert first == second

    def test_one_row(self):
        found = statistics.bootstrap(lambda chosen: float(len(chosen)), 1, 0.95)
        assert (found.low, found.value, found.high, found.n) == (1, 1, 1, 1)

    def test_higher_confidence_is_wider(self):
        values = np.random.default_rng(2).random(50)
        narrow, wide = (statistics.bootstrap(lambda chosen: float(values[chosen].mean()), 50, c) for c in (0.8, 0.99))
        assert wide.low < narrow.low < narrow.high < wide.high


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "higher", "said"),
        [
            (0.1, 0.2, True, "better"),
            (0.1, 0.2, False, "worse"),
            (-0.2, -0.1, True, "worse"),
            (-0.2, -0.1, False, "better"),
            (-0.1, 0.1, True, "no clear change"),
            (0.0, 0.1, True, "no clear change"),
        ],
    )
    def test_reads_the_interval(self, low, high, higher, said):
        change = Estimate(value=(low + high) / 2, low=low, high=high, n=9, interval="t")
        assert statistics.verdict(change, higher_is_better=higher) == said

    def test_nothing_to_compare(self):
        assert statistics.verdict(None, higher_is_better=True) == "not compared"
