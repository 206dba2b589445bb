"""One token at a time: the model's blocks, unrolled over layers, on slices of the stacked parameters."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.config import ModelConfig
from rlstab_jax.models.transformer import Block, Past, Transformer
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
    x: Float[Array, "rows d"],
    positions: Int[Array, "rows"],
    fed: Bool[Array, "rows"],
    pasts: list[Past],
) -> tuple[Float[Array, "rows d"], list[Past], Routes | None]:
    """One token a row through all blocks, unrolled over layers: a scan would copy the whole cache at each step.

    Returns the residual stream before the final norm, the pasts with this token at their column, and the routes
    [layer, rows, 1, k] in use.
    """
    extended, routes = [], []
    kinds = [moe for kinds, repeats in model.config.segments for moe in kinds * repeats]
    x = x[:, None]
    for moe, variables, past in zip(kinds, layers, pasts, strict=True):
        block = Block(model.config, moe, model.precision, model.kernels)
        outputs: Any = block.apply(variables, x, positions[:, None], fed[:, None], None, past)
        x, response, routing = outputs
        extended.append(replace(past, response=response))
        if routing is not None:
            routes.append(routing.used)
    return x[:, 0], extended, jnp.stack(routes) if routes else None
