"""Fused attention for TPUs in Pallas: JAX's splash kernel over whole sequences and in a decode step, and one of our own
for a decode step, which reads a cache as it is stored.

On a mesh they are called by `attention_parallel.over_devices`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.attention_parts import LOWEST, TINY, loaded, over_two_parts, padded
from rlstab_jax.models.pallas import exact
from rlstab_jax.models.precision import Format, Stored

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
    q, k, v = (padded(x, 2, LANES) for x in (q, k, v))
    ids = padded(_numbers(segments), 1, LANES)
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
    part = functools.partial(_splash_part, interpret=interpret)
    return over_two_parts(part, q, prompt, response, prompt_mask, response_mask)


def decode_flash(
    q: Float[Array, "rows head 1 c"],
    prompt: tuple[Stored, Stored],
    response: tuple[Stored, Stored],
    prompt_mask: Bool[Array, "prompts prompt_length"],
    response_mask: Bool[Array, "rows window"],
    format: Format = "none",
    interpret: bool = False,
) -> Float[Array, "rows head 1 c"]:
    """As `decode_splash`, on a cache as it is stored, `as_bytes` of ``format``: int8 and fp8 numbers are widened on the
    chip, so that they are read as they are; only 4-bit ones are widened before. No gradient.

    Scales are applied to the scores and to the weights, in float32; `decode_reference` in bfloat16 rounds the scaled
    keys and values. Only the blocks between a row's first and last key in the mask are read: an unfilled end of the
    window costs nothing.
    """
    if format == "float4_e2m1fn":
        (pk, pv), (rk, rv) = (loaded(part, format, q.dtype) for part in (prompt, response))
        prompt, response, format = (Stored(pk), Stored(pv)), (Stored(rk), Stored(rv)), "none"
    part = functools.partial(_flash_part, format=format, interpret=interpret)
    return over_two_parts(part, q, prompt, response, prompt_mask, response_mask)


def _splash_part(
    q: Float[Array, "batch kv_head query c"],
    k: Float[Array, "batch kv_head c key"],
    v: Float[Array, "batch kv_head key c"],
    mask: Bool[Array, "batch key"],
    interpret: bool,
) -> tuple[Float[Array, "batch kv_head query c"], Float[Array, "batch kv_head query"]]:
    """Attention of all queries to the keys in ``mask``, and the logsumexp of their scores, finite without any key."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    kv_heads, queries, c = q.shape[1:]
    q = padded(q * c**-0.5, 2, SUBLANES if queries <= LANES else LANES)
    k, v, mask = padded(k, 3, LANES), padded(v, 2, LANES), padded(mask, 1, LANES)
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


def _flash_part(
    q: Float[Array, "batch kv_head query c"],
    k: Stored,
    v: Stored,
    mask: Bool[Array, "batch key"],
    format: Format,
    interpret: bool,
) -> tuple[Float[Array, "batch kv_head query c"], Float[Array, "batch kv_head query"]]:
    """As `_splash_part`. A step of the grid attends to a block of one row's keys, all heads, with a running softmax."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, kv_heads, queries, c = q.shape
    q, mask = padded(q, 2, 2 * SUBLANES), padded(mask, 1, LANES)
    arrays = [q, _numbers(mask)[:, None], padded(k.values, 3, LANES), padded(v.values, 2, LANES)]
    if k.scale is not None and v.scale is not None:
        # Scales of values are [.., key, 1] at rest: along the lanes, as those of keys are, they need no padding.
        arrays += [padded(scale, 3, LANES) for scale in (k.scale, v.scale.swapaxes(2, 3))]
    many, keys = q.shape[2], mask.shape[1]
    block = _flash_block(keys, kv_heads * c * k.values.dtype.itemsize)
    filled = mask.reshape(batch, -1, block).any(-1)
    first = jnp.argmax(filled, axis=1).astype(jnp.int32)
    last = jnp.where(filled.any(1), filled.shape[1] - 1 - jnp.argmax(filled[:, ::-1], axis=1), -1).astype(jnp.int32)

    def whole(*shape: int) -> Any:
        return pl.BlockSpec((1, *shape), lambda row, _, first, last: (row, *(0 for _ in shape)))

    def along(axis: int, *shape: int) -> Any:
        """A block of keys. One that is not needed is the last needed one again, which is not read twice."""

        def index(row: Array, step: Array, first: Array, last: Array) -> tuple:
            at = jnp.clip(step, first[row], jnp.maximum(last[row], 0))
            return (row, *(at if i == axis else 0 for i in range(1, len(shape) + 1)))

        return pl.BlockSpec((1, *shape), index)

    specs = [whole(kv_heads, many, c), along(2, 1, block), along(3, kv_heads, c, block), along(2, kv_heads, block, c)]
    specs += [along(3, kv_heads, 1, block)] * (len(arrays) - len(specs))
    column = (kv_heads, many, 1)
    y, total = pl.pallas_call(
        functools.partial(_flash_kernel, dtype=q.dtype if format == "none" else jnp.dtype(format)),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, (batch, *column))],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, keys // block),
            in_specs=specs,
            out_specs=[whole(kv_heads, many, c), whole(*column)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in (column, column, (kv_heads, many, c))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="flash_decode",
    )(first, last, *arrays)
    return y[:, :, :queries], total[:, :, :queries, 0]


def _flash_kernel(first: Any, last: Any, q: Any, mask: Any, k: Any, v: Any, *rest: Any, dtype: jnp.dtype) -> None:
    """One block of keys of one row: what the blocks before it left of the softmax is in the last three of ``rest``.

    ``k`` and ``v`` hold numbers of ``dtype``, as bytes if it is narrow; ``rest`` then begins with their scales.
    """
    from jax.experimental import pallas as pl

    *scales, y, total, highest, normaliser, sums = rest
    row, step = pl.program_id(0), pl.program_id(1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def widened(codes: Array) -> Array:
        return jax.lax.bitcast_convert_type(codes, dtype).astype(q.dtype)

    @pl.when(step == 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, LOWEST)
        normaliser[...] = jnp.zeros_like(normaliser)
        sums[...] = jnp.zeros_like(sums)

    chunk = _block(mask.shape[-1])
    chunks = mask.shape[-1] // chunk

    def attend(number: Array, _: None) -> None:
        """One head and chunk: a block is large for the sake of reading it; a program of its size compiles slowly."""
        head = jax.lax.div(number, chunks)
        at = pl.ds(pl.multiple_of(jax.lax.rem(number, chunks) * chunk, chunk), chunk)
        attended = mask[0, :, at] != 0
        scores = dot(q[0, head], widened(k[0, head, :, at])) * q.shape[-1] ** -0.5
        scores = jnp.where(attended, scores * scales[0][0, head, :, at] if scales else scores, LOWEST)
        new = jnp.maximum(highest[head], scores.max(-1, keepdims=True))
        weights = jnp.where(attended, jnp.exp(scores - new), 0.0)
        kept = jnp.exp(highest[head] - new)
        highest[head] = new
        normaliser[head] = normaliser[head] * kept + weights.sum(-1, keepdims=True)
        weights = weights * scales[1][0, head, :, at] if scales else weights
        sums[head] = sums[head] * kept + dot(weights.astype(q.dtype), widened(v[0, head, at]))

    @pl.when((step >= first[row]) & (step <= last[row]))
    def _() -> None:
        jax.lax.fori_loop(0, q.shape[1] * chunks, attend, None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        some = jnp.maximum(normaliser[...], TINY)  # without any key the result is 0
        y[0] = sums[...] / some
        total[0] = highest[...] + jnp.log(some)


def _flash_block(keys: int, bytes_of_key: int) -> int:
    """The largest block of keys that divides a multiple of 128, at most 1 MiB of keys: with values, and a second buffer
    for each, a quarter of what a kernel may use of a TPU's fast memory."""
    blocks = (8192, 4096, 2048, 1024, 512, 256)
    return next((block for block in blocks if keys % block == 0 and block * bytes_of_key <= 2**20), LANES)


def _numbers(segments: Array) -> Int[Array, "..."]:
    """Segments as int32; a mask becomes segment 1, and 0 elsewhere."""
    if segments.dtype != bool:
        return segments
    # No `astype`: compiling one for TPU v5p ends libtpu 0.0.42 at some shapes.
    return jnp.where(segments, jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32))


def _block(length: int) -> int:
    """The largest block that divides a multiple of 128: small ones keep the units waiting, large ones the memory."""
    return next(block for block in (512, 256, LANES) if length % block == 0)
