"""From unreduced statistics to the metrics of a global step: the names of `metrics.METRICS`, the last reduction."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlstab_jax.learner import PolicyScores
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.stability.gaps import discrepancy
from rlstab_jax.stability.reduce import Mean, Statistics, merge, prefixed, values
from rlstab_jax.stability.routing import disagreement, load_max, tokens_differ
from rlstab_jax.types import Rollout


@partial(jax.jit, static_argnames="num_experts")
def rollout_statistics(rollout: Rollout, old: PolicyScores, live: PolicyScores | None, num_experts: int) -> Statistics:
    """The gap between mu_old and pi_old: ``discrepancy/*`` as trained on, ``discrepancy_live/*`` with live routes, if
    these were scored.

    ``routing/rollout_vs_old`` [layer] compares live choices: the sampler's own with pi_old's at each layer;
    ``routing/tokens_differ`` is the share of tokens of which they differ at some layer.
    """
    mask = rollout.response_mask
    statistics = prefixed("discrepancy", discrepancy(old.log_probs, rollout.log_probs, mask))
    if live is not None:
        statistics |= prefixed("discrepancy_live", discrepancy(live.log_probs, rollout.log_probs, mask))
    if rollout.routes is not None and old.live is not None:
        choices = rollout.routes, old.live, rollout.fed_mask, num_experts
        statistics["routing/rollout_vs_old"] = disagreement(*choices)
        statistics["routing/tokens_differ"] = tokens_differ(*choices)
    return statistics


@jax.jit
def decode_statistics(rollout: Rollout, rescored: Float[Array, "batch R"]) -> Statistics:
    """The gap between the log-probs that drove the draw and those of a scoring pass by the same engine."""
    return prefixed("discrepancy/decode_vs_score", discrepancy(rescored, rollout.log_probs, rollout.response_mask))


def rollout_metrics(statistics: Statistics) -> dict[str, float]:
    """Metrics of the sampling and scoring half of a step, from the statistics of `score` and `rollout_statistics`."""
    statistics = on_host(statistics)
    load = statistics.pop("routing/load", None)
    metrics = _with_layers(statistics)
    if load is not None:
        by_layer = np.asarray(load_max(load.total))
        metrics["routing/load_max"] = float(by_layer.max())
        metrics |= {_layer(i, "load_max"): float(x) for i, x in enumerate(by_layer)}
    return metrics


def update_metrics(updates: list[tuple[Statistics, dict[str, Float[Array, ""]]]]) -> dict[str, float]:
    """Metrics of a step's updates, from what each `update` returned: merged over all, and some of each."""
    updates = on_host(updates)
    merged = updates[0][0]
    for statistics, _ in updates[1:]:
        merged = merge(merged, statistics)
    metrics = _with_layers(merged)
    for number, (statistics, _) in enumerate(updates):
        staleness = {name: s for name, s in statistics.items() if name.startswith("staleness/")}
        metrics |= {f"staleness/minibatch_{number:02d}/{name[10:]}": x for name, x in values(staleness).items()}
        if "routing/old_vs_target" in statistics:
            mean = _over_layers(statistics["routing/old_vs_target"])
            metrics[f"routing/minibatch_{number:02d}/old_vs_target"] = float(mean.value())
    for name in ("learner/loss", "learner/grad_norm"):
        metrics[name] = float(np.mean([measures[name] for _, measures in updates]))
    if "learner/packed_rows" in updates[0][1]:
        metrics["learner/packed_rows"] = float(np.mean([measures["learner/packed_rows"] for _, measures in updates]))
    last = updates[-1][1]
    metrics |= {n: float(last[n]) for n in ("learner/learning_rate", "learner/loss_scale") if n in last}
    return metrics


@contextlib.contextmanager
def timed(name: str) -> Iterator[dict[str, float]]:
    """Wall-clock seconds of the block under ``time/<name>``, once it has ended. The block must wait for its results."""
    times: dict[str, float] = {}
    with jax.named_scope(name):
        start = time.perf_counter()
        yield times
        times[f"time/{name}"] = time.perf_counter() - start


def _with_layers(statistics: Statistics) -> dict[str, float]:
    """Scalars as they are; statistics per layer under ``routing/layer_NN/*``, and over all layers by their name."""
    metrics = {}
    for name, statistic in statistics.items():
        value = np.asarray(statistic.value())
        if value.ndim == 0:
            metrics[name] = float(value)
            continue
        metrics |= {_layer(i, name.removeprefix("routing/")): float(x) for i, x in enumerate(value)}
        metrics[name] = float(_over_layers(statistic).value())
    return metrics


def _over_layers(statistic: Mean) -> Mean:
    return Mean(jnp.sum(statistic.total), jnp.sum(statistic.weight))


def _layer(number: int, name: str) -> str:
    return f"routing/layer_{number:02d}/{name}"
