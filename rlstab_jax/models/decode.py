"""One token at a time: the model's blocks, unrolled over layers."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.models.layers import Past, Rotations, Routing
from rlstab_jax.models.transformer import Block, Transformer
from rlstab_jax.types import Routes


def decode_step(
    model: Transformer,
    layers: list[dict],
    x: Float[Array, "rows d"],
    turn: Rotations,
    fed: Bool[Array, "rows"],
    pasts: list[Past],
    routes: Routes | None = None,
) -> tuple[Float[Array, "rows d"], list[Past], Routing | None]:
    """One token a row through all blocks, unrolled over layers: a scan would copy the whole cache at each step.

    Returns the residual stream before the final norm, the pasts with this token at their column, and the routing of
    [layer, rows, 1] tokens. ``layers`` are the variables of each, see `by_layer.layers_of`. ``turn`` is the rotation at
    each row's position, [rows, 1, 1, c/2]; ``routes`` are to be replayed, as in `Transformer.__call__`.
    """
    extended: list[Past] = []
    routing: list[Routing] = []
    x = model.layout.constrain(x[:, None], "batch", "time", "embed")
    for moe, variables, past in zip(model.config.kinds, layers, pasts, strict=True):
        block = Block(model.config, moe, model.precision, model.kernels, model.layout)
        recorded = routes[len(routing)] if moe and routes is not None else None
        outputs: Any = block.apply(variables, x, turn, fed[:, None], recorded, past)
        x, response, of_layer = outputs
        extended.append(replace(past, response=response))
        if moe:
            routing.append(of_layer)
    return x[:, 0], extended, jax.tree.map(lambda *layers: jnp.stack(layers), *routing) if routing else None
