"""One draw: what may be drawn, with what probability, and that it depends on key and position alone (identity 6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference.sampling import COLDEST, draw


def drawn(logits: jax.Array, position: int = 0, support: int = 0, keys: jax.Array | None = None, **changes: object):
    """One draw a row, with the sampling's numbers changed."""
    rows = len(logits)
    keys = jax.random.split(jax.random.key(0), rows) if keys is None else keys
    sampling = tiny.sampling(**{"stop_ids": np.zeros(0, np.int32)} | changes).per_row(rows)
    return draw(jnp.asarray(logits), keys, jnp.full(rows, position), sampling, support)


def test_a_draw_depends_on_its_key_and_position_alone() -> None:
    logits = jnp.zeros((4, 1000))
    keys = tiny.keys()[:4]
    first = drawn(logits, 3, keys=keys).token
    np.testing.assert_array_equal(drawn(logits[::-1], 3, keys=keys[::-1]).token[::-1], first)
    assert (drawn(logits, 4, keys=keys).token != first).all()


def kept_by_hand(p: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    mass = np.cumsum(p[kept] / p[kept].sum())
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1]
    return kept[p[kept] >= min_p * p.max()]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1, 0), (1, 1, 0), (3, 1, 0), (0, 0.5, 0), (5, 0.7, 0), (9, 1e-6, 0), (0, 1, 0.3), (6, 0.9, 0.2)],
)
def test_support_and_log_probs_under_truncation(top_k: int, top_p: float, min_p: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((200, 11)).astype(np.float32) * 2
    temperature = 0.8
    draws = drawn(logits, support=11, temperature=np.float32(temperature), top_k=top_k, top_p=top_p, min_p=min_p)
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum(1, keepdims=True)
    for row in range(200):
        kept = kept_by_hand(p[row], top_k, top_p, min_p)
        np.testing.assert_array_equal(draws.support[row], [*kept, *[11] * (11 - len(kept))])
        token = draws.token[row]
        assert token in kept
        np.testing.assert_allclose(draws.log_prob[row], np.log(p[row, token] / p[row, kept].sum()), atol=1e-5)


def test_the_support_is_bounded_and_numbers_differ_by_row() -> None:
    """A bound of 3 cuts what top-p would keep, whose mass is still the whole vocabulary's."""
    p = np.array([[0.4, 0.3, 0.2, 0.1]] * 4)
    draws = drawn(
        np.log(p), support=3, top_p=np.float32([1.0, 0.65, 0.75, 0.3]), top_k=np.int32([0, 0, 2, 0]), min_p=0.0
    )
    np.testing.assert_array_equal(draws.support, [[0, 1, 2], [0, 1, 4], [0, 1, 4], [0, 4, 4]])


def test_ties_are_broken_by_the_smaller_id() -> None:
    np.testing.assert_array_equal(drawn([[2.0, 1.0, 1.0, 0.0]], support=4, top_k=2).support, [[0, 1, 4, 4]])


def test_no_stop_token_comes_too_early() -> None:
    logits = np.log([[0.9, 0.06, 0.04]] * 2000)
    stops = {"stop_ids": np.array([0], np.int32), "min_new_tokens": 3}
    for support in (0, 3):
        early, late = (drawn(logits, position, support, **stops) for position in (2, 3))
        assert set(np.asarray(early.token)) == {1, 2}
        np.testing.assert_allclose(np.exp(early.log_prob), np.where(early.token == 1, 0.6, 0.4), atol=1e-6)
        assert set(np.asarray(late.token)) == {0, 1, 2}
        if support:
            np.testing.assert_array_equal(early.support, [[1, 2, 3]] * 2000)


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    tokens = drawn(jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (20_000, 4))).token
    shares = np.bincount(np.asarray(tokens), minlength=4) / 20_000
    assert (np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / 20_000)).all()


@pytest.mark.parametrize(("support", "kept"), [(0, 4), (4, 3)])
def test_draws_follow_a_mixture_with_a_uniform_distribution(support: int, kept: int) -> None:
    """Uniform over the tokens that are left; where its share is 0 the draw is that without a mixture, bit for bit."""
    n, p = 20_000, np.array([0.6, 0.25, 0.1, 0.05])
    uniform = np.float32([0.4, 0.0]).repeat(n)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (2 * n, 4))
    draws = drawn(logits, support=support, top_k=kept, uniform=uniform)
    p = np.where(np.arange(4) < kept, p, 0) / p[:kept].sum()
    mixture = 0.6 * p + 0.4 / kept * (p > 0)
    tokens = np.asarray(draws.token[:n])
    np.testing.assert_allclose(draws.log_prob[:n], np.log(mixture[tokens]), atol=1e-6)
    shares = np.bincount(tokens, minlength=4) / n
    assert (np.abs(shares - mixture) <= 4 * np.sqrt(mixture * (1 - mixture) / n)).all()
    without = drawn(logits, support=support, top_k=kept)
    for name in ("token", "log_prob", *(["support"] if support else [])):
        np.testing.assert_array_equal(getattr(draws, name)[n:], getattr(without, name)[n:], err_msg=name)


@pytest.mark.parametrize("support", [0, 4])
def test_greedy_is_a_point_mass(support: int) -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)), jnp.float32)
    draws = drawn(logits, support=support, temperature=0.0, uniform=0.5)
    np.testing.assert_array_equal(draws.token, np.argmax(logits, 1))
    assert (np.asarray(draws.log_prob) == 0).all()


@pytest.mark.optimised  # here XLA divides twice, with results that differ in the last bit
def test_the_coldest_log_probs_are_finite() -> None:
    """Rows and vocabularies of sizes at which they are not at 1e-9."""
    compiled = jax.jit(draw, static_argnames="support")
    for rows, vocab in ((64, 31), (256, 128)):
        logits = 50 * np.random.default_rng(0).choice(np.float32([-1, 1]), (rows, vocab))
        keys, sampling = jax.random.split(jax.random.key(0), rows), tiny.sampling(temperature=COLDEST)
        sampling.validate(rows)
        draws = compiled(logits, keys, jnp.zeros(rows, int), sampling.per_row(rows), support=0)
        np.testing.assert_allclose(draws.log_prob, -np.log((logits > 0).sum(1)), atol=1e-5)
