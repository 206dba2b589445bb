"""Each piece against a few lines of NumPy on random ragged batches (identity 8)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ROWS, ragged

from rlstab_jax.objectives import advantages, normalise, piece, ratios, truncation, trust, weights
from rlstab_jax.types import Scores, UserError

MANY = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 2**31)


def batch(seed: int, spread: float = 0.4) -> tuple[Scores, np.ndarray]:
    """A ragged batch as the pieces get it: 0, not NaN, outside the mask."""
    scores, rewards = ragged(seed, spread)
    clean = jax.tree.map(lambda x: np.nan_to_num(x).astype(np.float32) if x.dtype == np.float64 else x, scores)
    return clean, rewards


def per_row(scores: Scores, function) -> np.ndarray:
    """[batch, R] from a function of the indices of a row; 0 outside the mask."""
    result = np.zeros(scores.mask.shape)
    for i in range(ROWS):
        t = np.flatnonzero(scores.mask[i])
        result[i, t] = function(i, t)
    return result


@MANY
@given(seed=SEEDS)
def test_advantages(seed: int) -> None:
    scores, rewards = batch(seed)
    expected = {name: np.zeros(ROWS) for name in ("mean", "std", "others")}
    for i in range(ROWS):
        same = rewards[scores.groups == scores.groups[i]]
        others = (same.sum() - rewards[i]) / max(len(same) - 1, 1)
        expected["mean"][i] = rewards[i] - same.mean()
        expected["std"][i] = (rewards[i] - same.mean()) / (same.std() + 1e-6)
        expected["others"][i] = rewards[i] - others if len(same) > 1 else 0.0
    r, g = jnp.asarray(rewards, jnp.float32), jnp.asarray(scores.groups)
    close = partial(np.testing.assert_allclose, atol=2e-6)
    close(advantages.group_mean(r, g), expected["mean"])
    close(advantages.group_mean_std(r, g), expected["std"])
    close(advantages.leave_one_out(r, g), expected["others"])
    close(advantages.batch_normalised(r, g), expected["mean"] / (expected["mean"].std() + 1e-6))
    close(advantages.constant_baseline(r, g, baseline=0.5), rewards - 0.5)


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "batch_normalised"])
def test_a_reward_that_is_not_finite_spoils_its_own_group_alone(name: str) -> None:
    for value in (jnp.nan, jnp.inf):
        result = getattr(advantages, name)(jnp.array([value, 1.0, 1.0, 0.0]), jnp.array([0, 0, 2, 2]))
        assert not np.isfinite(result[:2]).any()
        assert result[2] == -result[3] > 0


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "batch_normalised"])
def test_equal_rewards_are_exactly_zero(name: str) -> None:
    rewards = jnp.full(6, 0.1, jnp.float32)
    result = getattr(advantages, name)(rewards, jnp.array([0, 0, 0, 3, 3, 5]))
    np.testing.assert_array_equal(result, 0.0)


@MANY
@given(seed=SEEDS)
def test_normalisations(seed: int) -> None:
    scores, _ = batch(seed)
    mask = scores.mask & (np.arange(ROWS) != seed % ROWS)[:, None]  # one rejected response
    length, groups = mask.sum(1), scores.groups
    live = [g for g in np.unique(groups) if length[groups == g].sum() > 0]
    size = np.array([np.sum(length[groups == g] > 0) for g in groups])
    tokens = np.array([length[groups == g].sum() for g in groups])
    responses, one = np.sum(length > 0), np.ones(ROWS)
    expected = {
        "response_mean": responses * one,
        "response_length_mean": responses * length,
        "group_length_mean": len(live) * size * length,
        "group_token_mean": len(live) * tokens,
        "token_mean": length.sum() * one,
        "constant_length": responses * one,
    }
    for name, denominator in expected.items():
        wanted = np.where(mask, 1 / np.maximum(denominator, 1)[:, None], 0.0)
        actual = getattr(normalise, name)(jnp.asarray(mask), jnp.asarray(groups))
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, err_msg=name)
    half = normalise.constant_length(jnp.asarray(mask), jnp.asarray(groups), length=2.0)
    np.testing.assert_allclose(half, np.where(mask, 0.5 / responses, 0.0), rtol=1e-6)


@MANY
@given(seed=SEEDS)
def test_log_ratios(seed: int) -> None:
    s, _ = batch(seed)
    d = np.where(s.mask, s.target - s.rollout, 0.0)
    of = ratios.target_over_rollout
    shift = np.abs(s.router_target - s.router_old).mean(-1)
    close = partial(np.testing.assert_allclose, atol=1e-5)
    close(of(s), d)
    close(ratios.target_over_old(s) + ratios.old_over_rollout(s), d)
    close(ratios.product(s, ratios.target_over_old, ratios.old_over_rollout), d)
    close(ratios.sequence(s, of)[:, 0], d.sum(1))
    close(ratios.geometric(s, of)[:, 0], d.sum(1) / s.mask.sum(1))
    close(ratios.prefix_minimum(s, of), per_row(s, lambda i, t: [d[i, k] + min(d[i, :k], default=0.0) for k in t]))
    close(ratios.clipped(s, of, 0.8, 1.2), np.clip(d, np.log(0.8), np.log(1.2)))
    close(ratios.router_shift(s, 0.9), np.where(s.mask, np.log(np.maximum(np.exp(-shift), 0.9)), 0.0))
    close(weights.importance(s, of), np.exp(d))
    close(weights.unweighted(s), 1.0)


@MANY
@given(seed=SEEDS)
def test_truncations(seed: int) -> None:
    s, _ = batch(seed)
    w, f = np.exp(s.target - s.rollout), np.exp(s.old - s.rollout)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    close(truncation.cap(s, w, 1.3), np.minimum(w, 1.3))
    close(truncation.cap_factor(s, w, ratios.old_over_rollout, 1.3), w / f * np.minimum(f, 1.3))
    close(truncation.clip(s, w, 0.2, 0.3), np.clip(w, 0.8, 1.3))
    kept = truncation.cap_factor(s, jnp.asarray(w), ratios.old_over_rollout, jnp.inf)
    np.testing.assert_array_equal(kept, jnp.asarray(w))  # bit for bit: nothing counts as truncated


@MANY
@given(seed=SEEDS)
def test_trust_regions(seed: int) -> None:
    s, rewards = batch(seed)
    a = np.broadcast_to((rewards - 0.4)[:, None], s.mask.shape).astype(np.float32)
    old, d = np.where(s.mask, s.target - s.old, 0.0), np.where(s.mask, s.target - s.rollout, 0.0)
    p, m = np.exp(s.target), np.exp(s.rollout)
    mean = d.sum(1, keepdims=True) / s.mask.sum(1, keepdims=True)
    with np.errstate(all="ignore"):
        kl = m * np.log(m / p) + (1 - m) * np.log((1 - m) / (1 - p))
    away = ((a > 0) & (p > m)) | ((a < 0) & (p < m))
    of, total = ratios.target_over_old, ratios.target_over_rollout

    def same(gate, stopped: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(gate)[s.mask], 1.0 - np.broadcast_to(stopped, s.mask.shape)[s.mask])

    clipped = ((a > 0) & (np.exp(old) > 1.27)) | ((a < 0) & (np.exp(old) < 0.8))
    same(trust.ppo_clip(s, a, of, 0.2, 0.27), clipped)
    same(trust.dual_clip(s, a, of, 1.1), (a < 0) & (np.exp(old) > 1.1))
    same(trust.band(s, a, total, 0.8, 1.2), (np.exp(d) < 0.8) | (np.exp(d) > 1.2))
    geometric = piece(ratios.geometric, of=total)
    same(trust.band(s, a, geometric, 0.9, 1.1), (np.exp(mean) < 0.9) | (np.exp(mean) > 1.1))
    same(trust.divergence_clip(s, a, trust.binary_tv, 0.05), away & (np.abs(p - m) > 0.05))
    same(trust.divergence_clip(s, a, trust.binary_kl, 0.01), away & (kl > 0.01))
    same(trust.largest_token_kl(s, a, total, 0.1), (np.exp(d) - 1 - d).max(1, keepdims=True) > 0.1)
    same(trust.negative_sequence_mask(s, a, total, 0.1), (a < 0) & (-mean > 0.1))
    band = piece(trust.band, of=total, low=0.8, high=1.2)
    both = trust.both(s, a, piece(trust.ppo_clip, of=of, eps_low=0.2, eps_high=0.27), band)
    same(both, clipped | (np.exp(d) < 0.8) | (np.exp(d) > 1.2))
    np.testing.assert_array_equal(trust.passing(s, band), s.mask & ~((np.exp(d) < 0.8) | (np.exp(d) > 1.2)))


def test_divergences_are_finite_for_a_certain_token() -> None:
    scores, _ = batch(0)
    certain = scores.replace(target=np.zeros_like(scores.target))
    assert np.isfinite(trust.binary_kl(certain)).all()


def test_router_shift_without_router_scores_is_a_user_error() -> None:
    scores, _ = batch(0)
    with pytest.raises(UserError, match="router_old"):
        ratios.router_shift(scores.replace(router_old=None), 0.5)
