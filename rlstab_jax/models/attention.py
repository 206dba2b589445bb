"""Attention kernels: references, and the accelerators' fused ones. Softmax in float32 in each.

`ATTENTION` are kernels over whole sequences (scoring, updates, prefill): causal, within `Segments`.
`DECODE_ATTENTION` are kernels of one decode step: one query a row, over its prompt's part and its own, of a cache as it
is stored.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.attention_gpu import decode_triton
from rlstab_jax.models.attention_parts import widened
from rlstab_jax.models.attention_tpu import Segments, decode_flash, decode_splash, splash
from rlstab_jax.models.precision import saturate
from rlstab_jax.types import UserError

Query = Float[Array, "batch head time c"]
Keys = Float[Array, "batch kv_head key c"]
# Queries of a block of `chunked`, and the fewest of one of `reference`.
BLOCK = 128
SHORT = 32
# Keys [batch, kv_head, c, key] and values [batch, kv_head, key, c], as a cache holds them.
Cache = tuple[Float[Array, "batch kv_head c key"], Float[Array, "batch kv_head key c"]]


def reference(q: Query, k: Keys, v: Keys, segments: Segments) -> Query:
    """Grouped-query attention by two products. What is not fed attends to its like: finite, and meaningless."""
    return _in_stages(_at_once, SHORT, q, k, v, segments)


def chunked(q: Query, k: Keys, v: Keys, segments: Segments) -> Query:
    """`reference` for one block of queries after another, each computed once more in the backward pass.

    Scores of [batch, head, `BLOCK`, time] exist at once, in either direction, instead of [batch, head, time, time].
    """
    if q.shape[2] <= BLOCK:
        return reference(q, k, v, segments)
    return _in_stages(_by_blocks, BLOCK, q, k, v, segments)


def _in_stages(attend: Callable[..., Array], part: int, q: Query, k: Keys, v: Keys, segments: Segments) -> Query:
    """``attend`` for up to four parts of the queries, each with the keys up to its end: the others have no weight, and
    are three eighths of all. Parts are multiples of ``part``.
    """
    time = q.shape[2]
    size = -(-time // (4 * part)) * part
    stages = []
    for first in range(0, time, size):
        end = min(first + size, time)
        q_part, own, seen = q[:, :, first:end], segments[:, first:end], segments[:, :end]
        stages.append(attend(q_part, k[:, :, :end], v[:, :, :end], own, seen, first))
    return jnp.concatenate(stages, axis=2)


def _at_once(q: Query, k: Keys, v: Keys, own: Segments, seen: Segments, first: Int[Array, ""] | int) -> Query:
    """Queries of the columns from ``first`` on, whose segments are ``own``; the keys' are ``seen``."""
    causal = jnp.arange(k.shape[2]) <= first + jnp.arange(q.shape[2])[:, None]
    mask = causal & (own[:, :, None] == seen[:, None])
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    return _masked_attention(grouped, k, v, mask).reshape(q.shape)


def _by_blocks(q: Query, k: Keys, v: Keys, own: Segments, seen: Segments, first: int) -> Query:
    """`_at_once` for `BLOCK` queries after another."""
    time = q.shape[2]
    blocks = -(-time // BLOCK)
    behind = blocks * BLOCK - time
    q = jnp.pad(q, [(0, 0), (0, 0), (0, behind), (0, 0)])
    own = jnp.pad(own, [(0, 0), (0, behind)])
    parts = q.reshape(*q.shape[:2], blocks, BLOCK, -1), own.reshape(-1, blocks, BLOCK)
    starts = first + jnp.arange(blocks) * BLOCK

    @jax.checkpoint
    def one(block: tuple[Array, Array, Array]) -> Array:
        q, own, first = block
        return _at_once(q, k, v, own, seen, first)

    y = jax.lax.map(one, (jnp.moveaxis(parts[0], 2, 0), jnp.moveaxis(parts[1], 1, 0), starts))
    return jnp.moveaxis(y, 0, 2).reshape(q.shape)[:, :, :time]


Grouped = Float[Array, "batch kv_head group query c"]


@jax.custom_vjp
def _masked_attention(q: Grouped, k: Keys, v: Keys, mask: Bool[Array, "batch query key"]) -> Grouped:
    """softmax(q k / sqrt(c)) v where ``mask``. Its gradient keeps logsumexps, and computes the weights from them again.

    The gradient of a softmax needs sum_s w_s dw_s for each query, which is that of its result and the result's
    gradient. Two habits of the compiler for CPUs are worked around: it transposes the large operand of products that
    sum over queries, unless the small one is written first; and a sum whose result is spread over a large array it
    computes with that array, very slowly, unless a selection stands between the two.
    """
    return _masked_attention_forward(q, k, v, mask)[0]


def _masked_attention_forward(q, k, v, mask):
    scores = _masked_scores(q, k, mask)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    y = _product("bkgts,bksc->bkgtc", weights.astype(q.dtype), v, jnp.float32)
    y = saturate(y / total, q.dtype)
    return y, (q, k, v, mask, y, highest + jnp.log(total))


def _masked_attention_backward(saved, d_y):
    q, k, v, mask, y, normaliser = saved
    weights = jnp.exp(_masked_scores(q, k, mask) - normaliser)
    d_weights = jnp.where(mask[:, None, None], _product("bkgtc,bksc->bkgts", d_y, v, jnp.float32), 0.0)
    expected = jnp.sum(d_y.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    expected = jnp.where(mask.any(-1)[:, None, None, :, None], expected, 0.0)
    d_scores = (weights * (d_weights - expected) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = _product("bkgts,bksc->bkgtc", d_scores, k, q.dtype)
    d_k = _product("bkgtc,bkgts->bkcs", q, d_scores, k.dtype)
    d_v = _product("bkgtc,bkgts->bkcs", d_y, weights.astype(q.dtype), v.dtype)
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))
    return d_q, d_k.swapaxes(2, 3), d_v.swapaxes(2, 3), None


_masked_attention.defvjp(_masked_attention_forward, _masked_attention_backward)


def _masked_scores(
    q: Grouped, k: Keys, mask: Bool[Array, "batch query key"]
) -> Float[Array, "batch kv_head group query key"]:
    scores = _product("bkgtc,bksc->bkgts", q, k, jnp.float32)
    return jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, -1e30)


def _product(letters: str, a: Array, b: Array, out: jnp.dtype) -> Array:
    return jnp.einsum(letters, a, b, precision=_exact(a), preferred_element_type=out)


def cudnn(q: Query, k: Keys, v: Keys, segments: Segments) -> Query:
    """cuDNN's fused attention through `jax.nn.dot_product_attention` (bfloat16 or float16, NVIDIA GPUs).

    Raises:
      UserError: another dtype, heads whose width is not a multiple of 8, or rows that may hold several sequences.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8:
        raise UserError(
            f"kernels.attention = 'cudnn' needs bfloat16 or float16 in both engines (learner.precision.dtype, "
            f"rollout.precision.dtype) and model.head_dim a multiple of 8, but got {q.dtype} and {q.shape[-1]}: change "
            "these, or use 'reference'"
        )
    if segments.dtype != bool:
        raise UserError(
            "kernels.attention = 'cudnn' takes one sequence a row, but the rows are packed: set learner.packing to "
            "False, or use 'reference'"
        )
    return by_lengths(q, k, v, segments, "cudnn")


def by_lengths(
    q: Query, k: Keys, v: Keys, fed: Bool[Array, "batch time"], implementation: Literal["xla", "cudnn"]
) -> Query:
    """`jax.nn.dot_product_attention` over the fed tokens of each row, 0 at the others.

    cuDNN takes the lengths of rows that begin in column 0, else a mask as a bias of [batch, time, time]: rows are moved
    to the front and back. Its gradient wants an even time. What it leaves behind the rows' ends is never read.
    """
    time = q.shape[2]
    first = jnp.argmax(fed, axis=1)
    count = fed.sum(1, dtype=jnp.int32)
    column = jnp.arange(time + time % 2)
    kept = (column < count[:, None])[..., None, None]

    def front(x: Array) -> Array:
        x = jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, time % 2), (0, 0), (0, 0)])
        return jnp.where(kept, _rolled(x, first), 0)

    lengths = jnp.maximum(count, 1)  # a softmax over nothing would be NaN
    y = jax.nn.dot_product_attention(
        *(front(x) for x in (q, k, v)),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return _rolled(jnp.where(kept, y, 0), -first)[:, :time].swapaxes(1, 2)


@jax.custom_vjp
def _rolled(x: Float[Array, "batch time ..."], shift: Int[Array, "batch"]) -> Float[Array, "batch time ..."]:
    """Column t of each row is what was in column t + shift. Its gradient rolls back: a gather, no scatter."""
    column = (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1]
    return jax.vmap(lambda row, at: row[at])(x, column)


_rolled.defvjp(lambda x, shift: (_rolled(x, shift), shift), lambda shift, gradient: (_rolled(gradient, -shift), None))


def decode_reference(
    q: Float[Array, "rows head 1 c"],
    prompt: Cache,
    response: Cache,
    prompt_mask: Bool[Array, "prompts prompt_length"],
    response_mask: Bool[Array, "rows window"],
) -> Float[Array, "rows head 1 c"]:
    """One softmax over both parts. The rows of a prompt are one product with its keys, which are read once for all.

    It rounds what `reference` rounds, the weights before they are normalised and the result: so that in bfloat16 as in
    float32 what is drawn from is what is scored.

    It is what `auto` is on GPUs too: `jax.nn.dot_product_attention` takes keys as [time, c], so that it would transpose
    the cache, which holds [c, time], at each step.
    """
    rows, heads, _, c = q.shape
    (prompt_k, prompt_v), (response_k, response_v) = prompt, response
    prompts, kv_heads, prompt_length, _ = prompt_v.shape
    samples, group = rows // prompts, heads // kv_heads

    def by_row(x: Array) -> Array:  # [prompts, kv_head, samples, group, ...] -> [rows, kv_head, group, ...]
        return x.swapaxes(1, 2).reshape(rows, kv_heads, group, *x.shape[4:])

    def by_prompt(x: Array) -> Array:
        return x.reshape(prompts, samples, kv_heads, group, *x.shape[3:]).swapaxes(1, 2)

    grouped = q.reshape(rows, kv_heads, group, c)
    to_prompt = by_row(_product("pksgc,pkct->pksgt", by_prompt(grouped), prompt_k, jnp.float32))
    to_response = _product("rkgc,rkct->rkgt", grouped, response_k, jnp.float32)
    mask = jnp.concatenate([jnp.repeat(prompt_mask, samples, axis=0), response_mask], axis=1)
    scores = jnp.concatenate([to_prompt, to_response], axis=-1) * c**-0.5
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(q.dtype)
    y = by_row(_product("pksgt,pktc->pksgc", by_prompt(weights[..., :prompt_length]), prompt_v, jnp.float32))
    y = y + _product("rkgt,rktc->rkgc", weights[..., prompt_length:], response_v, jnp.float32)
    return saturate(y / total, q.dtype).reshape(rows, heads, 1, c)


def _exact(x: Array) -> jax.lax.Precision | None:
    """float32 means float32: accelerators would otherwise round the operands of a product to bf16 or tf32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


ATTENTION = {"reference": reference, "chunked": chunked, "cudnn": cudnn, "splash": splash}
DECODE_ATTENTION = {
    "reference": widened(decode_reference),
    "splash": widened(decode_splash),
    "flash": decode_flash,
    "triton": decode_triton,
}
