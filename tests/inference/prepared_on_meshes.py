"""Run by test_quantize.py with 8 virtual devices: stored weights lie by the table and equal those of one device."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from rlstab_jax.inference import prepare
from rlstab_jax.models import ModelConfig, Precision, fp8, quantised
from rlstab_jax.models.by_layer import LAYERS
from rlstab_jax.models.layers import SCALE
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, shardings

CONFIG = ModelConfig(
    vocab_size=16, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=8, experts_per_token=2,
    expert_dim=16, mlp_dim=40, dense_layers=(1,),
)  # fmt: skip
PRECISIONS = {
    "float16": Precision("float16"),
    "e4m3": fp8(),
    "int8 by block": quantised("int8", scales="block", block=8),
    "4 bits by block, router exempt": quantised("float4_e2m1fn", scales="block", block=32, quantise_router=False),
}
UP, DOWN, DENSE = ("0", "moe", "up"), ("0", "moe", "down"), ("1", "mlp", "up", "kernel")
LM_HEAD = ("lm_head", "kernel")
# Where scales lie on the mesh 1 x 2 x 2 x 2. The contracted axis of `down` and the columns of `up` are split in 2 x 8.
SCALES = {
    "e4m3": {
        UP: P("expert", None, "tensor"),
        DOWN: P("expert", None, None),
        LM_HEAD: P(None, "tensor"),
        DENSE: P(None, "tensor"),
    },
    "int8 by block": {
        UP: P("expert", None, "tensor"),
        DOWN: P("expert", "tensor", None),
        LM_HEAD: P(None, "tensor"),
        DENSE: P(None, None),  # 40 columns in two parts of 20, which no blocks of 8 fill
    },
    "4 bits by block, router exempt": {
        UP: P("expert", None, None),  # one block of 32 holds both parts
        DOWN: P("expert", None, None),
        LM_HEAD: P(None, None),
        DENSE: P(None, None),
    },
}


def check(mesh: Mesh, name: str) -> None:
    precision = PRECISIONS[name]
    params = tiny.parameters(CONFIG)
    axes = logical_axes(params)
    placed = jax.device_put(params, shardings(mesh, axes, TRAINING))
    got, want = prepare(placed, precision, mesh), prepare(params, precision)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    for values in (got["params"], *(layer["params"] for layer in got[LAYERS].values())):
        by_table = shardings(mesh, logical_axes(values), INFERENCE)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), values, by_table))
    scales = traverse_util.flatten_dict({depth: layer.get(SCALE, {}) for depth, layer in got[LAYERS].items()})
    scales |= traverse_util.flatten_dict(got[SCALE])
    assert bool(scales) == (precision.weights != "none")
    for path, spec in SCALES.get(name, {}).items():
        scale = scales[path]
        assert scale.sharding.is_equivalent_to(NamedSharding(mesh, spec), scale.ndim), (path, scale.sharding)
    check_traffic(prepare.lower(placed, precision, mesh).compile().as_text())


def check_traffic(program: str) -> None:
    """Parameters are gathered over fsdp once they are narrow: of float32 arrays none larger than a router travels,
    but for those whose 40 hidden units leave a block on two devices."""
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\].* all-gather\(", program)
    assert gathered
    for dtype, shape in gathered:
        sizes = [int(n) for n in shape.split(",")]
        assert dtype != "f32" or np.prod(sizes) <= 32 * 8 or CONFIG.mlp_dim in sizes, (dtype, shape)


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name in PRECISIONS:
        check(make_mesh(MeshConfig(1, 2, 2, 2)), name)
        print("equal in", name, flush=True)
