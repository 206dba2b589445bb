"""Fused attention on a mesh, under `jax.shard_map`: compilers cannot split the kernels of libraries.

Each device attends for its own rows and heads, and none needs another's: rows lie over ``data``, ``fsdp`` and
``expert``, heads over ``tensor``. What is not fused is left to the compiler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from rlstab_jax.parallel.sharding import Layout, partition_spec
from rlstab_jax.types import UserError

FUSED = ("cudnn", "flash", "splash", "triton")


def over_devices(kernel: Callable[..., Array], name: str, layout: Layout) -> Callable[..., Array]:
    """A kernel of `models.attention` by the name ``name``, such that it can be called on the layout's mesh.

    Its arguments are arrays, or trees of them, of two kinds: [rows, head, ...] with four dimensions, and [rows, ...]
    with two. In a decode step the rows of a prompt's part of the cache are prompts.

    Raises:
      UserError: (the returned function) rows, prompts or heads that the mesh does not divide.
    """
    if name not in FUSED or not layout.splits:
        return kernel
    rows, heads = layout.row_parts, layout.parts("tensor")

    def spec(a: Array) -> PartitionSpec:
        if a.shape[0] % rows:
            raise UserError(
                f"the attention kernel {name!r} on {a.shape[0]} rows: they do not divide over {rows} data-parallel "
                "devices (mesh.data x mesh.fsdp x mesh.expert); choose a multiple, or the kernel 'reference'"
            )
        if a.ndim == 4 and a.shape[1] % heads:
            raise UserError(
                f"the attention kernel {name!r} on {a.shape[1]} heads: they do not divide over mesh.tensor = {heads} "
                "devices; choose a divisor of model.num_kv_heads, or the kernel 'reference'"
            )
        return partition_spec(("batch", "kv_heads", None, None) if a.ndim == 4 else ("batch", None), layout.rules)

    def attend(*arguments: Any) -> Array:
        split = partial(jax.shard_map, kernel, mesh=layout.mesh, check_vma=False)
        return split(in_specs=jax.tree.map(spec, arguments), out_specs=spec(arguments[0]))(*arguments)

    return attend
