"""Outcomes, counts, survival, the paired hierarchical bootstrap and power, against values worked out elsewhere."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from experiments import statistics as s


def test_examples_in_the_docstrings():
    assert doctest.testmod(s).failed == 0


def outcome(accuracy: list[float], broken: float = math.nan) -> s.Outcome:
    """Of a run that is evaluated at every tenth of its horizon of 100 steps."""
    return s.outcome(10.0 * np.arange(1, len(accuracy) + 1), np.array(accuracy), 100, broken)


def test_outcomes():
    fallen = [0.3, 0.6, 0.2, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert outcome(fallen) == s.Outcome("collapsed", 50.0, 0.6, 0.2)  # it had come back at 40
    assert outcome([0.3, 0.6, *[0.2] * 7, 0.31]).kind == "degraded"  # above half the peak at the end
    assert outcome([0.3, 0.6, *[0.55] * 8]).kind == "learnt"
    assert outcome([0.5] * 10, broken=37.0) == s.Outcome("collapsed", 37.0, 0.5, 0.5)


def test_a_run_whose_last_tenth_has_no_evaluation_is_judged_by_the_last_one():
    steps, risen, fallen = np.array([0.0, 40.0, 80.0]), np.array([0.3, 0.6, 0.6]), np.array([0.3, 0.6, 0.2])
    assert s.outcome(steps, risen, 100).kind == "learnt"
    assert s.outcome(steps, fallen, 100) == s.Outcome("collapsed", 80.0, 0.6, 0.2)
    assert s.outcome(steps, np.array([0.6, 0.2, 0.4]), 100).kind == "degraded"
    assert s.final_accuracy(steps, risen, 100) == 0.6


def test_a_run_that_never_answers_rightly_has_learnt_nothing():
    assert outcome([0.0] * 10) == s.Outcome("collapsed", 10.0, 0.0, 0.0)
    assert outcome([0.0, 0.0, *[0.4] * 8]).kind == "learnt"


def test_final_accuracy_is_the_mean_of_the_last_tenth():
    steps = 4.0 * np.arange(1, 26)
    accuracy = np.where(steps > 90, steps / 100, 7.0)
    assert s.final_accuracy(steps, accuracy, 100) == pytest.approx(0.96)  # of 0.92, 0.96 and 1.00


def test_clopper_pearson():
    """Table values for 3 of 10; and the closed forms at the ends."""
    np.testing.assert_allclose(s.clopper_pearson(3, 10), (0.0667, 0.6525), atol=5e-5)
    np.testing.assert_allclose(s.clopper_pearson(12, 12), (0.025 ** (1 / 12), 1.0))


def test_kaplan_meier():
    """Five runs: collapses at 1, 3 and 3, one lost sight of at 2, one at 5: by hand 4/5, then 4/5 * 1/3."""
    times = np.array([1.0, 2.0, 3.0, 3.0, 5.0])
    moments, share, low, high = s.kaplan_meier(times, np.array([True, False, True, True, False]))
    at = dict(zip(moments.tolist(), share.tolist(), strict=True))
    assert at[0.0] == 1.0
    assert at[1.0] == at[2.0] == pytest.approx(0.8)
    assert at[3.0] == at[5.0] == pytest.approx(0.8 / 3)
    # Greenwood on the log-log scale at 1: the variance of log(-log S) is (1 / (5 * 4)) / log(0.8)^2.
    spread = 1.96 * math.sqrt(1 / 20) / abs(math.log(0.8))
    index = int(np.flatnonzero(moments == 1.0)[0])
    np.testing.assert_allclose(low[index], 0.8 ** math.exp(spread), rtol=1e-3)
    np.testing.assert_allclose(high[index], 0.8 ** math.exp(-spread), rtol=1e-3)


@pytest.mark.parametrize(("collapsed", "last"), [(False, 1.0), (True, 0.0)])
def test_kaplan_meier_of_none_and_of_all(collapsed: bool, last: float):
    _, share, low, high = s.kaplan_meier(np.array([4.0, 4.0]), np.array([collapsed] * 2))
    assert share[-1] == low[-1] == high[-1] == last


def test_resampling_draws_cold_starts_and_then_pairs():
    """Pairs that are equal within a cold start leave only the cold starts to vary, whatever their sizes."""
    cold_starts = np.array([7, 7, 7, 9, 9])
    means = s.resample(np.where(cold_starts == 7, 1.0, 0.0), cold_starts, draws=4000)
    # Twice 7, twice 9 (a quarter each), or one of each: 3 of 5 pairs.
    values, counts = np.unique(means.round(9), return_counts=True)
    np.testing.assert_allclose(values, [0.0, 0.6, 1.0])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


def test_resampling_within_one_cold_start_is_the_bootstrap():
    values = np.random.default_rng(0).normal(size=40)
    means = s.resample(values, np.zeros(40, int), draws=20_000)
    reference = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    np.testing.assert_allclose(np.quantile(means, [0.025, 0.975]), reference.confidence_interval, atol=0.01)


def test_columns_are_resampled_together():
    values = np.random.default_rng(0).normal(size=(6, 1)) * np.array([1.0, -2.0])
    means = s.resample(values, np.arange(6) % 3, draws=100)
    np.testing.assert_allclose(means[:, 1], -2 * means[:, 0])


def test_estimate_and_equivalence():
    cold_starts = np.arange(12) % 6
    noise = np.random.default_rng(0).normal(size=12) * 0.01
    noise -= noise.mean()
    near, far = s.estimate(0.01 + noise, cold_starts), s.estimate(0.1 + noise, cold_starts)
    assert near.mean == pytest.approx(0.01)
    assert near.low < near.low90 < 0.01 < near.high90 < near.high
    assert near.equivalent(0.03)
    assert not near.equivalent(0.012)
    assert near.p_beyond(0.03) < 0.01
    assert near.p_beyond(0.01) == pytest.approx(0.5)
    assert far.p_beyond(0.03) > 0.99
    assert far.p < 1e-6
    assert not far.equivalent(0.03)
    assert s.estimate(noise, cold_starts).p > 0.5


def test_with_one_pair_to_a_cold_start_it_is_the_t_test():
    values = np.random.default_rng(1).normal(0.5, 1.0, size=10)
    found = s.estimate(values, np.arange(10), draws=200_000)
    reference = stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(reference.pvalue, rel=0.02)
    np.testing.assert_allclose([found.low, found.high], reference.confidence_interval(), atol=0.12)
    alone = s.estimate(values[:1], np.array([3]))
    assert alone.mean == values[0]
    assert math.isnan(alone.low)
    assert not alone.equivalent(10.0)
    assert math.isnan(alone.p_beyond(10.0))
    assert s.estimate(np.zeros(4), np.arange(4)).p == 1.0
    assert np.isnan(s.estimate(np.array([0.1, np.nan, 0.2]), np.arange(3)).p)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_intervals_cover(tau: float):
    """Ten cold starts of two pairs, whose effects differ with standard deviation tau times that of the pairs."""
    rng, cold_starts = np.random.default_rng(3), np.arange(20) % 10
    inside = 0
    for _ in range(300):
        found = s.estimate(tau * rng.normal(size=10)[cold_starts] + rng.normal(size=20), cold_starts, draws=400)
        inside += found.low < 0 < found.high
    assert inside / 300 >= 0.92


def test_mcnemar():
    """Seven discordant pairs, six one way: 2 * (1 + 7) / 128."""
    first = np.array([True] * 6 + [False] + [True, False])
    second = np.array([False] * 6 + [True] + [True, False])
    assert s.mcnemar(first, second) == pytest.approx(0.125)
    assert s.mcnemar(first, first) == 1.0


def test_power_of_the_paired_t_test():
    """Cohen's d = 0.5 takes 34 pairs for 80% and 44 for 90% (G*Power 3.1)."""
    assert s.pairs_needed(0.5, 1.0) == 34
    assert s.pairs_needed(0.5, 1.0, target=0.9) == 44
    assert s.power(34, 0.05, 0.1) == pytest.approx(0.808, abs=1e-3)
    assert s.power(12, s.detectable(12, 0.04), 0.04) == pytest.approx(0.8, abs=0.02)
    assert s.pairs_needed(0.03, 0.00408) == 3  # where scipy's noncentral t has no number
    assert all(s.power(pairs, 0.03, 0.001) > s.power(pairs, 0.03, 0.1) > 0.05 for pairs in range(3, 40))
    with pytest.raises(ValueError, match="too small"):
        s.pairs_needed(1e-6, 1.0)
