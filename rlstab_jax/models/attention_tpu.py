"""Splash attention, JAX's fused attention in Pallas for TPUs: over whole sequences, and in a decode step.

On a mesh they are called by `attention_parallel.over_devices`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.pallas import exact

LANES, SUBLANES = 128, 8
"""A TPU register's columns and rows: what lengths of keys, and numbers of queries, are padded to multiples of."""

# The number of the sequence that each token of a row belongs to, 0 where none is fed; a sequence is contiguous. A mask
# says, at compile time, that rows hold one sequence each.
Segments = Int[Array, "batch time"] | Bool[Array, "batch time"]


def splash(
    q: Float[Array, "batch head time c"],
    k: Float[Array, "batch kv_head time c"],
    v: Float[Array, "batch kv_head time c"],
    segments: Segments,
    interpret: bool = False,
) -> Float[Array, "batch head time c"]:
    """Causal attention within segments. What is not fed attends to its like, which is finite and means nothing.

    Scores never exist at once, and blocks above the diagonal are skipped. bfloat16 queries are rounded once more, when
    they are scaled.

    Args:
      interpret: runs the kernel as JAX operations, on any platform; for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    heads, time, c = q.shape[1:]
    q, k, v = (_padded(x, 2, LANES) for x in (q, k, v))
    ids = _padded(_numbers(segments), 1, LANES)
    block = _block(q.shape[2])
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((q.shape[2], q.shape[2]))] * heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attend(q: Array, k: Array, v: Array, ids: Array) -> Array:
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, library.SegmentIds(ids, ids)))(q, k, v, ids)

    return (exact(attend) if q.dtype == jnp.float32 else attend)(q * c**-0.5, k, v, ids)[:, :, :time]


def decode_splash(
    q: Float[Array, "rows head 1 c"],
    prompt: tuple[Float[Array, "prompts kv_head c prompt_length"], Float[Array, "prompts kv_head prompt_length c"]],
    response: tuple[Float[Array, "rows kv_head c window"], Float[Array, "rows kv_head window c"]],
    prompt_mask: Bool[Array, "prompts prompt_length"],
    response_mask: Bool[Array, "rows window"],
    interpret: bool = False,
) -> Float[Array, "rows head 1 c"]:
    """One splash call for the prompts' part, one for the responses', joined by their logsumexps. No gradient.

    The kernel reads keys as [c, time], which is how the cache holds them, and so copies nothing, if prompt_length and
    window are multiples of 128 (others are padded at each step) and the cache is in the engine's dtype (a narrower one
    is widened first, as a whole).

    Why not JAX's kernels for paged caches: `ragged_paged_attention` wants keys and values interleaved by head, as
    [page, time, 2 kv_head, c], `paged_attention` keys as [kv_head, page, time, c]. Either would copy the cache at each
    step. Both attend from a row's first column on, whereas prompts are right-aligned and a response begins anywhere in
    its window; and neither returns the logsumexp, without which the samples of a prompt could not share its part.
    """
    rows, heads, _, c = q.shape
    prompts, kv_heads = prompt[1].shape[:2]
    samples, group = rows // prompts, heads // kv_heads
    q = q.reshape(rows, kv_heads, group, c) * c**-0.5

    def by_row(x: Array) -> Array:  # [prompts, kv_head, samples * group, ...] -> [rows, kv_head, group, ...]
        x = x.reshape(prompts, kv_heads, samples, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(rows, kv_heads, group, *x.shape[4:])

    by_prompt = q.reshape(prompts, samples, kv_heads, group, c).swapaxes(1, 2).reshape(prompts, kv_heads, -1, c)
    of_prompt, prompt_sum = (by_row(x) for x in _part(by_prompt, *prompt, prompt_mask, interpret))
    of_response, response_sum = _part(q, *response, response_mask, interpret)
    # The softmax over two parts is a sigmoid.
    share = jax.nn.sigmoid(prompt_sum - response_sum)[..., None]
    y = share * of_prompt.astype(jnp.float32) + (1 - share) * of_response.astype(jnp.float32)
    return y.astype(q.dtype).reshape(rows, heads, 1, c)


def _part(
    q: Float[Array, "batch kv_head query c"],
    k: Float[Array, "batch kv_head c key"],
    v: Float[Array, "batch kv_head key c"],
    mask: Bool[Array, "batch key"],
    interpret: bool,
) -> tuple[Float[Array, "batch kv_head query c"], Float[Array, "batch kv_head query"]]:
    """Attention of all queries to the keys in ``mask``, and the logsumexp of their scores, finite without any key."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    kv_heads, queries = q.shape[1:3]
    q = _padded(q, 2, SUBLANES if queries <= LANES else LANES)
    k, v, mask = _padded(k, 3, LANES), _padded(v, 2, LANES), _padded(mask, 1, LANES)
    many, keys = q.shape[2], v.shape[2]
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.FullMask((many, keys))] * kv_heads),
        block_sizes=library.BlockSizes(
            block_q=_block(many) if many % LANES == 0 else many,
            block_kv=_block(keys),
            k_layout=library.QKVLayout.SEQ_MINOR,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )

    def attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
        # The kernel's arguments are [time, c] whatever its layout: it undoes this transposition.
        segments = library.SegmentIds(jnp.ones(many, jnp.int32), _numbers(mask))
        y, (total,) = kernel(q, k.swapaxes(1, 2), v, segments)
        return y, total

    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
        y, total = jax.vmap(attend)(q, k, v, mask)
    return y[:, :, :queries], total[:, :, :queries]


def _numbers(segments: Array) -> Int[Array, "..."]:
    """Segments as int32; a mask becomes segment 1, and 0 elsewhere."""
    if segments.dtype != bool:
        return segments
    # No `astype`: compiling one for TPU v5p ends libtpu 0.0.42 at some shapes.
    return jnp.where(segments, jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32))


def _padded(x: Array, axis: int, multiple: int) -> Array:
    """``x`` with zeros behind, up to a multiple."""
    widths = [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _block(length: int) -> int:
    """The largest block that divides a multiple of 128: small ones keep the units waiting, large ones the memory."""
    return next(block for block in (512, 256, LANES) if length % block == 0)
