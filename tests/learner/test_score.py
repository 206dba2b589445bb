"""The old pass: padding, slots, chunks of logits, the order of recorded experts change nothing (identities 5, 6)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from rlstab_jax.learner import PolicyScores, score
from rlstab_jax.types import Rollout, RoutingReplay, join_rows, split_rows, take_rows

MODEL = tiny.model(remat="full")
EXPERTS, VOCAB = tiny.MIXED.num_experts, tiny.MIXED.vocab_size
CLOSE = partial(np.testing.assert_allclose, atol=1e-5)


def variables() -> dict:
    return {"params": tiny.parameters()}


def assert_same_scores(first: PolicyScores, second: PolicyScores) -> None:
    CLOSE(first.log_probs, second.log_probs)
    CLOSE(first.entropy, second.entropy)
    np.testing.assert_array_equal(np.sort(first.routes, -1), np.sort(second.routes, -1))
    np.testing.assert_array_equal(np.sort(first.live, -1), np.sort(second.live, -1))


def with_padding_tokens(rollout: Rollout, seed: int) -> Rollout:
    noise = np.random.default_rng(seed).integers(0, VOCAB, rollout.tokens.shape)
    return dataclasses.replace(rollout, tokens=jnp.where(rollout.valid, rollout.tokens, noise))


def test_padding_tokens_of_any_value_change_nothing() -> None:
    rollout = tiny.rollout()
    first, statistics = score(MODEL, variables(), with_padding_tokens(rollout, 1))
    second, others = score(MODEL, variables(), with_padding_tokens(rollout, 2))
    jax.tree.map(np.testing.assert_array_equal, (first, statistics), (second, others))


def test_padding_loads_no_expert() -> None:
    """Each fed token loads k experts in each layer; prompts without a response token would feed one token less."""
    rollout = tiny.rollout()
    empty = np.arange(8) == 3  # one row of pure padding
    rollout = dataclasses.replace(
        rollout,
        prompt_mask=rollout.prompt_mask & ~empty[:, None],
        response_mask=rollout.response_mask & ~empty[:, None],
    )
    scores, statistics = score(MODEL, variables(), rollout)
    valid = np.asarray(rollout.valid)
    fed = np.array([max(row.sum() - 1, 0) for row in valid])  # a row of n tokens feeds n - 1
    load = np.asarray(statistics["routing/load"].total)
    np.testing.assert_array_equal(load.sum(1), fed.sum() * tiny.MIXED.experts_per_token)
    recorded = np.asarray(scores.routes) < EXPERTS
    np.testing.assert_array_equal(recorded.all(-1).sum((0, 2)), 2 * fed)
    np.testing.assert_array_equal(recorded.any(-1), recorded.all(-1))
    for layer, counts in enumerate(load):
        np.testing.assert_array_equal(np.bincount(np.asarray(scores.routes)[layer].ravel(), minlength=9)[:8], counts)
    for leaf in (scores.log_probs, scores.entropy):
        assert np.isfinite(leaf).all()
        assert (np.asarray(leaf)[3] == 0).all()
    whole, _ = score(MODEL, variables(), tiny.rollout())
    CLOSE(np.asarray(whole.log_probs)[~empty], np.asarray(scores.log_probs)[~empty])


def test_batch_slot_changes_nothing() -> None:
    rollout = tiny.rollout()
    order = np.random.default_rng(0).permutation(8)
    for replay in (RoutingReplay.LIVE, RoutingReplay.R3):
        first, _ = score(MODEL, variables(), rollout, replay=replay)
        second, _ = score(MODEL, variables(), take_rows(rollout, order), replay=replay)
        assert_same_scores(take_rows(first, order), second)


def test_padding_length_changes_nothing() -> None:
    rollout = tiny.rollout()
    left, right = 3, 2
    longer = dataclasses.replace(
        rollout,
        tokens=jnp.pad(rollout.tokens, ((0, 0), (left, right)), constant_values=4),
        prompt_mask=jnp.pad(rollout.prompt_mask, ((0, 0), (left, 0))),
        response_mask=jnp.pad(rollout.response_mask, ((0, 0), (0, right))),
        routes=jnp.pad(rollout.routes, ((0, 0), (0, 0), (left, right), (0, 0))),  # expert 0: padding must not be asked
    )
    for replay in (RoutingReplay.LIVE, RoutingReplay.R3):
        first, statistics = score(MODEL, variables(), rollout, replay=replay)
        second, others = score(MODEL, variables(), longer, replay=replay)
        columns = slice(left, -right)
        cut = PolicyScores(
            second.log_probs[:, :-right],
            second.entropy[:, :-right],
            second.routes[:, :, columns],
            second.live[:, :, columns],
            None,
        )
        assert_same_scores(first, cut)
        assert (np.asarray(second.log_probs)[:, -right:] == 0).all()
        np.testing.assert_array_equal(statistics["routing/load"].total, others["routing/load"].total)


def test_order_of_recorded_experts_changes_nothing() -> None:
    rollout = tiny.rollout()
    first, _ = score(MODEL, variables(), rollout, replay=RoutingReplay.R3)
    turned = dataclasses.replace(rollout, routes=rollout.routes[..., ::-1])
    second, _ = score(MODEL, variables(), turned, replay=RoutingReplay.R3)
    assert_same_scores(first, second)
    np.testing.assert_array_equal(second.routes, turned.routes)  # in use as they were recorded


def test_micro_batches_change_nothing() -> None:
    rollout = tiny.rollout()
    first, statistics = score(MODEL, variables(), rollout, replay=RoutingReplay.R3)
    second, others = score(MODEL, variables(), rollout, replay=RoutingReplay.R3, micro_batches=4)
    assert_same_scores(first, second)
    CLOSE(first.router, second.router)
    np.testing.assert_array_equal(statistics["routing/load"].total, others["routing/load"].total)
    for name in ("policy/entropy", "routing/margin"):
        np.testing.assert_allclose(statistics[name].value(), others[name].value(), rtol=1e-5)


def test_rows_split_and_join() -> None:
    rollout = tiny.rollout()
    parts = split_rows(rollout, 4)
    for part in range(4):
        rows = np.array([part, part + 4])
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda a, i=part: a[i], parts), take_rows(rollout, rows)
        )
    jax.tree.map(np.testing.assert_array_equal, join_rows(parts), rollout)


def test_one_trace_per_shape() -> None:
    before = score._cache_size()
    for temperature in (1.0, 0.5):
        rollout = tiny.rollout(temperature=temperature)
        score(MODEL, variables(), rollout, logits_per_chunk=12345)
        score(MODEL, {"params": tiny.parameters(seed=1)}, rollout, logits_per_chunk=12345)
    assert score._cache_size() == before + 1


def test_a_greedy_row_is_a_point_mass() -> None:
    """As its sampler records it; at a temperature of 0 the logits would be divided by it."""
    rollout = tiny.rollout()
    temperature = jnp.asarray(rollout.temperature).at[::2].set(0.0)
    greedy, statistics = score(
        tiny.model(), {"params": tiny.parameters()}, dataclasses.replace(rollout, temperature=temperature)
    )
    plain, _ = score(tiny.model(), {"params": tiny.parameters()}, rollout)
    for name in ("log_probs", "entropy"):
        assert not np.asarray(getattr(greedy, name))[::2].any()
        np.testing.assert_array_equal(np.asarray(getattr(greedy, name))[1::2], np.asarray(getattr(plain, name))[1::2])
    assert np.isfinite(statistics["policy/entropy"].value())
