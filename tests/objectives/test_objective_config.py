"""Objectives from a config: every recipe, overridden numbers, errors, one's own function, and no second trace."""

import functools
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from ragged import gradient, ragged

from rlstab_jax import objectives as o
from rlstab_jax.objectives import Objective, ObjectiveConfig, Regulariser, build, fit, piece, regularisers
from rlstab_jax.objectives.config import RecipeName
from rlstab_jax.types import Scores, UserError

NAMES = get_args(RecipeName)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_the_recipe(name: str) -> None:
    built, recipe = build(ObjectiveConfig(name)), getattr(o, name)()
    assert jax.tree.structure(built) == jax.tree.structure(recipe)
    assert jax.tree.leaves(built) == jax.tree.leaves(recipe)
    fit.check(built)
    assert fit.reads(built, "router") == (name == "rspo")
    assert not fit.reads(built, "reference")


def test_a_recipe_of_ones_own_has_a_reference_if_it_reads_one() -> None:
    """By its own regulariser, without the config's KL."""

    def with_kl() -> Objective:
        return replace(o.minirl(), regularisers=(Regulariser(piece(regularisers.k3), 0.01),))

    assert ObjectiveConfig(recipe=with_kl).needs_reference
    assert not ObjectiveConfig(recipe=o.minirl).needs_reference


def unfinished() -> Objective:
    return piece(regularisers.k3)


def one_penalty() -> Objective:
    return replace(o.minirl(), regularisers=Regulariser(piece(regularisers.k3), 0.1))


def bare_penalty() -> Objective:
    return replace(o.minirl(), regularisers=(piece(regularisers.k3),))


class Recipe:
    def __call__(self) -> Objective:
        return o.minirl()


def needs_a_number(slope: float) -> Objective:
    return o.minirl(cap=slope)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ObjectiveConfig("grpo", recipe=o.minirl),
            "objective.name = 'grpo', but .* a recipe of its own, minirl",
        ),
        (ObjectiveConfig(recipe=needs_a_number), "needs_a_number cannot be called: .*slope"),
        (ObjectiveConfig(recipe=unfinished), "unfinished returned .*, expected an Objective"),
        (ObjectiveConfig(recipe="grpo"), "objective.recipe is 'grpo'"),
        (
            ObjectiveConfig(recipe=o.minirl()),
            "objective.recipe is an Objective: expected the function that returns one",
        ),
        (ObjectiveConfig(recipe=Recipe()), "objective.recipe is .*Recipe.*: expected the function"),
        (ObjectiveConfig(recipe=one_penalty), "regularisers is Regulariser, expected a tuple"),
        (ObjectiveConfig(recipe=bare_penalty), r"regularisers is \['Partial'\], expected a tuple"),
    ],
)
def test_a_recipe_that_makes_no_objective_is_refused(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(config)


def by_group(scores: Scores, *_: jax.Array) -> jax.Array:
    return jnp.ones_like(scores.target) * jax.ops.segment_sum(jnp.ones(len(scores.target)), scores.groups)[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"reward": piece(lambda scores, rewards: rewards - scores.entropy.sum(1))},  # that of pi_theta
        {"trust": piece(by_group)},  # a part of a mini-batch has parts of groups
    ],
)
def test_a_piece_that_reads_what_no_run_has_there_is_refused(changed: dict) -> None:
    with pytest.raises(UserError, match="objective: it does not run on a batch"):
        fit.check(replace(o.minirl(), **changed))


def three_rows(rewards: jax.Array, groups: jax.Array) -> jax.Array:
    return rewards + jnp.arange(3)


def test_what_an_own_piece_does_wrong_is_found_before_any_work_and_placed() -> None:
    """And a batch is of a size that none would name, but of whole groups."""
    here = r"it does not run on a batch, tried on 322560 .* 11 tokens \(test_objective_config\.py, line \d+\): "
    with pytest.raises(UserError, match=here):
        fit.check(replace(o.minirl(), advantage=piece(three_rows)))
    with pytest.raises(UserError, match=r"trust is by_group, expected .* in a piece: trust=piece\(by_group\)"):
        fit.check(replace(o.minirl(), trust=by_group))
    with pytest.raises(UserError, match=r"objective: term is by_group, expected a function in a piece"):
        fit.check(replace(o.minirl(), regularisers=(Regulariser(by_group, 0.1),)))
    with pytest.raises(UserError, match="objective: weight is given the text '5', expected numbers and functions"):
        fit.check(replace(o.minirl(), weight=piece(three_rows, cap="5")))
    fit.check(replace(o.minirl(), advantage=piece(lambda r, g: r - r.reshape(-1, 16).mean(1).repeat(16))))


@pytest.mark.parametrize(
    ("name", "function", "returned"),
    [
        ("weight", lambda scores: jnp.exp(scores.target - scores.rollout).sum(0), "R"),  # would mix responses
        ("weight", lambda scores: jnp.exp(scores.target - scores.rollout).sum(1), "batch"),
        ("normalise", lambda mask, groups: 1 / mask.sum(0), "R"),
        ("trust", lambda scores, advantage: 0.5, ""),
        ("advantage", lambda rewards, groups: rewards.mean(), ""),
        ("reward", lambda scores, rewards: rewards[:, None], "batch, 1"),
    ],
)
def test_a_piece_of_another_shape_is_named(name: str, function: Any, returned: str) -> None:
    with pytest.raises(UserError, match=rf"objective: {name} returned an array \[{returned}\], expected \[batch"):
        fit.check(replace(o.minirl(), **{name: piece(function)}))


def test_a_sequence_has_one_weight_and_one_gate() -> None:
    ones = {"weight": lambda s: jnp.full((len(s.target), 1), 2.0), "trust": lambda s, a: jnp.full((len(a), 1), 0.5)}
    whole = replace(
        o.minirl(),
        **{name: piece(function) for name, function in ones.items()},
        truncate=piece(o.truncation.cap, at=9.0),
    )
    fit.check(whole)


def test_a_recipe_may_take_any_number() -> None:
    def mine(**numbers: float) -> Objective:
        return o.minirl(**numbers)

    assert build(ObjectiveConfig(recipe=mine, eps_high=0.5)).trust.keywords["eps_high"] == 0.5
    with pytest.raises(UserError, match="mine cannot be called: TypeError"):
        build(ObjectiveConfig(recipe=mine, delta=0.5))


def test_the_command_line_overrides_numbers() -> None:
    arguments = ["--eps-high", "0.4", "--cap-on", "discrepancy", "--length-normalise", "True"]
    config = tyro.cli(ObjectiveConfig, args=arguments, default=ObjectiveConfig("minirl", cap=3.0))
    assert config == ObjectiveConfig("minirl", cap=3.0, eps_high=0.4, cap_on="discrepancy", length_normalise=True)
    assert build(config).trust.keywords["eps_high"] == 0.4


def test_numbers_that_the_recipe_does_not_take_are_errors() -> None:
    with pytest.raises(UserError, match=r"objective\.delta: minirl .*cap, cap_on, eps_high"):
        build(ObjectiveConfig("minirl", delta=0.1))
    with pytest.raises(UserError, match="kl_estimator"):
        build(ObjectiveConfig("grpo", kl_estimator="k3"))
    with pytest.raises(UserError, match="kl_coefficient"):
        build(ObjectiveConfig("grpo", kl_in="reward"))


@pytest.mark.parametrize(
    ("name", "number", "value"),
    [("minirl", "cap", -1.0), ("minirl", "eps_low", -0.1), ("minirl", "eps_high", np.nan), ("dr_grpo", "length", 0.0),
     ("rspo", "floor", 0.0), ("grpo", "dual_clip", 0.5), ("grpo", "kl_coefficient", -0.1)],
)  # fmt: skip
def test_numbers_outside_their_range_are_errors(name: RecipeName, number: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"objective\.{number} = .*expected"):
        build(ObjectiveConfig(name, **{number: value}))


def test_a_clip_range_beyond_one_leaves_the_lower_side_open() -> None:
    scores, rewards = ragged(0)
    for eps_low in (1.0, np.inf):
        assert np.isfinite(gradient(build(ObjectiveConfig("rspo", eps_low=eps_low)), scores, rewards)).all()


def geometric_minirl(eps_low: float = 0.2, eps_high: float = 0.2, power: float = 1.0) -> Objective:
    """A loss of one's own, in under ten lines: MiniRL on the geometric ratio, with rejection."""
    ratio = piece(o.ratios.geometric, of=o.ratios.target_over_rollout)
    drift = piece(o.trust.largest_token_kl, of=o.ratios.old_over_rollout, at=power)
    return o.minirl().replace(
        weight=piece(o.weights.importance, of=ratio),
        trust=piece(o.trust.ppo_clip, of=ratio, eps_low=eps_low, eps_high=eps_high),
        select=piece(o.trust.passing, gate=drift),
    )


def squared(scores, advantage):
    """A gate of one's own: a plain function of the arrays."""
    return jnp.exp(-((scores.target - scores.old) ** 2))


def test_a_function_of_ones_own() -> None:
    scores, rewards = ragged(0)
    mine = ObjectiveConfig(recipe=functools.partial(geometric_minirl, power=0.5), eps_low=0.1)
    assert build(mine).trust.keywords["eps_low"] == 0.1
    assert np.isfinite(gradient(build(mine), scores, rewards)).all()
    soft = o.minirl(eps_low=np.inf, eps_high=np.inf)
    gate = np.exp(-(np.where(scores.mask, scores.target - scores.old, 0.0) ** 2))
    expected = gate * gradient(soft, scores, rewards)
    np.testing.assert_allclose(gradient(soft.replace(trust=piece(squared)), scores, rewards), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_changing_a_number_traces_nothing_again(name: str) -> None:
    scores, rewards = ragged(1)
    traces = 0

    @jax.jit
    def loss(objective, scores, rewards):
        nonlocal traces
        traces += 1
        c = o.coefficients(objective, scores)
        return o.surrogate(objective, scores, o.advantages_of(objective, scores, rewards), c)[0]

    first = build(ObjectiveConfig(name, kl_coefficient=0.1))
    inputs = jax.tree.map(jnp.asarray, (scores, rewards))
    loss(first, *inputs)
    loss(jax.tree.map(lambda number: number * 1.5, first), *inputs)
    loss(build(ObjectiveConfig(name, kl_coefficient=0.2)), *inputs)
    assert traces == 1
