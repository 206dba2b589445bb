"""A training engine that quantises: the sampler's numbers forward, gradients straight through to float32 masters."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from rlstab_jax.inference import prepare
from rlstab_jax.learner import score, update
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.models import ModelConfig, Precision, Transformer, fp8, quantised
from rlstab_jax.models.precision import store_weight
from rlstab_jax.types import Rollout, RoutingReplay

# One layer, with experts: dense ones are linear layers, as attention's are.
TIED = dataclasses.replace(tiny.MIXED, num_layers=1, dense_layers=())
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
PRECISIONS = {
    "e4m3": fp8(),
    "e5m2 by block": fp8("float8_e5m2", scales="block", block=8),
    "int8": quantised("int8"),
    "4-bit, router and head exempt": quantised("float4_e2m1fn", quantise_router=False, quantise_lm_head=False),
    "e4m3 activations": Precision("float16", activations="float8_e4m3fn"),
}


def rollout() -> Rollout:
    """Of another model, with routes for the one layer that has experts."""
    drawn = tiny.rollout()
    return drawn.replace(routes=drawn.routes[: TIED.num_moe_layers])


@partial(jax.jit, static_argnames="model")
def log_probs(model: Transformer, variables: dict, rollout: Rollout) -> jax.Array:
    return policy_scores(model, variables, rollout, None, 2**10)[0].log_probs


@partial(jax.jit, static_argnames="model")
def gradient(model: Transformer, params: dict, rollout: Rollout) -> dict:
    """Of a weighted sum of log-probs and entropies, with the rollout's routes."""

    def total(params: dict) -> jax.Array:
        scores, _ = policy_scores(model, {"params": params}, rollout, rollout.routes, 2**10)
        weight = jnp.cos(jnp.arange(scores.log_probs.size, dtype=jnp.float32)).reshape(scores.log_probs.shape)
        return jnp.sum(weight * (scores.log_probs + 0.1 * scores.entropy))

    return jax.grad(total)(params)


def cosine(a: dict, b: dict) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_masters_are_scored_as_the_sampler_s_weights_are(config: ModelConfig, name: str) -> None:
    """Identity 7 at equal quantised engines: what differs is a sum on the border between two stored values."""
    precision, params = PRECISIONS[name], tiny.parameters(config)
    model = tiny.model(config, precision)
    mine, sampler, exact = (
        log_probs(*of, rollout())
        for of in (
            (model, {"params": params}), (model, prepare(params, precision)), (tiny.model(config), {"params": params})
        )
    )  # fmt: skip
    assert (np.abs(mine - sampler) > 1e-5).sum() <= 0.05 * rollout().response_mask.sum()
    assert np.abs(mine - exact).max() > 1e-2


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_gradients_of_quantised_weights_are_those_at_the_numbers_they_stand_for(config: ModelConfig) -> None:
    """The same program in float32, on weights that were rounded before."""
    precision, params = Precision(weights="float8_e4m3fn"), tiny.parameters(config)

    def rounded(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        if path[-1] == "gain" or (path[0] == "embedding" and not config.tie_embeddings):
            return leaf
        return store_weight(leaf, precision, transposed=path[0] == "embedding").load()

    numbers = traverse_util.path_aware_map(rounded, params)
    got = gradient(tiny.model(config, precision), params, rollout())
    wanted = gradient(tiny.model(config), numbers, rollout())
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), got, wanted)


def test_kernels_and_recomputation_give_one_gradient() -> None:
    """Of all that is quantised, keys and values too; and it leads where the exact engine's does, about."""
    params = tiny.parameters(TIED)
    tiles = gradient(tiny.model(TIED, fp8()), params, rollout())
    others = {
        "dense": tiny.model(TIED, fp8(), experts="dense"),
        "ragged_dot": tiny.model(TIED, fp8(), experts="ragged_dot"),
        "in chunks": tiny.model(TIED, fp8(), expert_chunk=20),
        "recomputed": tiny.model(TIED, fp8(), remat="full"),
        "dots kept": tiny.model(TIED, fp8(), remat="dots"),
    }
    for name, model in others.items():
        assert cosine(gradient(model, params, rollout()), tiles) > 1 - 1e-3, name
    assert 0.8 < cosine(gradient(tiny.model(TIED), params, rollout()), tiles) < 0.9999


@pytest.mark.parametrize("projection", ["k", "v"])
def test_gradients_pass_through_quantised_keys_and_values(projection: str) -> None:
    params = tiny.parameters(UNTIED)
    narrow, exact = (
        gradient(tiny.model(UNTIED, Precision(kv_cache=format)), params, rollout())["segment_0"]["block_0"]["attention"]
        for format in ("float8_e4m3fn", "none")
    )
    assert 0.9 < cosine(narrow[projection], exact[projection]) < 1


def test_small_updates_are_not_lost_in_rounding() -> None:
    """A step far below the formats' resolution moves the masters, and the policy once they have moved enough."""
    model, numbers = tiny.model(TIED, quantised("float4_e2m1fn")), tiny.numbers(learning_rate=1e-4)
    state = tiny.state(TIED, numbers)
    old, _ = score(model, {"params": state.params}, rollout(), replay=RoutingReplay.R3)
    minibatch = tiny.minibatch(rollout(), old, tiny.MINIRL)
    measured = []
    for _ in range(12):
        state, statistics, measures = update(
            model, state, minibatch, tiny.MINIRL, numbers, replay=RoutingReplay.R3, micro_batches=2
        )
        measured.append((float(measures["learner/loss"]), float(statistics["staleness/k3"].value())))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, tiny.parameters(TIED))
    assert min(jax.tree.leaves(moved)) > 0
    assert measured[0][1] < 1e-9 < measured[-1][1]
    assert np.isfinite(measured).all()
