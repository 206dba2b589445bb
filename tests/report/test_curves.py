"""Curves: the mean and range over seeds by NumPy, what happens at their ends, limits of axes."""

import math

import numpy as np

from rlstab_jax.report.curves import charts, finite_series, over_seeds, thinned, y_limits
from rlstab_jax.report.figure import LOOKS, look_of
from rlstab_jax.report.panels import GAPS, REWARD, X

STEPS = np.arange(1.0, 31.0)


def test_mean_and_range_over_seeds_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(3, 30))
    seeds = over_seeds([(STEPS, row) for row in values])
    np.testing.assert_array_equal(seeds.x, STEPS)
    np.testing.assert_allclose(seeds.mean, np.mean(values, 0))
    np.testing.assert_array_equal(seeds.low, np.min(values, 0))
    np.testing.assert_array_equal(seeds.high, np.max(values, 0))
    assert seeds.rest == []


def test_on_a_logarithmic_axis_the_mean_is_geometric():
    seeds = over_seeds([(STEPS, np.full(30, 1e-2)), (STEPS, np.full(30, 1e-4))], log=True)
    np.testing.assert_allclose([seeds.mean[0], seeds.low[0], seeds.high[0]], [1e-3, 1e-4, 1e-2])


def test_many_points_are_smoothed_seed_by_seed_before_the_mean():
    x = np.arange(80.0)
    values = np.random.default_rng(1).normal(size=(2, 80))
    seeds = over_seeds([(x, row) for row in values])
    kernel = np.ones(5) / 5  # two points on either side: a twentieth of 80 and the point itself
    smooth = np.array([np.convolve(row, kernel, "valid") for row in values])
    np.testing.assert_allclose(seeds.mean[2:-2], smooth.mean(0))
    np.testing.assert_allclose(seeds.high[2:-2], smooth.max(0))


def test_past_the_shortest_seed_the_others_go_on_alone():
    short, long = (STEPS[:10], np.zeros(10)), (STEPS, np.ones(30))
    seeds = over_seeds([short, long])
    np.testing.assert_array_equal(seeds.x, STEPS[:10])
    np.testing.assert_allclose(seeds.mean, 0.5)
    ((x, y),) = seeds.rest
    assert x.tolist() == STEPS[9:].tolist()
    assert set(y) == {1.0}


def test_seeds_without_a_common_step_have_no_mean():
    seeds = over_seeds([(STEPS[:3], np.ones(3)), (STEPS[5:], np.ones(25))])
    assert len(seeds.mean) == 0
    assert [len(x) for x, _ in seeds.rest] == [3, 25]
    assert over_seeds([]).rest == []


def test_a_step_that_one_seed_has_not_measured_is_left_out():
    metrics = {X: STEPS, "reward/mean": np.where(STEPS == 4, math.nan, STEPS)}
    x, y = finite_series(metrics, "reward/mean")
    assert 4 not in x
    assert over_seeds([(x, y), (STEPS, STEPS)]).x.tolist() == x.tolist()
    assert finite_series({X: STEPS, "a": STEPS - 2}, "a", log=True)[1].tolist() == (STEPS - 2)[2:].tolist()


def test_thinning_keeps_peaks_and_ends():
    x = np.arange(10_000.0)
    y = np.zeros(10_000)
    y[1234], y[8000] = 7.0, -3.0
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) < 420
    assert {1234.0, 8000.0, 0.0, 9999.0} <= set(kept_x)
    assert (kept_y.max(), kept_y.min()) == (7.0, -3.0)


def test_limits_hold_zero_and_negative_rewards():
    assert y_limits([np.array([0.2, 0.5])], log=False, room=1.2) == (0.0, 0.6)
    low, high = y_limits([np.array([-2.0, -1.0])], log=False, room=1.2)
    assert low < -2
    assert high == 0
    assert y_limits([np.zeros(3)], log=False, room=1.2) == (0.0, 1.0)
    bottom, top = y_limits([np.array([1e-16, 1e-3, 1e-3, 2.0])], log=True, room=1.2)
    assert 1e-8 < bottom < 1e-6
    assert top > 2


def metrics(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {X: STEPS, "discrepancy/k3": scale * STEPS, "staleness/k3": scale * STEPS / 10}


def test_several_groups_have_a_chart_for_each_metric_and_common_axes():
    first, second = charts(GAPS, {"a": [metrics()], "b": [metrics(2.0)]})
    assert (first.metrics, second.metrics) == (("discrepancy/k3",), ("staleness/k3",))
    assert first.y_limits == second.y_limits
    assert [curve.label for curve in first.curves] == ["a", "b"]
    assert [curve.group for curve in first.curves] == [0, 1]


def test_axes_are_apart_where_decades_are_many():
    far = {"a": [metrics()], "b": [metrics() | {"staleness/k3": 1e7 * STEPS}]}
    first, second = charts(GAPS, far)
    assert second.y_limits[1] > 1e6 * first.y_limits[1]


def test_one_group_has_all_series_in_one_chart():
    (chart,) = charts(GAPS, {"a": [metrics(), metrics(3.0)]})
    assert chart.metrics == ("discrepancy/k3", "staleness/k3")
    assert [curve.look for curve in chart.curves] == [0, 2]  # as in the picture of a run with all three
    assert chart.legend
    assert charts(GAPS, {"a": [{X: STEPS, "staleness/k3": STEPS}]})[0].legend  # which of the gaps it is
    assert charts(REWARD, {"a": [metrics()]}) == []


def test_what_lies_below_the_axis_says_so():
    on_policy = metrics() | {"staleness/k3": np.full(30, 1e-15), "discrepancy_live/k3": STEPS}
    (chart,) = charts(GAPS, {"a": [on_policy]})
    assert "(below 0.000" in chart.curves[2].note


def test_looks_differ():
    assert len({str(sorted(look_of(i).items())) for i in range(LOOKS)}) == LOOKS
