"""A checksum of each array of a state, computed where the array is.

It is a wrap-around sum over elements of a hash of (bits, position). Integer sums are exact in any order, so equal
arrays have equal checksums on any mesh. It costs one read of the arrays, finds any change of one element, and misses
any other change with probability 2^-32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from rlstab_jax.parallel.host_memory import on_device


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each leaf by its name."""
    # One after another: collectives of programs in flight together can starve each other on virtual CPU devices.
    return {leaf_name(path): int(_checksum(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(path: jax.tree_util.KeyPath) -> str:
    """The name of a leaf in messages and on disk, such as ``params/layers/attention/query``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _checksum(x: Array) -> UInt[Array, ""]:
    x = on_device(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)  # a last dimension of 2
    elif jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # The finaliser of MurmurHash3, a bijection of 32 bits. Without it, changes of many equal numbers could cancel.
    h = x.astype(jnp.uint32) + position * jnp.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
