"""Run by test_sharding.py with 8 virtual devices: placement, constraints and equal results on several meshes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlstab_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, check_divides, constrain, shardings
from rlstab_jax.types import UserError

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
        assert y.addressable_shards[0].data.shape[0] == 16 // (mesh.shape["data"] * mesh.shape["fsdp"])
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


if __name__ == "__main__":
    assert jax.device_count() == 8
    for config in (MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2), MeshConfig(expert=2, tensor=4)):
        check_mesh(config)
    check_flax_names()
    check_refusals()
