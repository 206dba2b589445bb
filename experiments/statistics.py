"""What the studies say of their runs: outcomes, counts, survival, paired contrasts, power. Plain functions of arrays.

A *pair* is a cold start with a seed of its own; every cell of a study runs the same pairs, so a contrast of two cells
is an array of differences [pair]. Cold starts are drawn first and pairs within them (`resample`), since pairs of one
cold start resemble each other.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

LEVEL = 0.95
DRAWS = 10_000
LAST = 0.1  # share of the horizon over which a run's end is judged


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: ``kind`` is collapsed, degraded or learnt; ``onset`` the gradient step of the collapse, or NaN.

    Collapsed: a gradient that is not finite, or a held-out accuracy of 0 or below half its running maximum at every
    evaluation of the last 10% of the horizon, and at the last evaluation wherever that lies. Its onset is the first
    evaluation from which on it stays there. Degraded: not collapsed, and at the end at least 0.1 below the peak.
    """

    kind: str
    onset: float
    peak: float
    final: float


def outcome(
    steps: Float[np.ndarray, "evaluation"],
    accuracy: Float[np.ndarray, "evaluation"],
    horizon: float,
    broken: float = math.nan,
) -> Outcome:
    """The outcome of a run whose first gradient that is not finite came at step ``broken`` (NaN: never)."""
    peak, final = float(accuracy.max()), float(accuracy[-1])
    if math.isfinite(broken):
        return Outcome("collapsed", float(broken), peak, final)
    low = (accuracy < 0.5 * np.maximum.accumulate(accuracy)) | (accuracy == 0)
    if low[_at_the_end(steps, horizon)].all():
        begins = len(low) - int(np.argmin(low[::-1])) if not low.all() else 0
        return Outcome("collapsed", float(steps[begins]), peak, final)
    return Outcome("degraded" if final <= peak - 0.1 else "learnt", math.nan, peak, final)


def final_accuracy(
    steps: Float[np.ndarray, "evaluation"], accuracy: Float[np.ndarray, "evaluation"], horizon: float
) -> float:
    """The studies' endpoint: the mean over the evaluations of the last 10% of the horizon, or else the last one."""
    return float(accuracy[_at_the_end(steps, horizon)].mean())


def _at_the_end(steps: Float[np.ndarray, "evaluation"], horizon: float) -> Bool[np.ndarray, "evaluation"]:
    """Which evaluations a run's end is judged by: never none."""
    return (steps > (1 - LAST) * horizon) | (steps == steps[-1])


def clopper_pearson(count: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a probability of which ``count`` of ``total`` were seen.

    >>> low, high = clopper_pearson(0, 10)
    >>> low, round(high, 4)
    (0.0, 0.3085)
    """
    interval = stats.binomtest(count, total).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def kaplan_meier(
    times: Float[np.ndarray, "run"], collapsed: Bool[np.ndarray, "run"], level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs that have not collapsed, by time (Kaplan and Meier), with a log-log interval (Greenwood).

    Args:
      times: of the collapse; of the last observation where there was none (the run is censored there).

    Returns:
      Times from 0 on, and from each of them on the share, its lower and its upper bound. With no collapse so far, or
      none left, the interval has no width.
    """
    survival = stats.ecdf(stats.CensoredData.right_censored(times, ~collapsed)).sf
    moments, share = np.append(0.0, survival.quantiles), np.append(1.0, survival.probabilities)
    low, high = share.copy(), share.copy()
    inside = (share > 0) & (share < 1)
    if inside.any():
        with warnings.catch_warnings(action="ignore"):  # it has none where none or all have collapsed
            interval = survival.confidence_interval(level, method="log-log")
        low[inside] = np.append(1.0, interval.low.probabilities)[inside]
        high[inside] = np.append(1.0, interval.high.probabilities)[inside]
    return moments, share, low, high


def resample(
    values: Float[np.ndarray, "pair *rest"],
    cold_starts: Int[np.ndarray, "pair"],
    draws: int = DRAWS,
    seed: int = 0,
) -> Float[np.ndarray, "draw *rest"]:
    """Means of a hierarchical bootstrap: cold starts with replacement, then in each of them its pairs.

    Differences within pairs make it a paired one.
    """
    rng = np.random.default_rng(seed)
    names, sizes = np.unique(cold_starts, return_counts=True)
    rows = np.zeros((len(names), sizes.max()), int)  # of each cold start, filled up with zeros that are not counted
    for i, name in enumerate(names):
        rows[i, : sizes[i]] = np.flatnonzero(cold_starts == name)
    drawn = rng.integers(len(names), size=(draws, len(names), 1))
    within = (rng.random((draws, len(names), sizes.max())) * sizes[drawn]).astype(int)
    counted = (np.arange(sizes.max()) < sizes[drawn]).reshape(draws, -1)
    chosen = values[rows[drawn, within].reshape(draws, -1)]
    return np.einsum("dp,dp...->d...", counted / counted.sum(axis=1, keepdims=True), chosen)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of paired differences with what its bootstrap says of it; NaN where there is but one pair."""

    mean: float
    low: float
    """Of the 95% interval."""
    high: float
    p: float
    """Two-sided, against 0."""
    low90: float
    """Of the 90% interval, that of two one-sided tests at 5%."""
    high90: float
    pairs: int
    error: float = math.nan
    """Standard error of the mean, of a Student's t of so many ``degrees`` of freedom."""
    degrees: int = 0

    def equivalent(self, margin: float) -> bool:
        """Whether two one-sided tests at 5% say that the mean lies within +-margin."""
        return -margin < self.low90 and self.high90 < margin

    def p_beyond(self, margin: float) -> float:
        """Of two one-sided t tests together: that the mean lies at +-margin or beyond."""
        if self.error == 0:
            return float(abs(self.mean) >= margin)
        return float(stats.t.sf((margin - abs(self.mean)) / self.error, self.degrees))


def estimate(
    differences: Float[np.ndarray, "pair"], cold_starts: Int[np.ndarray, "pair"], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of paired differences by the hierarchical bootstrap.

    Percentile intervals are too narrow for few cold starts: they know nothing of Student's t, nor of n/(n - 1). Theirs
    are taken at levels that make up for both, as for n cold starts of equal pairs (expanded percentiles, Hesterberg,
    2015), and p is that of the t test with the bootstrap's standard error. Below 5 cold starts those levels lie beyond
    every mean of the bootstrap: the intervals are Student's then.
    """
    mean, pairs = float(differences.mean()), len(differences)
    units = len(np.unique(cold_starts))
    units = units if units > 1 else pairs
    if units < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, math.nan, pairs)
    means, widened = resample(differences, cold_starts, draws, seed), math.sqrt(units / (units - 1))
    error, critical = widened * means.std(), stats.t.isf([(1 - LEVEL) / 2, 0.05], units - 1)
    if units < 5:
        low, low90, high90, high = mean + error * np.array([-critical[0], -critical[1], critical[1], critical[0]])
    else:
        tails = stats.norm.sf(widened * critical)
        low, low90, high90, high = np.quantile(means, [tails[0], tails[1], 1 - tails[1], 1 - tails[0]])
    p = float(mean == 0) if error == 0 else 2 * stats.t.sf(abs(mean) / error, units - 1)
    return Estimate(mean, float(low), float(high), float(p), float(low90), float(high90), pairs, error, units - 1)


def slope(values: Float[np.ndarray, "pair level"], levels: Float[np.ndarray, "level"]) -> Float[np.ndarray, "pair"]:
    """Each pair's least-squares slope of its values against ``levels``: an interaction, where values are contrasts.

    >>> slope(np.array([[0.0, 1.0, 2.0]]), np.array([1.0, 2.0, 3.0])).tolist()
    [1.0]
    """
    centred = levels - levels.mean()
    return values @ centred / np.sum(centred**2)


def mcnemar(first: Bool[np.ndarray, "pair"], second: Bool[np.ndarray, "pair"]) -> float:
    """The exact two-sided p that two yes-or-no outcomes of the same pairs are equally frequent.

    >>> mcnemar(np.array([True] * 6), np.array([False] * 6))
    0.03125
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of a family, adjusted by Holm's step-down method.

    >>> [round(x, 10) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def power(pairs: int, effect: float, spread: float, alpha: float = 0.05) -> float:
    """The probability that a two-sided paired t test finds a mean difference of ``effect``.

    Args:
      spread: standard deviation of the differences.
    """
    degrees, shift = pairs - 1, effect / spread * math.sqrt(pairs)
    # t squared, whose law is F's: scipy's noncentral t is NaN for many of these numbers.
    return float(stats.ncf.sf(stats.t.ppf(1 - alpha / 2, degrees) ** 2, 1, degrees, shift**2))


def pairs_needed(effect: float, spread: float, target: float = 0.8, alpha: float = 0.05) -> int:
    """The fewest pairs with that power; see `power`."""
    return _smallest(lambda pairs: power(pairs, effect, spread, alpha) >= target)


def detectable(pairs: int, spread: float, target: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest effect that so many pairs find with that power, to 0.0005; see `power`."""
    return _smallest(lambda i: power(pairs, i * 5e-4, spread, alpha) >= target, 1) * 5e-4


def _smallest(enough: Callable[[int], bool], start: int = 2, limit: int = 100_000) -> int:
    """The smallest number from ``start`` on for which ``enough``, which is monotone, holds: by doubling, bisection."""
    high = start
    while not enough(high):
        if high > limit:
            raise ValueError(f"not reached with {limit}: the effect is too small for its spread")
        high *= 2
    low = start
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
