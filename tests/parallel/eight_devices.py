"""Run by test_sharding.py with 8 virtual devices: placement, constraints and equal results on several meshes."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlstab_jax.objectives import advantages_of, cispo, coefficients, dapo, gspo, minirl, surrogate
from rlstab_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, Layout, check_divides, constrain, shardings
from rlstab_jax.types import Scores, UserError

LOGICAL = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "scale": ("embed",), "step": ()}
SHAPES = {"up": (8, 16), "down": (16, 8), "scale": (8,), "step": ()}


def parameters() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def check_mesh(config: MeshConfig) -> None:
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.size == 8
    params, x = parameters(), jax.random.normal(jax.random.key(1), (16, 8))
    check_divides(mesh, params, LOGICAL, TRAINING)

    def forward(params, x, mesh, rules):
        hidden = constrain(x @ params["up"], ("batch", "mlp"), mesh, rules)
        return constrain(hidden @ params["down"] * params["scale"], ("batch", "embed"), mesh, rules)

    expected = forward(params, x, None, TRAINING)
    for rules in (TRAINING, INFERENCE):
        placed = jax.device_put(params, shardings(mesh, LOGICAL, rules))
        fsdp = mesh.shape["fsdp"] if rules is TRAINING else 1
        rows, columns = placed["up"].addressable_shards[0].data.shape
        assert (rows, columns) == (8 // fsdp, 16 // mesh.shape["tensor"])
        y = jax.jit(forward, static_argnums=(2, 3))(placed, x, mesh, rules)
        assert y.addressable_shards[0].data.shape[0] == 16 // Layout(mesh).row_parts
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def check_flax_names() -> None:
    """Names that a Linen module puts on its parameters are a logical tree."""
    dense = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.ones, ("embed", "mlp")))
    variables = jax.eval_shape(dense.init, jax.random.key(0), jnp.ones((1, 8)))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    placed = shardings(mesh, nn.get_partition_spec(variables), TRAINING)
    assert placed["params"]["kernel"].spec == P("fsdp", "tensor")


def check_refusals() -> None:
    with pytest.raises(UserError, match="3 of 8"):
        make_mesh(MeshConfig(expert=3))
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    assert [device.id for device in mesh.devices.flat] == [0, 1]


def check_objectives() -> None:
    """A loss and its gradient are those of one device when the rows lie on eight: sums, never means of means."""
    random = np.random.default_rng(0)
    rows, length = 16, 5
    target, old, rollout = -random.uniform(0.1, 2.0, (3, rows, length)).astype(np.float32)
    mask = np.arange(length) < random.integers(1, length + 1, rows)[:, None]
    scores = Scores(target, old, rollout, mask, np.repeat(np.arange(0, rows, 2, dtype=np.int32), 2))
    rewards = random.integers(0, 2, rows).astype(np.float32)

    @jax.jit
    def gradient(objective, scores, rewards):
        advantage, c = advantages_of(objective, scores, rewards), coefficients(objective, scores)
        return jax.value_and_grad(lambda t: surrogate(objective, replace(scores, target=t), advantage, c)[0])(
            scores.target
        )

    by_row = jax.NamedSharding(make_mesh(MeshConfig(data=4, fsdp=2)), P(("data", "fsdp")))
    for objective in (minirl(), gspo(), dapo(), cispo()):
        loss, expected = gradient(objective, scores, rewards)
        sharded_loss, sharded = gradient(objective, *jax.device_put((scores, rewards), by_row))
        assert sharded.addressable_shards[0].data.shape == (2, length)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for config in (MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2), MeshConfig(expert=2, tensor=4)):
        check_mesh(config)
    check_flax_names()
    check_refusals()
    check_objectives()
