"""The old pass: padding, slots, chunks of logits, the order of recorded experts change nothing (identities 5, 6)."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.learner import PolicyScores, score
from rlstab_jax.learner.score import head_log_probs
from rlstab_jax.types import Rollout, RoutingReplay, split_rows, take_rows

MODEL = tiny.model(remat=True)
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


@pytest.mark.parametrize("truncated", [False, True])
def test_entropy_and_log_probs_by_hand(truncated: bool) -> None:
    """At each row's temperature, over its support where there is one, from the model's logits, in NumPy."""
    hidden = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    targets = np.array([0, 16, 3, 3, 8])
    temperature = np.float32([0.7, 0.7, 1.0, 0.5, 2.0])
    support = np.array([[0, 4, 17], [16, 17, 17], [2, 9, 3], [3, 1, 17], [5, 8, 17]]) if truncated else None
    log_probs, entropy = head_log_probs(
        MODEL, variables(), jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(temperature), support, 10**6
    )
    logits = hidden.astype(np.float64) @ np.asarray(tiny.parameters()["embedding"], np.float64).T
    logits /= temperature[:, None]
    if truncated:
        kept = (support[..., None] == np.arange(VOCAB)).any(1)
        logits = np.where(kept, logits, -1e30)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(log_probs, np.log(p[np.arange(5), targets]), atol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(1), atol=1e-5)


@pytest.mark.parametrize(("rows_per_chunk", "truncated"), [(1, False), (3, True), (5, False), (7, False)])
def test_chunks_of_logits_change_nothing(rows_per_chunk: int, truncated: bool) -> None:
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((7, 32)), jnp.float32)
    targets, temperature = jnp.arange(7), jnp.linspace(0.8, 1.2, 7)
    support = (targets[:, None] + jnp.arange(4)) % VOCAB

    @partial(jax.jit, static_argnums=2)
    def run(params: dict, hidden: jax.Array, logits: int) -> tuple:
        def loss(params: dict, hidden: jax.Array) -> tuple[jax.Array, tuple]:
            log_probs, entropy = head_log_probs(
                MODEL, {"params": params}, hidden, targets, temperature, support if truncated else None, logits
            )
            return jnp.sum(jnp.cos(targets) * log_probs + entropy), (log_probs, entropy)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)

    whole, parts = (run(tiny.parameters(), hidden, logits) for logits in (10**6, rows_per_chunk * VOCAB))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), whole, parts)


def shapes_in(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """The shape of every intermediate value, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from shapes_in(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("chunked", [True, False])
def test_batch_by_time_by_vocabulary_never_exists(chunked: bool) -> None:
    rollout = tiny.rollout()
    chunk = 4 * VOCAB if chunked else 2**24

    def loss(params: dict) -> jax.Array:
        return score(MODEL, {"params": params}, rollout, logits_per_chunk=chunk)[0].log_probs.sum()

    shapes = list(shapes_in(jax.make_jaxpr(jax.value_and_grad(loss))(tiny.parameters()).jaxpr))
    logits = [shape for shape in shapes if shape and shape[-1] == VOCAB and 32 not in shape]
    assert logits  # or the search is blind
    largest = max(int(np.prod(shape)) for shape in logits)
    assert largest == (chunk if chunked else 8 * tiny.RESPONSE * VOCAB)


def test_rows_split_and_join() -> None:
    rollout = tiny.rollout()
    parts = split_rows(rollout, 4)
    for part in range(4):
        rows = np.arange(2 * part, 2 * part + 2)
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda a, i=part: a[i], parts), take_rows(rollout, rows)
        )


def test_one_trace_per_shape() -> None:
    before = score._cache_size()
    for temperature in (1.0, 0.5):
        rollout = tiny.rollout(temperature=temperature)
        score(MODEL, variables(), rollout, logits_per_chunk=12345)
        score(MODEL, {"params": tiny.parameters(seed=1)}, rollout, logits_per_chunk=12345)
    assert score._cache_size() == before + 1
