"""Diagnostics of the gaps against NumPy, on ragged batches with garbage outside the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlstab_jax.stability import exact, gaps
from rlstab_jax.stability.reduce import merge, values

MANY = settings(max_examples=12, deadline=None)
SEEDS = st.integers(0, 2**31)
ROWS, LENGTH, VOCAB = 6, 5, 7


def batch(seed: int) -> tuple[np.ndarray, ...]:
    """target, old, rollout, one more like them, and a ragged mask with an empty row; NaN and inf outside the mask."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH)[None] < random.integers(0, LENGTH + 1, ROWS)[:, None]
    mask[0], mask[1] = True, False
    garbage = random.choice([np.nan, np.inf, -np.inf, 7.0], (4, ROWS, LENGTH))
    arrays = np.where(mask, -random.exponential(1.0, (4, ROWS, LENGTH)), garbage).astype(np.float32)
    return (*arrays, mask)


def close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


@MANY
@given(seed=SEEDS)
def test_discrepancy_and_staleness(seed: int) -> None:
    target, old, rollout, _, mask = batch(seed)
    d = (old[mask] - rollout[mask]).astype(float)
    worst = np.exp(np.abs(d))
    kl = {"k1": -d.mean(), "k3": np.mean(np.exp(d) - 1 - d), "max_ratio": worst.max()}
    close(values(gaps.discrepancy(old, rollout, mask)), {**kl, "f2": np.mean(worst > 2)})
    close(values(gaps.staleness(old, rollout, mask)), kl)
    factors = gaps.ratio_factors(target, old, rollout, mask)
    np.testing.assert_allclose(factors["discrepancy_k3"].value(), kl["k3"], rtol=2e-4)
    np.testing.assert_allclose(
        factors["product_k1"].value(), -np.mean(target[mask] - rollout[mask]), rtol=2e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        factors["staleness_k1"].value(), -np.mean(target[mask] - old[mask]), rtol=2e-4, atol=1e-6
    )
    for level in (0.1, 0.5, 0.99):
        wanted = np.quantile(d, level, method="inverted_cdf")
        np.testing.assert_allclose(factors["discrepancy_log_ratio"].quantile(level), wanted, rtol=0.03, atol=1e-6)


@MANY
@given(seed=SEEDS)
def test_weights_and_trust(seed: int) -> None:
    target, old, _, _, mask = batch(seed)
    weight, truncated = np.exp(np.abs(target)), np.abs(old) > 1
    w = weight[mask].astype(float)
    ess = w.sum() ** 2 / (len(w) * np.sum(w**2))
    expected = {"mean": w.mean(), "max": w.max(), "ess": ess, "truncated": truncated[mask].mean()}
    close(values(gaps.weight_statistics(weight, truncated, mask)), expected)
    gate, advantage = np.where(truncated, 0.0, 1.0), np.array([1.0, 0.0, -1.0, 2.0, 0.0, -3.0])[:, None]
    stopped, sign = truncated[mask], np.broadcast_to(advantage, mask.shape)[mask]
    shares = {
        "masked": stopped.mean(),
        "masked_high": (stopped & (sign > 0)).mean(),
        "masked_low": (stopped & (sign < 0)).mean(),
    }
    close(values(gaps.trust_statistics(jnp.asarray(gate), jnp.asarray(advantage), mask)), shares)


@MANY
@given(seed=SEEDS)
def test_first_order_and_effective_sample(seed: int) -> None:
    target, _, rollout, _, mask = batch(seed)
    target[mask] = 0.9 * rollout[mask] + 0.1 * target[mask]
    sequence_gaps, token_gaps, products = [], [], []
    for i in range(ROWS):
        r = np.exp((target[i, mask[i]] - rollout[i, mask[i]]).astype(float))
        if len(r):
            sequence_gaps.append(abs(np.prod(r) - 1 - np.sum(r - 1)))
            token_gaps.extend(abs(np.prod(r) - r))
            products.append(np.prod(r))
    expected = {"sequence_gap": np.mean(sequence_gaps), "token_gap": np.mean(token_gaps)}
    close(values(gaps.first_order(target, rollout, mask)), expected)
    r, p = np.exp((target[mask] - rollout[mask]).astype(float)), np.array(products)
    expected = {
        "token_ess": r.mean() ** 2 / np.mean(r**2),
        "sequence_ess": p.mean() ** 2 / np.mean(p**2),
        "token_chi_square": np.mean((r - 1) ** 2),
        "sequence_chi_square": np.mean((p - 1) ** 2),
    }
    close(values(gaps.effective_sample(target, rollout, mask)), expected)


@MANY
@given(seed=SEEDS)
def test_routing_discrepancy_is_a_difference_of_kls(seed: int) -> None:
    live, replayed, rollout, _, mask = batch(seed)
    first, second = values(gaps.discrepancy(live, rollout, mask)), values(gaps.discrepancy(replayed, rollout, mask))
    difference = {name: first[name] - second[name] for name in ("k1", "k3")}
    close(values(gaps.routing_discrepancy(live, replayed, rollout, mask)), difference)


@MANY
@given(seed=SEEDS)
def test_parts_of_a_batch_merge_into_the_whole(seed: int) -> None:
    target, old, rollout, _, mask = batch(seed)

    def everything(rows: slice) -> dict:
        t, o, m, k = target[rows], old[rows], rollout[rows], mask[rows]
        return {
            **gaps.ratio_factors(t, o, m, k),
            **gaps.first_order(t, m, k),
            **gaps.effective_sample(t, m, k),
            **gaps.weight_statistics(jnp.exp(jnp.abs(t)), k, k),
        }

    whole, parts = everything(slice(0, 6)), merge(everything(slice(0, 2)), everything(slice(2, 6)))
    for name in whole:
        np.testing.assert_allclose(parts[name].value(), whole[name].value(), rtol=1e-5, atol=1e-7, err_msg=name)


def test_nothing_seen_is_nan_and_equal_engines_are_zero() -> None:
    _, old, rollout, _, mask = batch(0)
    empty = values(gaps.discrepancy(old, rollout, np.zeros_like(mask)))
    assert all(np.isnan(value) for value in empty.values())
    assert np.isnan(gaps.ratio_factors(old, old, rollout, np.zeros_like(mask))["product_log_ratio"].quantile(0.5))
    same = values(gaps.discrepancy(rollout, rollout, mask) | gaps.first_order(rollout, rollout, mask))
    assert same == {"k1": 0.0, "k3": 0.0, "max_ratio": 1.0, "f2": 0.0, "sequence_gap": 0.0, "token_gap": 0.0}


@pytest.mark.parametrize("low", [-np.inf, -1e4])
def test_extreme_log_probs_stay_finite(low: float) -> None:
    target, rollout, mask = (
        np.array([[low, -1.0]], np.float32),
        np.array([[-1.0, -1e4]], np.float32),
        np.ones((1, 2), bool),
    )
    for statistics in (gaps.discrepancy, gaps.first_order, gaps.effective_sample):
        assert all(np.isfinite(value) for value in values(statistics(target, rollout, mask)).values())


@MANY
@given(seed=SEEDS)
def test_exact_divergences_and_their_estimators(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((2, 3)) < 0.7
    mask[0, 0] = True
    old, rollout = (random.normal(size=(2, 3, VOCAB)).astype(np.float32) for _ in range(2))
    old[..., 0] = -np.inf  # e.g. a token that is never allowed
    rollout[..., 0] = -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        p, m = (np.exp(x)[mask] / np.exp(x)[mask].sum(-1, keepdims=True) for x in (old, rollout))
        p, m = p[:, 1:].astype(float), m[:, 1:].astype(float)
    expected = {
        "kl": np.mean(np.sum(m * np.log(m / p), -1)),
        "reverse_kl": np.mean(np.sum(p * np.log(p / m), -1)),
        "chi_square": np.mean(np.sum(p**2 / m, -1) - 1),
        "total_variation": np.mean(np.abs(p - m).sum(-1) / 2),
    }
    close(values(exact.divergences(old, rollout, mask)), expected)
    np.testing.assert_allclose(exact.entropy(old, mask).value(), np.mean(-np.sum(p * np.log(p), -1)), rtol=1e-4)


def test_estimators_agree_with_the_exact_kl() -> None:
    """On 40,000 tokens of one prefix, k1, k3 and chi-square lie within four standard errors of the exact values."""
    old, rollout = jax.random.normal(jax.random.key(0), (2, 1, 1, VOCAB))
    tokens = jax.random.categorical(jax.random.key(1), rollout[0, 0], shape=(1, 40_000))
    log_old, log_rollout = (jax.nn.log_softmax(x[0, 0])[tokens] for x in (old, rollout))
    mask = jnp.ones_like(tokens, bool)
    true = values(exact.divergences(old, rollout, jnp.ones((1, 1), bool)))
    estimated = values(gaps.discrepancy(log_old, log_rollout, mask))
    chi_square = values(gaps.effective_sample(log_old, log_rollout, mask))["token_chi_square"]
    d = np.asarray(log_old - log_rollout)
    for estimate, terms, truth in (
        (estimated["k1"], -d, true["kl"]),
        (estimated["k3"], np.expm1(d) - d, true["kl"]),
        (chi_square, np.expm1(d) ** 2, true["chi_square"]),
    ):
        assert abs(estimate - truth) < 4 * terms.std() / np.sqrt(d.size)
