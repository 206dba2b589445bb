"""PR2: routes are foretold by a predictor of each router, which learns what updates change (arXiv 2606.00395)."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.learner import Minibatch, PolicyScores, TrainState, init_state, plan, score, update
from rlstab_jax.learner.predictor import divergence, init_predictor, learn
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.models.layers import PREDICTOR
from rlstab_jax.types import RoutingReplay, UserError

CONFIG = tiny.MIXED  # two MoE layers, between dense ones
MODEL = tiny.model(CONFIG, remat="full")
PR2, ALL = RoutingReplay.PR2, tiny.PROMPT + tiny.RESPONSE - 1
LAYERS, EXPERTS, WIDTH = CONFIG.num_moe_layers, CONFIG.num_experts, CONFIG.embed_dim


@cache
def weights(scale: float = 0.1) -> dict:
    """Predictors that change about half of the routes."""
    generator = np.random.default_rng(5)
    zeros = init_predictor(tiny.parameters(CONFIG)).weights
    return jax.tree.map(lambda w: jnp.asarray(scale * generator.standard_normal(w.shape), jnp.float32), zeros)


def by_layer(tree: dict) -> np.ndarray:
    """[layer, d, E]"""
    return np.asarray(tree["segment_0"]["block_0"]["moe"]["predictor"])


@cache
def old_pass(scale: float = 0.1, tokens: int = ALL) -> PolicyScores:
    variables = {"params": tiny.parameters(CONFIG), PREDICTOR: weights(scale)}
    return score(MODEL, variables, tiny.rollout(), replay=PR2, observed_tokens=tokens)[0]


def minibatch(old: PolicyScores) -> Minibatch:
    return tiny.minibatch(tiny.rollout(), old, tiny.MINIRL)


def state(of: dict, **changes: Any) -> TrainState:
    params = jax.tree.map(jnp.copy, tiny.parameters(CONFIG))
    one = init_state(params, tiny.numbers(**changes), predictor=True)
    return dataclasses.replace(one, predictor=one.predictor.replace(weights=jax.tree.map(jnp.copy, of)))


def updated(old: PolicyScores, of: dict, teach: bool = True, **how: Any) -> tuple[TrainState, dict, dict]:
    numbers = tiny.numbers(predictor_rate=1e-2)
    return update(
        MODEL, state(of), minibatch(old), tiny.MINIRL, numbers, replay=PR2, teach=np.bool_(teach), **how
    )  # fmt: skip


def test_one_that_foretells_no_change_is_r2_bit_for_bit() -> None:
    live, _ = score(MODEL, {"params": tiny.parameters(CONFIG)}, tiny.rollout())
    same = dataclasses.replace(old_pass(0.0), observed=None)
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), same, live)


def test_routes_are_those_of_the_foretold_logits_and_gates_are_live() -> None:
    old, fed = old_pass(), np.asarray(tiny.rollout().fed_mask)
    valid = np.asarray(old.observed.valid)
    np.testing.assert_array_equal(valid.sum(1), fed.sum(1))
    rows, place = np.nonzero(valid)
    column = np.asarray(old.observed.columns)[rows, place]
    inputs = np.asarray(old.observed.inputs)[rows, place].reshape(-1, LAYERS, WIDTH)
    log_probs = np.asarray(old.observed.log_probs)[rows, place].reshape(-1, LAYERS, EXPERTS)
    foretold = log_probs + np.einsum("nld,lde->nle", inputs, by_layer(weights()))
    k = CONFIG.experts_per_token
    for layer in range(LAYERS):
        for routes, scores in ((old.routes, foretold), (old.live, log_probs)):
            best = np.argsort(-scores[:, layer], axis=-1)[:, :k]
            np.testing.assert_array_equal(np.asarray(routes)[layer, rows, column], best)
    assert (np.asarray(old.routes) != np.asarray(old.live))[:, fed].any(-1).mean() > 0.2
    # Gates are the router's own: the pass is the one that replays these routes.
    replayed, _ = policy_scores(MODEL, {"params": tiny.parameters(CONFIG)}, tiny.rollout(), old.routes, 2**20)
    np.testing.assert_allclose(old.log_probs, replayed.log_probs, atol=1e-6)


def test_the_policies_are_one_at_equal_weights() -> None:
    _, statistics, _ = updated(old_pass(), weights())
    assert float(statistics["staleness/max_ratio"].value()) == pytest.approx(1, abs=1e-5)
    assert float(statistics["routing/old_vs_target"].value().max()) == 0.0
    missed = (np.asarray(old_pass().routes) != np.asarray(old_pass().live)).any(-1)  # k = 2: sets may agree
    assert 0 < float(statistics["predictor/missed"].value()) <= missed[:, np.asarray(tiny.rollout().fed_mask)].mean()


def moved() -> dict:
    """Parameters after an update that changed the routers."""
    generator = np.random.default_rng(9)

    def of(path: tuple, leaf: jax.Array) -> jax.Array:
        router = any(getattr(entry, "key", "") == "router" for entry in path)
        return leaf + (0.3 * WIDTH**-0.5 * generator.standard_normal(leaf.shape) if router else 0)

    return jax.tree_util.tree_map_with_path(of, tiny.parameters(CONFIG))


def test_divergence_and_its_gradient_by_hand() -> None:
    old = old_pass()
    _, routing = policy_scores(MODEL, {"params": moved()}, tiny.rollout(), old.routes, 2**20)
    of = partial(divergence, observed=old.observed, scores=routing.scores)
    (total, statistics), gradient = jax.value_and_grad(of, has_aux=True)(weights())
    valid = np.asarray(old.observed.valid)
    rows, place = np.nonzero(valid)
    column = np.asarray(old.observed.columns)[rows, place]
    now = np.moveaxis(np.asarray(routing.scores, np.float64)[:, rows, column], 0, 1)
    inputs = np.asarray(old.observed.inputs, np.float64)[rows, place].reshape(-1, LAYERS, WIDTH)
    before = np.asarray(old.observed.log_probs, np.float64)[rows, place].reshape(-1, LAYERS, EXPERTS)
    foretold = before + np.einsum("nld,lde->nle", inputs, by_layer(weights()))
    foretold -= np.log(np.exp(foretold).sum(-1, keepdims=True))
    kl, unpredicted = ((np.exp(now) * (now - other)).sum(-1) for other in (foretold, before))
    np.testing.assert_allclose(total, kl.sum(), rtol=1e-5)
    np.testing.assert_allclose(statistics["predictor/kl"].value(), kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics["predictor/kl_unpredicted"].value(), unpredicted.mean(), rtol=1e-5)
    wanted = np.einsum("nld,nle->lde", inputs, np.exp(foretold) - np.exp(now))
    np.testing.assert_allclose(by_layer(gradient), wanted, atol=1e-4 * np.abs(wanted).max())


def test_only_the_predictors_learn_from_it_and_only_when_they_are_to() -> None:
    taught, _, with_lesson = updated(old_pass(), weights(), teach=True)
    untaught, _, without = updated(old_pass(), weights(), teach=False)
    jax.tree.map(np.testing.assert_array_equal, taught.params, untaught.params)
    assert float(with_lesson["learner/loss"]) == float(without["learner/loss"])
    jax.tree.map(np.testing.assert_array_equal, untaught.predictor.weights, weights())
    assert int(untaught.predictor.moments.count) == 0
    # Adam's first step is the rate against the gradient's sign.
    step = by_layer(taught.predictor.weights) - by_layer(weights())
    np.testing.assert_allclose(np.abs(step), 1e-2, rtol=1e-3)
    old = old_pass()
    _, routing = policy_scores(MODEL, {"params": tiny.parameters(CONFIG)}, tiny.rollout(), old.routes, 2**20)
    gradient = jax.grad(lambda w: divergence(w, old.observed, routing.scores)[0])(weights())
    clear = np.abs(by_layer(gradient)) > 1e-4
    np.testing.assert_array_equal(np.sign(step)[clear], -np.sign(by_layer(gradient))[clear])


def test_parts_and_packed_rows_teach_the_same() -> None:
    """Rows of different lengths, so that a mean of means would show."""
    old = old_pass()
    packing = plan(np.asarray(tiny.rollout().fed_mask), 2)
    ways: list[dict[str, Any]] = [{}, {"micro_batches": 4}, {"micro_batches": 2, "packing": packing}]
    whole, *others = (updated(old, weights(), **how) for how in ways)
    wanted = by_layer(whole[0].predictor.moments.mu)
    for state_, statistics, _ in others:
        np.testing.assert_allclose(by_layer(state_.predictor.moments.mu), wanted, atol=1e-5 * np.abs(wanted).max())
        for name in ("predictor/kl", "predictor/kl_unpredicted", "predictor/missed"):
            first = whole[1][name].value()
            np.testing.assert_allclose(statistics[name].value(), first, rtol=1e-4, atol=1e-7, err_msg=name)
    variables = {"params": tiny.parameters(CONFIG), PREDICTOR: weights()}
    packed, _ = score(
        MODEL, variables, tiny.rollout(), replay=PR2, observed_tokens=ALL, micro_batches=2, packing=packing
    )
    np.testing.assert_array_equal(packed.observed.columns, old.observed.columns)
    valid = np.asarray(old.observed.valid)
    for name in ("inputs", "log_probs"):
        np.testing.assert_allclose(
            np.asarray(getattr(packed.observed, name))[valid], np.asarray(getattr(old.observed, name))[valid], atol=1e-5
        )


def test_fewer_tokens_are_kept_of_long_rows() -> None:
    some, every = old_pass(tokens=4).observed, old_pass().observed
    count = np.asarray(tiny.rollout().fed_mask).sum(1)
    np.testing.assert_array_equal(np.asarray(some.valid).sum(1), np.minimum(count, 4))
    for row in range(len(count)):
        for place in range(min(count[row], 4)):
            (same,) = np.nonzero(np.asarray(every.columns)[row] == np.asarray(some.columns)[row, place])
            np.testing.assert_allclose(some.inputs[row, place], every.inputs[row, same[0]], atol=1e-5)


def test_what_an_update_changes_every_time_is_learnt() -> None:
    """The same change again and again: what is foretold comes near it, and most of the routes with it."""
    predictor, numbers = state(weights(0.0)).predictor, tiny.numbers(predictor_rate=2e-2)
    old = old_pass(0.0)
    _, routing = policy_scores(MODEL, {"params": moved()}, tiny.rollout(), old.routes, 2**20)

    @jax.jit
    def lesson(predictor: Any) -> tuple[Any, dict]:
        of = partial(divergence, observed=old.observed, scores=routing.scores)
        (_, statistics), gradient = jax.value_and_grad(of, has_aux=True)(predictor.weights)
        return learn(predictor, gradient, numbers, True), statistics

    for _ in range(60):
        predictor, statistics = lesson(predictor)
    assert statistics["predictor/kl"].value() < 0.1 * statistics["predictor/kl_unpredicted"].value()


@pytest.mark.parametrize("packed", [False, True])
def test_responses_that_are_dropped_teach_nothing(packed: bool) -> None:
    """The old pass has observed them; the update feeds none of them. At equal weights nothing has changed."""
    rollout, old = tiny.rollout(), old_pass(0.0)
    kept = dataclasses.replace(rollout, response_mask=rollout.response_mask.at[::2].set(False))
    packing = plan(np.asarray(kept.fed_mask), 1) if packed else None
    rows = dataclasses.replace(tiny.minibatch(rollout, old, tiny.MINIRL), rollout=kept)
    _, statistics, _ = update(
        MODEL, state(weights(0.0)), rows, tiny.MINIRL, tiny.numbers(), replay=PR2, teach=np.bool_(True), packing=packing
    )
    assert abs(statistics["predictor/kl"].value()) < 1e-6
    of_prompts = kept.fed_mask.sum() * LAYERS
    assert statistics["predictor/kl"].weight == of_prompts < rollout.fed_mask.sum() * LAYERS


def test_nothing_foretells_without_predictors() -> None:
    with pytest.raises(UserError, match=r"replay 'pr2' needs the predictors' weights as variables\['predictor'\]"):
        score(MODEL, {"params": tiny.parameters(CONFIG)}, tiny.rollout(), replay=PR2)
    old = old_pass()
    untaught = init_state(jax.tree.map(jnp.copy, tiny.parameters(CONFIG)), tiny.numbers())
    for state_, scores in ((untaught, old), (state(weights()), dataclasses.replace(old, observed=None))):
        with pytest.raises(UserError, match="replay 'pr2' needs a state with predictors"):
            update(MODEL, state_, minibatch(scores), tiny.MINIRL, tiny.numbers(), replay=PR2)


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    old = old_pass()
    inputs = old.observed.inputs.at[0, 0, 0].set(jnp.nan)
    broken = dataclasses.replace(old, observed=old.observed.replace(inputs=inputs))
    state_, _, _ = updated(broken, weights())
    jax.tree.map(np.testing.assert_array_equal, state_.predictor.weights, weights())
    assert np.isfinite(np.asarray(state_.params["embedding"])).all()
