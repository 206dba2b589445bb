"""From the training engine's float32 parameters to the stored weights of an inference engine, once per rollout."""

from functools import partial

import jax
from flax import traverse_util

from rlstab_jax.models.precision import Precision, store
from rlstab_jax.models.transformer import SCALE


@partial(jax.jit, static_argnames="precision")
def prepare(params: dict, precision: Precision) -> dict:
    """Casts and quantises parameters for an engine.

    Linear layers and experts are stored in ``precision.weights`` with one scale per output channel; router and LM head
    as the precision says (a tied embedding is stored as the LM head is, one scale per token). The rest is cast to
    ``precision.dtype``; norms and an unquantised router stay float32.

    Args:
      params: the "params" collection of `Transformer`, float32.

    Returns:
      Variables to apply the model with: {"params": ..., "weight_scale": ...}.
    """
    flat = traverse_util.flatten_dict(params)
    tied = ("lm_head", "kernel") not in flat
    values, scales = {}, {}
    for path, leaf in flat.items():
        router, head = "router" in path, path[0] == ("embedding" if tied else "lm_head")
        if path[-1] == "gain":
            values[path] = leaf
            continue
        exempt = (router and not precision.quantise_router) or (head and not precision.quantise_lm_head)
        exempt |= path[0] == "embedding" and not tied
        if precision.weights == "none" or exempt:
            values[path] = leaf if router else leaf.astype(precision.dtype)
            continue
        # Kernels are [.., in, out]; the embedding is [vocab, d], the transpose of the head's kernel.
        stored = store(leaf, precision.weights, axis=-1 if path[0] == "embedding" else -2)
        values[path], scales[path] = stored.values, stored.scale
    return {"params": traverse_util.unflatten_dict(values), SCALE: traverse_util.unflatten_dict(scales)}
