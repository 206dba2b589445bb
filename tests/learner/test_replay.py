"""Routing replay in the training engine: selection is replayed, gates are live (identities 1, 2 and 4 of DESIGN.md)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.learner import PolicyScores, score, update
from rlstab_jax.learner.controls import permuted
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.objectives import rspo
from rlstab_jax.types import Rollout, Routes, RoutingReplay, UserError

MODEL = tiny.model(remat="full")
EXPERTS = tiny.MIXED.num_experts
LIVE, R2, R3 = RoutingReplay.LIVE, RoutingReplay.R2, RoutingReplay.R3


@partial(jax.jit, static_argnames="unroll")
def scores_and_gradient(params: dict, rollout: Rollout, routes: Routes, unroll: int = 1) -> tuple[PolicyScores, dict]:
    """Scores under ``routes``, and the gradient of a fixed weighted sum of their log-probs and entropies."""

    def loss(params: dict) -> tuple[jax.Array, PolicyScores]:
        scores, _ = policy_scores(MODEL.clone(unroll=unroll), {"params": params}, rollout, routes, 2**24)
        weight = jnp.cos(jnp.arange(scores.log_probs.size, dtype=jnp.float32)).reshape(scores.log_probs.shape)
        return jnp.sum(weight * scores.log_probs) + 0.1 * jnp.sum(scores.entropy), scores

    (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return scores, gradient


def not_recorded(rollout: Rollout) -> np.ndarray:
    return np.full(rollout.routes.shape, EXPERTS, rollout.routes.dtype)


def random_routes(rollout: Rollout, seed: int = 0) -> np.ndarray:
    """Two distinct experts for each token, whatever the router would say."""
    first = np.random.default_rng(seed).integers(0, EXPERTS, rollout.routes.shape[:3])
    shift = np.random.default_rng(seed + 1).integers(1, EXPERTS, first.shape)
    return np.stack([first, (first + shift) % EXPERTS], -1).astype(rollout.routes.dtype)


def assert_equal(first: Any, second: Any) -> None:
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), first, second)


def test_own_routes_replayed_are_live_routing_bit_for_bit() -> None:
    rollout, params = tiny.rollout(), tiny.parameters()
    live, live_gradient = scores_and_gradient(params, rollout, not_recorded(rollout))
    replayed, gradient = scores_and_gradient(params, rollout, live.routes)
    assert_equal(live, replayed)
    assert_equal(live_gradient, gradient)
    half = np.asarray(live.routes).copy()
    half[:, ::2, ::3] = EXPERTS  # recorded for some tokens only
    assert_equal((live, live_gradient), scores_and_gradient(params, rollout, half))


def test_layers_that_are_written_out_replay_the_same_routes() -> None:
    """MoE and dense layers alternate: both repetitions of the pair at once, in the place of a scan."""
    rollout, params = tiny.rollout(), tiny.parameters()
    routes = random_routes(rollout)
    (scanned, wanted), (written, gradient) = (scores_and_gradient(params, rollout, routes, n) for n in (1, 2))
    for name in ("routes", "live"):
        np.testing.assert_array_equal(getattr(written, name), getattr(scanned, name))
    np.testing.assert_allclose(written.log_probs, scanned.log_probs, atol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), gradient, wanted)


def test_other_routes_are_obeyed_and_live_choices_still_seen() -> None:
    rollout, params = tiny.rollout(), tiny.parameters()
    routes = random_routes(rollout)
    live, _ = scores_and_gradient(params, rollout, not_recorded(rollout))
    scores, _ = scores_and_gradient(params, rollout, routes)
    fed = np.asarray(rollout.fed_mask)
    np.testing.assert_array_equal(np.asarray(scores.routes)[:, fed], routes[:, fed])
    assert (np.asarray(scores.routes)[:, ~fed] == EXPERTS).all()
    # The first MoE layer's input does not depend on routes: its live choice must be the same under replay.
    np.testing.assert_array_equal(scores.live[0], live.live[0])
    assert np.abs(scores.log_probs - live.log_probs).max() > 0.01


def test_update_replays_bit_for_bit() -> None:
    rollout, params = tiny.rollout(), tiny.parameters()
    old, _ = score(MODEL, {"params": params}, rollout)
    live, _ = scores_and_gradient(params, rollout, not_recorded(rollout))
    results = []
    for routes in (not_recorded(rollout), live.routes, random_routes(rollout)):
        minibatch = tiny.minibatch(dataclasses.replace(rollout, routes=jnp.asarray(routes)), old, tiny.MINIRL)
        results.append(update(MODEL, tiny.state(), minibatch, tiny.MINIRL, tiny.numbers(), replay=R3))
    assert_equal(results[0], results[1])
    assert results[0][2]["learner/grad_norm"] != results[2][2]["learner/grad_norm"]


def routers(tree: dict) -> dict:
    return {
        path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "router" in jax.tree_util.keystr(path)
    }


def moved(params: dict, direction: dict, size: float) -> dict:
    def move(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf + np.float32(size * direction[path]) if path in direction else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def test_router_gradient_under_replay_matches_finite_differences() -> None:
    """Under replay the loss is smooth in the router's weights: gates move, the selection cannot."""
    rollout, params = tiny.rollout(), tiny.parameters()
    routes = random_routes(rollout)
    weight = np.cos(np.arange(rollout.log_probs.size, dtype=np.float32)).reshape(rollout.log_probs.shape)

    def loss(params: dict) -> float:
        scores, _ = scores_and_gradient(params, rollout, routes)
        log_probs, entropy = (np.asarray(x, np.float64) for x in (scores.log_probs, scores.entropy))
        return float((weight * log_probs).sum() + 0.1 * entropy.sum())

    _, gradient = scores_and_gradient(params, rollout, routes)
    gradient = routers(gradient)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in gradient.values()))
    assert len(gradient) == 1
    for g in gradient.values():  # stacked over layers: each layer's router learns
        assert (np.abs(g).max((1, 2)) > 0.01).all()
    generator = np.random.default_rng(5)
    directions = [{path: np.asarray(g) / norm for path, g in gradient.items()}]
    for _ in range(3):
        noise = {path: generator.standard_normal(g.shape) for path, g in gradient.items()}
        length = np.sqrt(sum((n**2).sum() for n in noise.values()))
        directions.append({path: n / length for path, n in noise.items()})

    for direction in directions:

        def central(step: float, direction: dict = direction) -> float:
            return (loss(moved(params, direction, step)) - loss(moved(params, direction, -step))) / (2 * step)

        difference = (4 * central(0.02) - central(0.04)) / 3  # without the error of second order
        slope = sum((np.asarray(g) * direction[path]).sum() for path, g in gradient.items())
        assert abs(difference - slope) < 1e-3 * norm, (difference, slope, norm)


def test_r2_in_the_first_minibatch_is_no_replay() -> None:
    rollout = tiny.rollout()
    old, _ = score(MODEL, {"params": tiny.parameters()}, rollout, replay=R2)
    minibatch = tiny.minibatch(rollout, old, tiny.MINIRL)
    results = {
        replay: update(MODEL, tiny.state(), minibatch, tiny.MINIRL, tiny.numbers(), replay=replay)
        for replay in (LIVE, R2)
    }
    gradients = {replay: tiny.gradient_of_step(state) for replay, (state, _, _) in results.items()}
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients[LIVE]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), gradients[R2], gradients[LIVE])
    for replay in (LIVE, R2):
        statistics = results[replay][1]
        assert statistics["staleness/max_ratio"].value() - 1 < 1e-5
        assert (statistics["routing/old_vs_target"].value() == 0).all()


def test_permuted_routes_are_those_of_another_token_of_the_row() -> None:
    """Each token's routes name the token, so that it can be seen where they went."""
    rollout = tiny.rollout()
    fed = np.asarray(rollout.fed_mask)
    place = np.broadcast_to(np.arange(fed.shape[1]), rollout.routes.shape[:3])
    routes = np.where(fed[..., None], np.stack([place, place + 100], -1), 255).astype(np.uint8)
    given = np.asarray(permuted(routes, fed, jax.random.key(0)))
    assert given.dtype == np.uint8
    np.testing.assert_array_equal(given[:, ~fed], 255)
    for of_layer in given:
        for row, count in enumerate(fed.sum(1)):
            there = of_layer[row, fed[row]]
            np.testing.assert_array_equal(there[:, 0] + 100, there[:, 1])  # a token's experts stay together
            np.testing.assert_array_equal(np.sort(there[:, 0]), place[0, row, fed[row]])
            assert count > 1
            assert (there[:, 0] != place[0, row, fed[row]]).all()
    assert (given[0] != given[1]).any()
    np.testing.assert_array_equal(given, permuted(routes, fed, jax.random.key(0)))
    assert (given != permuted(routes, fed, jax.random.key(1))).any()
    alone = np.arange(fed.shape[1]) == 2
    np.testing.assert_array_equal(permuted(routes, np.broadcast_to(alone, fed.shape), jax.random.key(0)), routes)


def test_replay_holds_the_selection_while_weights_move() -> None:
    rollout = tiny.rollout()
    old, _ = score(MODEL, {"params": tiny.parameters()}, rollout, replay=R2)
    minibatch = tiny.minibatch(rollout, old, tiny.MINIRL)
    moved = tiny.parameters(seed=0) | {"embedding": tiny.parameters(seed=4)["embedding"]}
    state = dataclasses.replace(tiny.state(), params=jax.tree.map(jnp.copy, moved))
    statistics = update(MODEL, state, minibatch, tiny.MINIRL, tiny.numbers(), replay=R2)[1]
    assert (statistics["routing/old_vs_target"].value() > 0.1).all()  # of live choices, also under replay


def test_old_pass_replays_under_r3_alone() -> None:
    rollout, variables = tiny.rollout(), {"params": tiny.parameters()}
    scores = {replay: score(MODEL, variables, rollout, replay=replay)[0] for replay in (LIVE, R2, R3)}
    assert_equal(scores[LIVE], scores[R2])
    np.testing.assert_array_equal(scores[R3].routes, rollout.routes)
    # An fp8 engine chose otherwise here and there, so R3 alters the first mini-batch too.
    assert (np.asarray(scores[LIVE].routes) != np.asarray(rollout.routes)).any()
    assert np.abs(scores[R3].log_probs - scores[LIVE].log_probs).max() > 0.01


@pytest.mark.parametrize("replay", [R2, R3])
def test_replay_without_routes_is_refused(replay: RoutingReplay) -> None:
    rollout = dataclasses.replace(tiny.rollout(), routes=None)
    old, _ = score(MODEL, {"params": tiny.parameters()}, rollout)
    minibatch = tiny.minibatch(rollout, dataclasses.replace(old, routes=None), tiny.MINIRL)
    with pytest.raises(UserError, match=f"replay '{replay.value}' needs recorded routes"):
        update(MODEL, tiny.state(), minibatch, tiny.MINIRL, tiny.numbers(), replay=replay)
    if replay is R3:
        with pytest.raises(UserError, match="the rollout has none"):
            score(MODEL, {"params": tiny.parameters()}, rollout, replay=replay)


def test_the_router_shift_is_seen_at_the_old_experts_under_live_routing() -> None:
    """RSPO's own setting. Experts that change their names: the policy is the same, and every route is another one."""
    rollout, params = tiny.rollout(), tiny.parameters()
    order = np.roll(np.arange(EXPERTS), 1)

    def renamed(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "router" in name:
            return leaf[..., order]
        return leaf[:, order] if "moe" in name else leaf  # [layer, expert, ...]

    new = jax.tree_util.tree_map_with_path(renamed, params)
    old, _ = score(MODEL, {"params": params}, rollout)
    live, _ = score(MODEL, {"params": new}, rollout)
    watched, _ = policy_scores(MODEL.clone(replay=False), {"params": new}, rollout, old.routes, 2**24)
    np.testing.assert_allclose(live.log_probs, old.log_probs, atol=1e-5)
    np.testing.assert_allclose(live.router, old.router, atol=1e-5)  # by rank nothing has moved
    assert_equal(watched.routes, live.routes)
    np.testing.assert_allclose(watched.log_probs, live.log_probs, atol=1e-5)

    mask = np.asarray(rollout.response_mask)
    shift = np.abs(np.asarray(watched.router) - np.asarray(old.router)).mean(-1)
    assert (shift[mask] > 0.1).all()
    gamma = np.where(mask, np.maximum(-shift, np.log(0.01)), 0)
    objective = rspo(eps_low=np.inf, eps_high=np.inf, floor=0.01)
    state = dataclasses.replace(tiny.state(), params=jax.tree.map(jnp.copy, new))
    minibatch = tiny.minibatch(rollout, old, objective)
    _, statistics, _ = update(MODEL, state, minibatch, objective, tiny.numbers(), replay=LIVE)
    expected = np.exp(gamma.sum(1) / mask.sum(1))  # the geometric mean of gamma r, where r = 1
    weight = (mask * expected[:, None]).sum() / mask.sum()
    np.testing.assert_allclose(statistics["weight/mean"].value(), weight, rtol=1e-4)
