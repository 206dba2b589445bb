"""What the KL terms do as losses, shown by enumerating the tokens of one prefix exactly, in float64."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.objectives import ObjectiveConfig, advantages_of, build, piece, regularisers, reinforce
from rlstab_jax.types import Scores, UserError

TOKENS = 5


def logits(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=TOKENS))


def expected_gradient(term, target: jax.Array, rollout: jax.Array, reference: jax.Array) -> np.ndarray:
    """d/d logits of sum_y mu(y) term(y): the expectation over samples of mu, which do not move with the logits."""

    def loss(target: jax.Array) -> jax.Array:
        # One row for each token that could be sampled.
        pi, mu, ref = (jax.nn.log_softmax(values)[:, None] for values in (target, rollout, reference))
        scores = Scores(pi, mu, mu, jnp.ones((TOKENS, 1), bool), jnp.arange(TOKENS), reference=ref)
        return jnp.sum(jax.nn.softmax(rollout) * term(scores)[:, 0])

    return np.asarray(jax.grad(loss)(target))


def kl(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softmax(first) * (jax.nn.log_softmax(first) - jax.nn.log_softmax(second)))


def test_on_policy_k1_is_nothing_k2_reverse_k3_forward() -> None:
    with jax.enable_x64(True):
        target, reference = logits(0), logits(1)
        reverse = np.asarray(jax.grad(kl)(target, reference))
        forward = np.asarray(jax.grad(kl, argnums=1)(reference, target))
        k1, k2, k3 = (
            expected_gradient(term, target, target, reference)
            for term in (regularisers.k1, regularisers.k2, regularisers.k3)
        )
        np.testing.assert_allclose(k1, 0.0, atol=1e-14)
        np.testing.assert_allclose(k2, reverse, atol=1e-14)
        np.testing.assert_allclose(k3, forward, atol=1e-14)


@pytest.mark.parametrize("d", [-30.0, -20.5, -19.5, 0.0, 19.5, 30.0])
def test_k3_pulls_towards_the_reference_however_far_it_is(d: float) -> None:
    def term(target: float) -> jax.Array:
        scores = Scores(*(jnp.full((1, 1), x) for x in (target, 0.0, 0.0, True)), jnp.zeros(1, int), jnp.zeros((1, 1)))
        return regularisers.k3(scores)[0, 0]

    value, gradient = jax.value_and_grad(term)(d)
    assert np.isfinite([value, gradient]).all()
    assert np.sign(gradient) == np.sign(d)


@pytest.mark.parametrize("term", [regularisers.k1, regularisers.k3])
def test_corrected_terms_have_the_reverse_kl_off_policy_too(term) -> None:
    with jax.enable_x64(True):
        target, rollout, reference = logits(0), logits(2), logits(1)
        reverse = np.asarray(jax.grad(kl)(target, reference))
        gradient = expected_gradient(piece(regularisers.corrected, term=term), target, rollout, reference)
        np.testing.assert_allclose(gradient, reverse, atol=1e-14)
        assert np.abs(expected_gradient(term, target, rollout, reference) - reverse).max() > 0.01


def test_kl_in_the_reward_is_the_sequence_sum() -> None:
    mask = jnp.array([[True, True, False], [True, False, False]])
    old, reference = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, 3.0, 3.0]]), jnp.full((2, 3), -1.0)
    scores = Scores(old, old, old, mask, jnp.array([0, 0]), reference=reference)
    objective = build(ObjectiveConfig("reinforce", kl_coefficient=0.1, kl_in="reward"))
    np.testing.assert_allclose(advantages_of(objective, scores, jnp.array([1.0, 0.0])), [1.1, -0.05], rtol=1e-6)


def doubled(scores: Scores, rewards: jax.Array) -> jax.Array:
    return 2 * rewards


def test_kl_in_the_reward_comes_after_what_a_recipe_makes_of_it() -> None:
    mask = jnp.array([[True, True, False], [True, False, False]])
    old = jnp.array([[-1.0, -2.0, 0.0], [-0.5, 3.0, 3.0]])
    scores = Scores(old, old, old, mask, jnp.array([0, 0]), reference=jnp.full((2, 3), -1.0))
    recipe = partial(replace, reinforce(), reward=piece(doubled))
    objective = build(ObjectiveConfig(recipe=recipe, kl_coefficient=0.1, kl_in="reward"))
    np.testing.assert_allclose(advantages_of(objective, scores, jnp.array([1.0, 0.0])), [2.1, -0.05], rtol=1e-6)


def test_estimators_by_their_names() -> None:
    def term(estimator: str) -> jax.tree_util.Partial:
        return build(ObjectiveConfig("grpo", kl_coefficient=0.1, kl_estimator=estimator)).regularisers[0].term

    for name in ("k1", "k2", "k3"):
        assert term(name).func is getattr(regularisers, name)
    for name in ("k1", "k3"):  # k2 needs no correction
        corrected = term(f"corrected_{name}")
        assert corrected.func is regularisers.corrected
        assert corrected.keywords["term"].func is getattr(regularisers, name)


def test_missing_arrays_are_user_errors() -> None:
    row = jnp.zeros((1, 2))
    scores = Scores(row, row, row, jnp.ones((1, 2), bool), jnp.zeros(1, int))
    with pytest.raises(UserError, match="reference"):
        regularisers.k2(scores)
    with pytest.raises(UserError, match="entropy"):
        regularisers.negative_entropy(scores)
