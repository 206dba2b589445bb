"""What a layer keeps of its forward pass for its backward pass, by name. The rest is computed once more."""

from typing import Any, Literal

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "full", "dots", "offload"]

# A layer's input, and its routers' choices, by the names that the policies know them by.
_RESIDUAL, _ORDER = "residual", "order"


def residual(x: jax.Array) -> jax.Array:
    """Marks the residual stream at the entrance of a layer."""
    return checkpoint_name(x, _RESIDUAL)


def order(experts: jax.Array) -> jax.Array:
    """Marks a router's choices, which every policy keeps: chosen once more, in a program whose roundings differ, nearly
    tied experts would change places, and the gradient would be of experts that the forward pass did not use."""
    return checkpoint_name(experts, _ORDER)


def recomputed(layer: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """``layer``, the body of a scan, under the policy of that name.

    none keeps everything. dots keeps the results of products without batch axes: projections, router and dense layers,
    but neither attention's scores nor experts. full keeps the layer's input and the routers' choices alone. offload
    keeps the former in the host's memory, if the backend has one that is named pinned_host.
    """
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy: Any = {
        "full": policies.save_only_these_names(_ORDER),
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(_ORDER)
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[_ORDER],
            names_which_can_be_offloaded=[_RESIDUAL],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return nn.remat(layer, prevent_cse=False, policy=policy)
