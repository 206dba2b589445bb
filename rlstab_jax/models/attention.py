"""Attention kernels: references, and the accelerators' fused ones. Softmax in float32 in each.

`ATTENTION` are kernels over whole sequences (scoring, updates, prefill): causal, and only fed tokens are attended to.
`DECODE_ATTENTION` are kernels of one decode step: one query a row, over its prompt's part and its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Query = Float[Array, "batch head time c"]
Keys = Float[Array, "batch kv_head key c"]
# Keys [batch, kv_head, c, key] and values [batch, kv_head, key, c], as a cache holds them.
Cache = tuple[Float[Array, "batch kv_head c key"], Float[Array, "batch kv_head key c"]]


def reference(q: Query, k: Keys, v: Keys, fed: Bool[Array, "batch time"]) -> Query:
    """Grouped-query attention by two products. A row that may attend to nothing gives a finite, meaningless result."""
    batch, heads, time, c = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, time, c)
    mask = jnp.tril(jnp.ones((time, time), bool)) & fed[:, None]
    exact = _exact(q)
    scores = jnp.einsum("bkgtc,bksc->bkgts", grouped, k, precision=exact, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * c**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bksc->bkgtc", weights, v, precision=exact).reshape(batch, heads, time, c)


def cudnn(q: Query, k: Keys, v: Keys, fed: Bool[Array, "batch time"]) -> Query:
    """cuDNN's fused attention through `jax.nn.dot_product_attention` (bfloat16, NVIDIA GPUs)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mask = fed[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn").swapaxes(1, 2)


def decode_reference(
    q: Float[Array, "rows head 1 c"],
    prompt: Cache,
    response: Cache,
    prompt_mask: Bool[Array, "prompts prompt_length"],
    response_mask: Bool[Array, "rows window"],
) -> Float[Array, "rows head 1 c"]:
    """One softmax over both parts. The rows of a prompt are one product with its keys, which are read once for all."""
    rows, heads, _, c = q.shape
    (prompt_k, prompt_v), (response_k, response_v) = prompt, response
    prompts, kv_heads, prompt_length, _ = prompt_v.shape
    samples, group = rows // prompts, heads // kv_heads
    exact = _exact(q)

    def product(letters: str, a: Array, b: Array, out: jnp.dtype) -> Array:
        return jnp.einsum(letters, a, b, precision=exact, preferred_element_type=out)

    def by_row(x: Array) -> Array:  # [prompts, kv_head, samples, group, ...] -> [rows, kv_head, group, ...]
        return x.swapaxes(1, 2).reshape(rows, kv_heads, group, *x.shape[4:])

    def by_prompt(x: Array) -> Array:
        return x.reshape(prompts, samples, kv_heads, group, *x.shape[3:]).swapaxes(1, 2)

    grouped = q.reshape(rows, kv_heads, group, c)
    to_prompt = by_row(product("pksgc,pkct->pksgt", by_prompt(grouped), prompt_k, jnp.float32))
    to_response = product("rkgc,rkct->rkgt", grouped, response_k, jnp.float32)
    mask = jnp.concatenate([jnp.repeat(prompt_mask, samples, axis=0), response_mask], axis=1)
    scores = jnp.concatenate([to_prompt, to_response], axis=-1) * c**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(q.dtype)
    y = by_row(product("pksgt,pktc->pksgc", by_prompt(weights[..., :prompt_length]), prompt_v, q.dtype))
    y = y + product("rkgt,rktc->rkgc", weights[..., prompt_length:], response_v, q.dtype)
    return y.reshape(rows, heads, 1, c)


def _exact(x: Array) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise round the operands of a product to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


ATTENTION = {"reference": reference, "cudnn": cudnn}
DECODE_ATTENTION = {"reference": decode_reference}
