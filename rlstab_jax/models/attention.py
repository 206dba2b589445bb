"""Attention kernels: a reference, and the accelerator's fused one. Softmax in float32 in each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Query = Float[Array, "batch head time c"]
Keys = Float[Array, "batch kv_head key c"]


def reference(q: Query, k: Keys, v: Keys, mask: Bool[Array, "batch time key"]) -> Query:
    """Grouped-query attention by two products. A row that may attend to nothing gives a finite, meaningless result."""
    batch, heads, time, c = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, time, c)
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bkgtc,bksc->bkgts", grouped, k, precision=exact, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * c**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bksc->bkgtc", weights, v, precision=exact).reshape(batch, heads, time, c)


def cudnn(q: Query, k: Keys, v: Keys, mask: Bool[Array, "batch time key"]) -> Query:
    """cuDNN's fused attention through `jax.nn.dot_product_attention` (bfloat16, NVIDIA GPUs)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn").swapaxes(1, 2)


ATTENTION = {"reference": reference, "cudnn": cudnn}
