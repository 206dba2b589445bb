"""Unreduced statistics: a sum with its weight, a maximum, an effective sample size.

Diagnostics return these, so that micro-batches, mini-batches and shards merge into the global value, never into a mean
of means; the division happens once, in `values`, at the very end.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from rlstab_jax.types import masked


@struct.dataclass
class Mean:
    """A weighted mean, kept as its sum and weight (of any equal shape, e.g. one per layer)."""

    total: Float[Array, "*shape"]
    weight: Float[Array, "*shape"]

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> np.ndarray:
        total, weight = np.asarray(self.total, np.float64), np.asarray(self.weight, np.float64)
        return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), math.nan)


@struct.dataclass
class Max:
    """A maximum; -inf when nothing was seen."""

    maximum: Float[Array, "*shape"]

    def merge(self, other: "Max") -> "Max":
        return Max(jnp.maximum(self.maximum, other.maximum))

    def value(self) -> np.ndarray:
        maximum = np.asarray(self.maximum, np.float64)
        return np.where(np.isneginf(maximum), math.nan, maximum)


@struct.dataclass
class EffectiveSampleSize:
    """(sum w)^2 / (n sum w^2), in (0, 1]: the share of the sample that a weighted mean really uses."""

    total: Float[Array, ""]
    squares: Float[Array, ""]
    count: Float[Array, ""]

    def merge(self, other: "EffectiveSampleSize") -> "EffectiveSampleSize":
        return jax.tree.map(jnp.add, self, other)

    def value(self) -> np.ndarray:
        total, squares, count = (np.asarray(x, np.float64) for x in (self.total, self.squares, self.count))
        denominator = count * squares
        return np.where(denominator > 0, total**2 / np.where(denominator > 0, denominator, 1.0), math.nan)


HISTOGRAM_BINS = 1024
_HISTOGRAM_SCALE, _HISTOGRAM_LIMIT = 1e-5, 20.0  # linear below the scale, logarithmic (3% wide) from there to the limit


@struct.dataclass
class LogRatioHistogram:
    """Counts of log-ratios in fixed bins, so that quantiles of micro-batches and shards merge exactly.

    The bins are uniform in asinh(log_ratio / 1e-5): a quantile is good to 3% of the log-ratio, or to 3e-7 nats near 0.
    What lies beyond +-20 nats falls into the last bins.
    """

    counts: Float[Array, "bin"]

    def merge(self, other: "LogRatioHistogram") -> "LogRatioHistogram":
        return LogRatioHistogram(self.counts + other.counts)

    def value(self) -> np.ndarray:
        return np.asarray(self.counts, np.float64)

    def quantile(self, level: float) -> float:
        """The log-ratio that a share ``level`` of the tokens lies below (or equals), in nats; NaN when nothing was
        seen.
        """
        cumulative = np.cumsum(self.value())
        if cumulative[-1] == 0:
            return math.nan
        index = int(np.searchsorted(cumulative, max(level * cumulative[-1], 0.5)))
        position = (index + 0.5) / HISTOGRAM_BINS * 2 - 1
        return float(np.sinh(position * np.arcsinh(_HISTOGRAM_LIMIT / _HISTOGRAM_SCALE)) * _HISTOGRAM_SCALE)


Statistic = Mean | Max | EffectiveSampleSize | LogRatioHistogram
Statistics = dict[str, Any]  # metric name -> Statistic


def prefixed(prefix: str, statistics: Statistics) -> Statistics:
    """The same under ``prefix/name``."""
    return {f"{prefix}/{name}": statistic for name, statistic in statistics.items()}


def mean_of(values: jax.Array, mask: Bool[Array, "*shape"], axis: Any = None) -> Mean:
    """The mean of ``values`` where ``mask``, over ``axis`` (all axes by default)."""
    values = masked(jnp.asarray(values, jnp.float32), mask)
    return Mean(values.sum(axis), jnp.broadcast_to(mask, values.shape).sum(axis).astype(jnp.float32))


def max_of(values: jax.Array, mask: Bool[Array, "*shape"], axis: Any = None) -> Max:
    """The maximum of ``values`` where ``mask``, over ``axis`` (all axes by default)."""
    return Max(jnp.where(mask, jnp.asarray(values, jnp.float32), -jnp.inf).max(axis))


def ess_of(weights: jax.Array, mask: Bool[Array, "*shape"]) -> EffectiveSampleSize:
    """The effective sample size of ``weights`` where ``mask``."""
    kept = masked(jnp.asarray(weights, jnp.float32), mask)
    return EffectiveSampleSize(kept.sum(), (kept**2).sum(), mask.sum().astype(jnp.float32))


def histogram_of(log_ratios: jax.Array, mask: Bool[Array, "*shape"]) -> LogRatioHistogram:
    """The histogram of ``log_ratios`` where ``mask``."""
    scaled = jnp.asarray(masked(log_ratios, mask), jnp.float32) / _HISTOGRAM_SCALE
    position = jnp.arcsinh(scaled) / np.arcsinh(_HISTOGRAM_LIMIT / _HISTOGRAM_SCALE)
    bins = jnp.clip((position + 1) / 2 * HISTOGRAM_BINS, 0, HISTOGRAM_BINS - 1).astype(jnp.int32)
    return LogRatioHistogram(jnp.zeros(HISTOGRAM_BINS, jnp.float32).at[bins].add(mask.astype(jnp.float32)))


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Merges two dictionaries of statistics with equal keys. Works under jit, e.g. as a scan's carry."""
    return {name: statistic.merge(second[name]) for name, statistic in first.items()}


def values(statistics: Mapping[str, Statistic]) -> dict[str, float]:
    """The last reduction, on the host: scalars become floats. Raises TypeError on a statistic that is no scalar."""
    return {name: float(statistic.value()) for name, statistic in statistics.items()}
