"""Rules to shardings, and the mesh. What needs several devices runs in one subprocess with 8 virtual ones."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from rlstab_jax.parallel import mesh as mesh_lib
from rlstab_jax.parallel import sharding
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.types import UserError
from tests.xla import virtual


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, expert=4), 8, (1, 2, 4, 1)),
        (MeshConfig(data=2, fsdp=1, expert=2, tensor=2), 8, (2, 1, 2, 2)),
        (MeshConfig(fsdp=8), 8, (1, 8, 1, 1)),
    ],
)
def test_mesh_shape(config: MeshConfig, devices: int, shape: tuple[int, ...]) -> None:
    assert mesh_lib.mesh_shape(config, devices) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(tensor=0), r"tensor = 0\): each size must be positive"),
        (MeshConfig(fsdp=-2), "each size must be positive"),
        (MeshConfig(fsdp=-1), "only one axis can be -1"),
        (MeshConfig(fsdp=16), "needs 16 devices, but there are 8"),
        (MeshConfig(expert=3), "groups of 3 of 8 devices: choose sizes that divide"),
        (MeshConfig(data=4), "groups of 4 of 8 devices: set one axis to -1"),
    ],
)
def test_mesh_that_does_not_fit(config: MeshConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh_lib.mesh_shape(config, 8)


@pytest.mark.parametrize(
    ("names", "rules", "spec"),
    [
        (("embed", "heads", "head_dim"), sharding.TRAINING, P("fsdp", "tensor", None)),
        (("layers", "experts", "embed", "expert_mlp"), sharding.TRAINING, P(None, "expert", "fsdp", "tensor")),
        (("vocab", "embed"), sharding.TRAINING, P("tensor", "fsdp")),
        (
            ("batch", "time", "embed"),
            sharding.TRAINING,
            P(("data", "fsdp", "expert"), None, None),
        ),  # fsdp is taken by batch
        (("embed", "batch"), sharding.TRAINING, P("fsdp", ("data", "expert"))),  # what batch leaves
        ((None, "mlp"), sharding.TRAINING, P(None, "tensor")),
        ((), sharding.TRAINING, P()),
        (("vocab", "embed"), sharding.INFERENCE, P("tensor", None)),
        (
            ("batch", "kv_heads", "time", "head_dim"),
            sharding.INFERENCE,
            P(("data", "fsdp", "expert"), "tensor", None, None),
        ),
    ],
)
def test_partition_spec(names: tuple[str | None, ...], rules: sharding.Rules, spec: P) -> None:
    assert sharding.partition_spec(names, rules) == spec


def test_unknown_logical_axis() -> None:
    with pytest.raises(ValueError, match="no sharding rule for the axis 'width'"):
        sharding.partition_spec(("width",), sharding.TRAINING)


def test_constrain_without_a_mesh_is_the_identity() -> None:
    x = jnp.ones((3, 2))
    assert sharding.constrain(x, ("batch", "embed"), None, sharding.TRAINING) is x


def test_check_divides_names_parameter_dimension_and_axis() -> None:
    mesh = AbstractMesh((1, 2, 4, 1), mesh_lib.AXES)
    names = {"experts": {"up": ("experts", "embed", "expert_mlp")}}
    shapes = {"experts": {"up": jax.ShapeDtypeStruct((8, 6, 5), jnp.float32)}}
    sharding.check_divides(mesh, shapes, names, sharding.TRAINING)
    shapes["experts"]["up"] = jax.ShapeDtypeStruct((6, 6, 5), jnp.float32)
    with pytest.raises(UserError, match=r"experts/up: dimension 0 \(experts, size 6\) .* axis expert of 4 devices"):
        sharding.check_divides(mesh, shapes, names, sharding.TRAINING)
    with pytest.raises(ValueError, match="logical axes"):
        sharding.check_divides(mesh, {"w": jnp.ones((2, 2))}, {"w": ("embed",)}, sharding.TRAINING)


def test_on_eight_devices() -> None:
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.parallel.eight_devices"]
    done = subprocess.run(command, cwd=root, env=os.environ | virtual(8), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
