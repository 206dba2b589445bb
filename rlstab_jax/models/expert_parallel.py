"""The experts of an MoE layer on a mesh, under `jax.shard_map`: each device computes what its experts are to do.

Rows lie over ``data``, ``fsdp`` and ``expert``; experts over ``expert``, their hidden units over ``tensor``. The
devices along ``expert`` gather their tokens, routes and gates, compute the assignments to their own experts, and return
each token's sum to where it lives (reduce-scatter). Nothing is ever dropped: the buffers hold the worst case, that all
go to one device, and `Kernels.expert_chunk` bounds them by going through the tokens in parts.

What crosses devices on its way to a sum does so in float32: that sum is rounded once, as it is on one device.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rlstab_jax.models.experts import Experts, ExpertWeights, Gates, Kernel, Sums, Tokens
from rlstab_jax.models.precision import Precision, Stored, saturate
from rlstab_jax.models.sharding import EXPERTS, scale_axes
from rlstab_jax.parallel.sharding import INFERENCE, Layout, check_divides, partition_spec
from rlstab_jax.types import UserError


def compute(
    kernel: Kernel,
    x: Tokens,
    experts: Experts,
    gates: Gates,
    weights: ExpertWeights,
    precision: Precision,
    layout: Layout,
    chunk: int,
) -> Sums:
    """``kernel`` on all tokens, on one device or on the layout's mesh, ``chunk`` tokens at a time (0: all at once).

    Args:
      chunk: of gathered tokens: each device along ``expert`` gives its share of them. Each chunk's values are computed
        again in the backward pass.

    Returns:
      float32 sums over each token's experts; 0 where none was dispatched.

    Raises:
      UserError: the mesh does not divide the weights, or cuts through a block of numbers that share a scale.
    """
    if not layout.splits:
        return _in_chunks(
            lambda x, experts, gates: kernel(x, experts, gates, weights, precision),
            chunk,
            x,
            experts,
            gates,
            nowhere=weights.num_experts,
        )
    specs = _specs(weights, precision, layout)
    across = shared_scales(weights.down.values.shape[1], precision, layout)
    # Tokens that the devices cannot share equally, as in a step of few rows, are filled up with some of no expert.
    missing = -x.shape[0] % layout.row_parts
    padding = ((0, missing), (0, 0))
    operands = (
        jnp.pad(x, padding),
        jnp.pad(experts, padding, constant_values=weights.num_experts),
        jnp.pad(gates, padding),
    )
    # A gradient is summed over the axes that its operand's spec leaves out, and be it over one device: an all-reduce.
    alone = ("tensor",) if layout.parts("tensor") == 1 else ()
    rows = PartitionSpec((*layout.rows, *alone), None)
    body = partial(_on_one_device, kernel, precision, layout, chunk, specs, across)
    # The parts of the sum over `tensor` are results of their own and added outside: the transpose of that is free,
    # where the transpose of a sum inside would be another one.
    parts = jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(rows, rows, rows, specs),
        out_specs=PartitionSpec("tensor", layout.rows, None),
        check_vma=False,  # kernels of libraries do not say over which axes their results vary
    )(*operands, weights)
    return parts.sum(0)[: x.shape[0]]


def _on_one_device(
    kernel: Kernel,
    precision: Precision,
    layout: Layout,
    chunk: int,
    specs: Any,
    across: str | None,
    x: Tokens,
    experts: Experts,
    gates: Gates,
    weights: ExpertWeights,
) -> Float[Array, "1 tokens d"]:
    """What the experts and hidden units of this device's row and column contribute to each token that it holds."""
    devices, own = layout.parts("expert"), weights.num_experts
    first = jax.lax.axis_index("expert") * own

    def whole(weight: Stored, spec: Stored) -> Stored:
        split = [axis for axis, name in enumerate(spec.values) if name == "fsdp"]
        if not split or layout.parts("fsdp") == 1:
            return weight
        if weight.scale is not None:
            # Of a master nothing travels but its gradient: no product reads what is gathered here.
            master = None if weight.master is None else _gathered(weight.master, "fsdp", split[0], "float32")
            values = jax.lax.all_gather(weight.values, "fsdp", axis=split[0], tiled=True)
            return replace(weight, values=values, master=master)
        # What is multiplied in a narrower dtype travels in it, but chunks sum their gradients in float32.
        values = _gathered(weight.values, "fsdp", split[0], precision.dtype)
        return replace(weight, values=values.astype(jnp.float32) if chunk else values)

    weights = jax.tree.map(whole, weights, specs, is_leaf=lambda node: isinstance(node, Stored))
    weights = replace(weights, down=replace(weights.down, across=across), devices=devices)

    def on_gathered(x: Tokens, experts: Experts, gates: Gates) -> Sums:
        if devices == 1:
            return kernel(x, experts, gates, weights, precision)
        x, gates = _gathered(x, "expert", 0, x.dtype), _gathered(gates, "expert", 0, gates.dtype)
        experts = jax.lax.all_gather(experts, "expert", tiled=True)
        mine = (experts >= first) & (experts < first + own)
        y = kernel(x, jnp.where(mine, experts - first, own), gates, weights, precision)
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)

    return _in_chunks(on_gathered, -(-chunk // devices), x, experts, gates, nowhere=devices * own)[None]


def _in_chunks(
    f: Callable[[Tokens, Experts, Gates], Sums], chunk: int, x: Tokens, experts: Experts, gates: Gates, nowhere: int
) -> Sums:
    """``f``, on ``chunk`` tokens after another; what fills the last chunk goes to the expert ``nowhere``."""
    tokens = x.shape[0]
    if not 0 < chunk < tokens:
        return f(x, experts, gates)
    x, experts, gates = (
        jnp.pad(a, ((0, -tokens % chunk), (0, 0)), constant_values=fill).reshape(-1, chunk, a.shape[1])
        for a, fill in ((x, 0), (experts, nowhere), (gates, 0))
    )
    y = jax.lax.map(lambda part: jax.checkpoint(f, prevent_cse=False)(*part), (x, experts, gates))
    return y.reshape(-1, y.shape[-1])[:tokens]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: Float[Array, "..."], over: str, axis: int, dtype: Any) -> Float[Array, "..."]:
    """The parts of the devices along the mesh axis ``over``, joined along ``axis``; they travel in ``dtype``.

    The gradients of the devices are summed in float32, and each has its part of them: a reduce-scatter.
    """
    return jax.lax.all_gather(saturate(x, dtype), over, axis=axis, tiled=True)


def _gathered_forward(x: Array, over: str, axis: int, dtype: Any) -> tuple[Array, Array]:
    return _gathered(x, over, axis, dtype), jnp.zeros((), x.dtype)


def _gathered_backward(over: str, axis: int, dtype: Any, like: Array, gradient: Array) -> tuple[Array]:
    total = jax.lax.psum_scatter(gradient.astype(jnp.float32), over, scatter_dimension=axis, tiled=True)
    return (total.astype(like.dtype),)  # in float16 what overflows is to show


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _specs(weights: ExpertWeights, precision: Precision, layout: Layout) -> Any:
    """A ``PartitionSpec`` for each array of ``weights``. Raises UserError where the mesh does not divide them."""
    mesh = layout.mesh
    assert mesh is not None
    stored = {"gate": weights.gate, "up": weights.up, "down": weights.down}
    check_divides(mesh, {name: weight.values for name, weight in stored.items()}, EXPERTS, layout.rules)

    def of(name: str) -> Any:
        values, scale, names = stored[name].values, stored[name].scale, EXPERTS[name]
        of_values: Any = partition_spec(names, layout.rules)
        of_scale: Any = None
        if scale is not None:
            of_scale = partition_spec(scale_axes(names, values, scale, precision, mesh), INFERENCE)
        return Stored(of_values, of_scale, None if stored[name].master is None else of_values)

    return ExpertWeights(of("gate"), of("up"), of("down"))


def shared_scales(hidden: int, precision: Precision, layout: Layout) -> str | None:
    """The mesh axis over which the scales of an expert's hidden units are shared, None where devices have their own.

    Raises:
      UserError: ``tensor`` would cut the ``hidden`` units within one of several blocks.
    """
    parts = layout.parts("tensor")
    if parts == 1 or (precision.scales == "block" and hidden % (parts * precision.block) == 0):
        return None
    if precision.scales == "block" and hidden > precision.block:
        raise UserError(
            f"model.expert_dim = {hidden} over mesh.tensor = {parts} devices cuts through blocks of precision.block = "
            f"{precision.block}: choose a block that divides {hidden // parts}, or another size of mesh.tensor"
        )
    return "tensor"
