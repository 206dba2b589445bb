"""Saves on some meshes and restores on others, with 8 virtual devices. Run by test_checkpoint.py."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.parallel.sharding import TRAINING, shardings
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.checksum import checksums

LOGICAL = {"w": ("embed", "mlp"), "experts": ("experts", "embed", "expert_mlp"), "step": ()}

if __name__ == "__main__":
    assert jax.device_count() == 8
    state = {
        "w": jax.random.normal(jax.random.key(0), (16, 24)),
        "experts": jax.random.normal(jax.random.key(1), (4, 16, 8), jnp.bfloat16),
        "step": jnp.int32(3),
    }
    configs = [MeshConfig(fsdp=8), MeshConfig(expert=4, tensor=2), MeshConfig(fsdp=2, expert=2, tensor=2), None]
    for step, config in enumerate(configs):
        placed = state if config is None else jax.device_put(state, shardings(make_mesh(config), LOGICAL, TRAINING))
        # The key is on one device while the rest is on eight, as an uncommitted array of a real state is.
        placed = placed | {"key": jax.random.key(5)}
        assert checksums(placed) == checksums(state | {"key": jax.random.key(5)})
        with Checkpoints(sys.argv[1]) as checkpoints:
            if step:
                restored = checkpoints.restore(placed)
                assert restored is not None
                assert restored[0] == step - 1
                for name, leaf in state.items():
                    assert restored[1][name].sharding == placed[name].sharding
                    np.testing.assert_array_equal(restored[1][name], leaf)
            checkpoints.save(step, placed, {})
