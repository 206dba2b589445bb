"""From the training engine's float32 parameters to the stored weights of an inference engine, once per rollout."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float

from rlstab_jax.models.by_layer import LAYERS, by_layer
from rlstab_jax.models.layers import SCALE
from rlstab_jax.models.precision import Precision, saturate, store_weight
from rlstab_jax.models.sharding import logical_axes, scale_axes
from rlstab_jax.parallel.sharding import INFERENCE, TRAINING, constrain


@partial(jax.jit, static_argnames=("precision", "mesh"))
def prepare(params: dict, precision: Precision, mesh: Mesh | None = None) -> dict:
    """Casts, quantises and lays out parameters for an engine, layer by layer, in one compiled call.

    Linear layers and experts are stored in ``precision.weights``; router and LM head as ``precision.router``
    and ``precision.lm_head`` say (a tied embedding is stored as the LM head is, by channel one scale per token). The
    rest is cast to ``precision.dtype``; norms stay float32.

    Args:
      params: the "params" collection of `Transformer`, float32.
      precision: the engine's.
      mesh: where there are several devices, the result is laid out by the table `INFERENCE`. A scale lies with its
        values; it is whole on each device where a block of values is not.

    Returns:
      Variables for `forward` and the samplers, by layer (`models.by_layer`): {"params": ..., "weight_scale": ...,
      "layers": {"0": {"params": ..., "weight_scale": ...}, ...}}.
    """
    apart = by_layer({"params": params})
    tied = "lm_head" not in params
    layers = {depth: _stored(layer["params"], precision, mesh, tied) for depth, layer in apart[LAYERS].items()}
    return _stored(apart["params"], precision, mesh, tied) | {LAYERS: layers}


@jax.jit
def with_noise(params: dict, size: Float[Array, ""] | float, key: Array) -> dict:
    """Parameters with Gaussian noise of ``size`` times each matrix's root mean square on it; norms have none.

    What stands for an engine whose errors are those of no number format: of any size, for as long as ``key`` stays.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)

    def noisy(path: Any, leaf: Array, key: Array) -> Array:
        if path[-1].key == "gain":
            return leaf
        return leaf + size * jnp.sqrt(jnp.mean(jnp.square(leaf))) * jax.random.normal(key, leaf.shape, leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [noisy(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def _stored(params: dict, precision: Precision, mesh: Mesh | None, tied: bool) -> dict:
    """The same of a part of the parameters: of one layer, or of what is in none."""
    flat = traverse_util.flatten_dict(params)
    names = traverse_util.flatten_dict(logical_axes(params))
    values, scales = {}, {}
    for path, leaf in flat.items():
        of = precision
        if "router" in path:
            of = precision.router
        elif path[0] == ("embedding" if tied else "lm_head"):
            of = precision.lm_head
        elif path[0] == "embedding":
            of = precision.exempt()
        if path[-1] == "gain":
            value, scale = leaf, None
        elif of.weights == "none":
            value, scale = saturate(leaf, of.dtype), None
        else:
            # Kernels are [.., in, out]; the embedding is [vocab, d], the transpose of the head's kernel.
            stored = store_weight(leaf, of, transposed=path[0] == "embedding")
            value, scale = stored.values, stored.scale
        if mesh is not None and mesh.size > 1:
            # First the layout of the parameters: what moves between devices is then the narrow values.
            value = constrain(constrain(value, names[path], mesh, TRAINING), names[path], mesh, INFERENCE)
            if scale is not None:
                scale = constrain(scale, scale_axes(names[path], leaf, scale, precision, mesh), mesh, INFERENCE)
        values[path] = value
        if scale is not None:
            scales[path] = scale
    return {"params": traverse_util.unflatten_dict(values), SCALE: traverse_util.unflatten_dict(scales)}
