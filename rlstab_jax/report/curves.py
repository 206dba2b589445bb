"""From columns of metrics to the curves of a chart: smoothing, mean and range over seeds, limits of the axes."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rlstab_jax.report.panels import Panel, X

Metrics = Mapping[str, Float[np.ndarray, "step"]]
Groups = Mapping[str, Sequence[Metrics]]  # by name, the runs that differ only in their seed
Series = tuple[Float[np.ndarray, "step"], Float[np.ndarray, "step"]]  # gradient steps and values, finite

BELOW = 4  # decades that a logarithmic axis shows at most below the median: what lies lower is rounding error
SHARED = 5  # decades that a logarithmic axis of several charts spans at most; else each has its own
MARKED = 40  # series of more points are smoothed, others show each point


class OverSeeds(NamedTuple):
    """A metric over the seeds of a group: at the steps where every seed has a value, their mean, lowest and highest.

    ``rest`` are the seeds past the last such step, each alone.
    """

    x: Float[np.ndarray, "step"]
    mean: Float[np.ndarray, "step"]
    low: Float[np.ndarray, "step"]
    high: Float[np.ndarray, "step"]
    rest: list[Series]

    @property
    def drawn(self) -> Float[np.ndarray, "point"]:
        """All values that a picture shows."""
        return np.concatenate([self.low, self.high, *(y for _, y in self.rest)])


class Curve(NamedTuple):
    """One curve of a chart.

    ``look`` numbers its colour and dashes. ``raw`` is the unsmoothed series of a single run. ``group`` is the number of
    the group where a chart compares several. ``note`` says why there is nothing to be seen.
    """

    label: str
    look: int
    seeds: OverSeeds
    raw: Series | None = None
    group: int | None = None
    note: str = ""


class Chart(NamedTuple):
    """Curves on common axes, with the limits of both. ``title`` is empty where ``panel``, its panel's, says it all."""

    panel: str
    title: str
    unit: str
    log: bool
    curves: list[Curve]
    x_end: float
    y_limits: tuple[float, float]
    metrics: tuple[str, ...]
    legend: bool  # whether its curves are named beside them; groups are named once for all charts


def running_mean(values: Float[np.ndarray, "step"], half: int) -> Float[np.ndarray, "step"]:
    """The mean over the ``half`` points on either side of each and itself, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    first, last = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def finite_series(metrics: Metrics, name: str, log: bool = False) -> Series:
    """A metric's finite values with their gradient steps, for a logarithmic axis the positive ones."""
    x, y = np.asarray(metrics.get(X, []), np.float64), np.asarray(metrics.get(name, []), np.float64)
    if not len(y):
        return y, y
    shown = np.isfinite(x) & np.isfinite(y)
    if log:
        shown &= y > 0
    return x[shown], y[shown]


def over_seeds(series: Sequence[Series], log: bool = False) -> OverSeeds:
    """The mean and the range over seeds of a metric.

    Where the longest series has more than `MARKED` points, each is first smoothed over a twentieth of the longest.

    Args:
      series: gradient steps, each once and in order, and finite values of each seed.
      log: for a logarithmic axis: positive values, smoothed and averaged geometrically.
    """
    series = [(x, np.log(y) if log else y) for x, y in series if len(x)]
    longest = max((len(x) for x, _ in series), default=0)
    if longest > MARKED:
        series = [(x, running_mean(y, longest // 40)) for x, y in series]
    common = functools.reduce(np.intersect1d, [x for x, _ in series]) if series else np.zeros(0)
    values = np.array([y[np.isin(x, common)] for x, y in series]).reshape(len(series), len(common))
    back = np.exp if log else np.asarray
    end = common.max(initial=-np.inf)
    if len(common) == 0:
        mean = low = high = common
    else:
        mean, low, high = values.mean(0), values.min(0), values.max(0)
    # From the last common point on, so that a seed that goes on alone leaves the mean without a gap in time.
    rest = [(x[x >= end], back(y[x >= end])) for x, y in series if len(x) and x[-1] > end]
    return OverSeeds(common, back(mean), back(low), back(high), rest)


def thinned(x: Float[np.ndarray, "step"], y: Float[np.ndarray, "step"], most: int = 400) -> Series:
    """At most about ``most`` points that look the same: of each stretch of steps the lowest and the highest."""
    if len(x) <= most:
        return x, y
    stretches = np.array_split(np.arange(len(x)), most // 2)
    kept = {i for part in stretches for i in (part[np.argmin(y[part])], part[np.argmax(y[part])])}
    index = np.array(sorted(kept | {0, len(x) - 1}))
    return x[index], y[index]


def charts(panel: Panel, groups: Groups) -> list[Chart]:
    """The charts of a panel: of one group all series in one chart; of several groups a chart for each series, with
    equal vertical axes unless these would span more than `SHARED` decades. What no run has is left out."""
    runs = [metrics for group in groups.values() for metrics in group]
    present = [name for name in panel.series if any(len(finite_series(metrics, name)[0]) for metrics in runs)]
    if not present:
        return []
    highest = max(finite_series(m, name)[1].max(initial=-np.inf) for m in runs for name in present)
    log = panel.log and highest > 0
    x_end = 1.02 * max((finite_series(m, X)[0].max(initial=1.0) for m in runs), default=1.0)
    if len(groups) == 1:
        (group,) = groups.values()
        looks = {name: look for look, name in enumerate(panel.series)}
        curves = [_curve(panel.series[name], looks[name], group, name, log) for name in present]
        limits = y_limits([values for curve in curves for values in _shown(curve)], log, room=1.2)
        return [
            Chart(
                panel.title,
                "",
                panel.unit,
                log,
                _noted(curves, limits),
                x_end,
                limits,
                tuple(present),
                len(panel.series) > 1,
            )
        ]
    compared = {
        name: [
            _curve(label, i, group, name, log, i)
            for i, (label, group) in enumerate(groups.items())
            if any(len(finite_series(metrics, name)[0]) for metrics in group)
        ]
        for name in present
    }
    axes = {name: y_limits([curve.seeds.drawn for curve in compared[name]], log, room=1.06) for name in present}
    bottom, top = min(low for low, _ in axes.values()), max(high for _, high in axes.values())
    if not log or top < bottom * 10.0**SHARED:
        axes = dict.fromkeys(present, (bottom, top))
    titles = panel.series if len(panel.series) > 1 else dict.fromkeys(panel.series, "")
    drawn = {name: _noted(compared[name], axes[name]) for name in present}
    return [
        Chart(panel.title, titles[name], panel.unit, log, drawn[name], x_end, axes[name], (name,), False)
        for name in present
    ]


def _noted(curves: list[Curve], limits: tuple[float, float]) -> list[Curve]:
    """The curves, with a note at those that lie below the axis."""
    return [
        curve._replace(note=f" (below {limits[0]:.1g})")
        if len(curve.seeds.drawn) and curve.seeds.drawn.max() < limits[0]
        else curve
        for curve in curves
    ]


def _curve(label: str, look: int, group: Sequence[Metrics], name: str, log: bool, number: int | None = None) -> Curve:
    series = [finite_series(metrics, name, log) for metrics in group]
    zero = not any(finite_series(metrics, name)[1].any() for metrics in group)
    raw = series[0] if number is None and len(group) == 1 and len(series[0][0]) > MARKED else None
    return Curve(label, look, over_seeds(series, log), raw, number, " (0 throughout)" if zero else "")


def _shown(curve: Curve) -> list[np.ndarray]:
    return [curve.seeds.drawn, *([curve.raw[1]] if curve.raw else [])]


def y_limits(values: Sequence[Float[np.ndarray, "point"]], log: bool, room: float) -> tuple[float, float]:
    """Limits of a vertical axis that shows ``values``: with 0 and ``room`` above; or, on a logarithmic one, from the
    lowest, but at most `BELOW` decades below the median."""
    together = np.concatenate(list(values)) if values else np.zeros(0)
    if not len(together):
        return (0.1, 1.0) if log else (0.0, 1.0)
    lowest, highest = float(together.min()), float(together.max())
    if log:
        bottom = max(lowest, float(np.median(together)) * 10.0**-BELOW)
        margin = max((highest / bottom) ** 0.06, 1.1)
        return bottom / margin, highest * margin
    return min(0.0, 1.06 * lowest), max(0.0, room * highest) or (1.0 if lowest == 0 else 0.0)
