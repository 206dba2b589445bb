"""Run by test_meshes.py with 8 virtual devices: both engines give the same numbers on several meshes (identity 6)."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from rlstab_jax.inference import sample
from rlstab_jax.learner import state_shardings
from rlstab_jax.learner.score import policy_scores
from rlstab_jax.models import ModelConfig
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, check_divides, shardings
from rlstab_jax.types import Rollout, row_axis

CONFIG = ModelConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=2,
    expert_dim=16,
    mlp_dim=40,
    dense_layers=(1,),
    tie_embeddings=False,
)
MODEL = tiny.model(CONFIG, remat="full")
MESHES = [MeshConfig(8, 1, 1, 1), MeshConfig(2, 2, 2, 1), MeshConfig(1, 2, 2, 2)]


def draw_rollout(params: dict, place: callable) -> Rollout:
    tokens, mask = tiny.prompts(8)
    tokens, mask, keys = place((tokens % CONFIG.vocab_size, mask, tiny.keys(8, 1)))
    return sample(MODEL, {"params": params}, tokens, mask, keys, tiny.sampling(), response_length=4)


@jax.jit
def log_probs_and_gradient(params: dict, rollout: Rollout) -> tuple[jax.Array, dict]:
    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        scores, _ = policy_scores(MODEL, {"params": params}, rollout, rollout.routes, 3 * CONFIG.vocab_size)
        weight = jnp.cos(jnp.arange(scores.log_probs.size, dtype=jnp.float32)).reshape(scores.log_probs.shape)
        return jnp.sum(weight * scores.log_probs + 0.1 * scores.entropy), scores.log_probs

    (_, log_probs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return log_probs, gradient


def check(config: MeshConfig, rollout: Rollout, log_probs: jax.Array, gradient: dict) -> None:
    mesh = make_mesh(config)
    params = tiny.parameters(CONFIG)
    axes = logical_axes(params)
    check_divides(mesh, params, axes, TRAINING)

    def place_rows(tree: object) -> object:
        def put(leaf: jax.Array) -> jax.Array:
            rows = [None] * np.ndim(leaf)
            if rows:
                rows[row_axis(leaf)] = ("data", "fsdp")
            return jax.device_put(leaf, NamedSharding(mesh, P(*rows)))

        return jax.tree.map(put, tree)

    sampled = draw_rollout(jax.device_put(params, shardings(mesh, axes, INFERENCE)), place_rows)
    np.testing.assert_array_equal(sampled.tokens, rollout.tokens)
    np.testing.assert_array_equal(sampled.routes, rollout.routes)
    np.testing.assert_allclose(sampled.log_probs, rollout.log_probs, atol=1e-5)

    state = tiny.state(CONFIG)
    state = jax.device_put(state, state_shardings(mesh, state, TRAINING))
    experts = state.params["segment_0"]["block_0"]["moe"]["up"].addressable_shards[0].data.shape
    assert experts == (1, 8 // config.expert, 32 // config.fsdp, 16 // config.tensor)
    got_log_probs, got = log_probs_and_gradient(state.params, place_rows(rollout))
    np.testing.assert_allclose(got_log_probs, log_probs, atol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, gradient)


if __name__ == "__main__":
    assert jax.device_count() == 8
    reference = draw_rollout(tiny.parameters(CONFIG), lambda tree: tree)
    expected = log_probs_and_gradient(tiny.parameters(CONFIG), reference)
    for mesh_config in MESHES:
        check(mesh_config, reference, *expected)
        print("equal on", mesh_config, flush=True)
