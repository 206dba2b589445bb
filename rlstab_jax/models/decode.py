"""One token at a time: the model's blocks, unrolled over layers, on slices of the stacked parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.config import ModelConfig
from rlstab_jax.models.transformer import Block, KeyValues, Transformer
from rlstab_jax.types import Routes


def depth_first(config: ModelConfig, stacked: list[Any]) -> list[Any]:
    """Per-layer trees in depth order, from one tuple per segment of trees stacked over its repetitions."""
    layers = []
    for blocks, (_, repeats) in zip(stacked, config.segments, strict=True):
        for i in range(repeats):
            layers += [jax.tree.map(lambda a, i=i: a[i], block) for block in blocks]
    return layers


def layer_variables(config: ModelConfig, variables: dict) -> list[dict]:
    """The variables of each `Block` in depth order, sliced from the stacked ones: once, outside the token loop."""
    collections = {}
    for collection, tree in variables.items():
        stacked = [
            tuple(tree.get(f"segment_{s}", {}).get(f"block_{i}", {}) for i in range(len(kinds)))
            for s, (kinds, _) in enumerate(config.segments)
        ]
        collections[collection] = depth_first(config, stacked)
    return [dict(zip(collections, layer, strict=True)) for layer in zip(*collections.values(), strict=True)]


def decode_step(
    model: Transformer,
    layers: list[dict],
    x: Float[Array, "batch 1 d"],
    positions: Int[Array, "batch 1"],
    mask: Bool[Array, "batch 1 key"],
    fed: Bool[Array, "batch 1"],
    caches: list[KeyValues],
    column: Int[Array, ""],
) -> tuple[Float[Array, "batch 1 d"], list[KeyValues], Routes | None]:
    """One token through all blocks, unrolled over layers: a scan would copy the whole cache at each step.

    Returns the residual stream before the final norm, the caches with this token at ``column``, and the routes
    [layer, batch, 1, k] in use.
    """
    new_caches, routes = [], []
    kinds = [moe for kinds, repeats in model.config.segments for moe in kinds * repeats]
    for moe, variables, cache in zip(kinds, layers, caches, strict=True):
        block = Block(model.config, moe, model.precision, model.kernels)
        outputs: Any = block.apply(variables, x, positions, mask, fed, None, cache, column)
        x, cache, routing = outputs
        new_caches.append(cache)
        if routing is not None:
            routes.append(routing.used)
    return x, new_caches, jnp.stack(routes) if routes else None
