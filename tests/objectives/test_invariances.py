"""What every recipe must not depend on, and what must never reach the parameters."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import LENGTH, ROWS, gradient, loss_and_gradient, ragged

from rlstab_jax import objectives as o
from rlstab_jax.objectives import ObjectiveConfig, advantages_of, build, coefficients, surrogate
from rlstab_jax.objectives.config import RecipeName
from rlstab_jax.types import UserError

NAMES = get_args(RecipeName)
# With every regulariser, so that they obey the same invariances.
RECIPES = {name: build(ObjectiveConfig(name, kl_coefficient=0.1, entropy_coefficient=0.01)) for name in NAMES}
every_recipe = pytest.mark.parametrize("objective", RECIPES.values(), ids=RECIPES.keys())
close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)


@every_recipe
def test_padding(objective) -> None:
    """More columns, and rows without a token, change nothing."""
    scores, rewards = ragged(3)

    def pad(x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:
            return np.concatenate([x, [ROWS, ROWS + 1]])  # two rows of groups of their own
        fill = False if x.dtype == bool else np.nan
        return np.pad(x, ((0, 2), (0, 3), *((0, 0),) * (x.ndim - 2)), constant_values=fill)

    padded = gradient(objective, jax.tree.map(pad, scores), np.concatenate([rewards, [0.0, 1.0]]))
    close(padded[:ROWS, :LENGTH], gradient(objective, scores, rewards))
    np.testing.assert_array_equal(padded[ROWS:], 0.0)
    np.testing.assert_array_equal(padded[:, LENGTH:], 0.0)


@every_recipe
def test_order_of_rows(objective) -> None:
    scores, rewards = ragged(4)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = gradient(objective, jax.tree.map(lambda x: x[order], scores), rewards[order])
    close(shuffled, gradient(objective, scores, rewards)[order])


@every_recipe
def test_micro_batches_add_up(objective) -> None:
    scores, rewards = ragged(5)
    whole = gradient(objective, scores, rewards)
    with jax.enable_x64(True):
        scores, rewards = jax.tree.map(jnp.asarray, (scores, rewards))
        advantage, c = advantages_of(objective, scores, rewards), coefficients(objective, scores)

        def loss(target, s, a, c):
            return surrogate(objective, s.replace(target=target), a, c)[0]

        parts = []
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            part = jax.tree.map(lambda x, rows=rows: x[rows], scores)
            parts.append(jax.jit(jax.grad(loss))(part.target, part, advantage[rows], c[rows]))
        close(jnp.concatenate(parts), whole)


@every_recipe
def test_nothing_to_learn_from(objective) -> None:
    """All masked, or (without regularisers) all rewards equal: a gradient of exactly zero."""
    scores, rewards = ragged(6)
    empty = scores.replace(mask=np.zeros_like(scores.mask))
    np.testing.assert_array_equal(gradient(objective, empty, rewards), 0.0)
    if objective is not RECIPES["reinforce"]:  # its baseline is a constant
        bare = objective.replace(regularisers=())
        np.testing.assert_array_equal(gradient(bare, scores, np.full(ROWS, 0.1)), 0.0)


@every_recipe
@pytest.mark.parametrize("field", ["target", "old", "rollout", "reference", "entropy", "router_target"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_log_probs_add_exactly_nothing(objective, field: str, value: float) -> None:
    scores, rewards = ragged(7)
    scores = scores.replace(
        mask=np.ones_like(scores.mask),
        **{
            name: np.nan_to_num(getattr(scores, name), nan=-1.0)
            for name in ("target", "old", "rollout", "reference", "entropy", "router_old", "router_target")
        },
    )
    broken = getattr(scores, field).copy()
    broken[(2, 1, 0) if field == "router_target" else (2, 1)] = value
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, (scores.replace(**{field: broken}), rewards))
        (loss, parts), result = jax.tree.map(np.asarray, loss_and_gradient(objective, *arguments))
    assert np.isfinite(loss)
    assert np.isfinite(result).all()
    assert result[2, 1] == 0.0
    assert np.argwhere(parts.broken).tolist() == [[2, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_reward_silences_its_group_only(value: float) -> None:
    scores, rewards = ragged(8)
    broken = rewards.copy()
    row = np.flatnonzero(scores.groups == 4)[0]
    broken[row] = value
    for name in ("minirl", "grpo", "rloo"):
        objective = RECIPES[name].replace(regularisers=())
        result, whole = gradient(objective, scores, broken), gradient(objective, scores, rewards)
        np.testing.assert_array_equal(result[scores.groups == 4], 0.0)
        close(result[scores.groups != 4], whole[scores.groups != 4])


@pytest.mark.parametrize("groups", [[10, 10, 11, 11], [0, 0, -1, -1]])
def test_groups_that_are_no_numbers_of_rows_are_refused(groups: list[int]) -> None:
    """Sums over segments would leave those rows out."""
    rewards, mask = np.float32([1, 0, 1, 0]), np.ones((4, 3), bool)
    for piece in (o.advantages.group_mean, o.advantages.leave_one_out):
        with pytest.raises(UserError, match=r"groups: (10|-1), expected numbers in \[0, 4\)"):
            piece(rewards, np.array(groups))
    with pytest.raises(UserError, match="groups: "):
        o.normalise.group_length_mean(mask, np.array(groups))


@pytest.mark.parametrize("name", ["gspo", "rspo"])
def test_on_policy_sequence_ratios_are_those_of_grpo(name: str) -> None:
    """With pi_theta = pi_old and unmoved routers, so that studies need not run them at N = 1."""
    scores, rewards = ragged(10)
    scores = scores.replace(target=scores.old, router_target=scores.router_old)
    expected = gradient(build(ObjectiveConfig("grpo")), scores, rewards)
    assert np.abs(expected).max() > 0.01
    close(gradient(build(ObjectiveConfig(name)), scores, rewards), expected)


def test_rejection_leaves_the_denominator_and_the_trust_region_does_not() -> None:
    scores, rewards = ragged(9)
    band = o.piece(o.trust.band, of=o.ratios.old_over_rollout, low=0.8, high=1.25)
    gated, selected = o.dapo().replace(trust=band), o.dapo().replace(select=o.piece(o.trust.passing, gate=band))
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, scores)
        stopped = np.asarray(coefficients(gated, inputs))
        rejected = np.asarray(coefficients(selected, inputs))
    inside = np.abs(np.where(scores.mask, scores.old - scores.rollout, 9.0)) <= np.log(1.25)
    close(stopped[scores.mask], 1 / scores.mask.sum())
    close(rejected[inside], 1 / inside.sum())
    assert 0 < inside.sum() < scores.mask.sum()
    np.testing.assert_array_equal(rejected[~inside], 0.0)
    assert np.isfinite(gradient(selected, scores, rewards)).all()
