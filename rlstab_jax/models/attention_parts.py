"""What fused kernels of a decode step share: a cache of two parts, the prompts' and the responses'."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.models.precision import Format, Stored, from_bytes, saturate

LOWEST = -1e30
TINY = 1e-37


def widened(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel of one decode step that takes arrays in the engine's dtype, on a cache as it is stored."""

    @functools.wraps(kernel)
    def attend(q: Array, prompt: tuple, response: tuple, *masks: Array, format: Format = "none") -> Array:
        return kernel(q, *(loaded(part, format, q.dtype) for part in (prompt, response)), *masks)

    return attend


def loaded(part: tuple[Stored, Stored], format: Format, dtype: jnp.dtype) -> tuple[Array, ...]:
    """A part of the cache in the engine's dtype."""
    return tuple(from_bytes(stored, format).load(dtype) for stored in part)


def over_two_parts(
    part: Callable[..., tuple[Array, Array]], q: Array, prompt: Any, response: Any, *masks: Array
) -> Float[Array, "rows head 1 c"]:
    """One call of ``part`` for the prompts' part of the cache, one for the responses', joined by their logsumexps.

    Args:
      part: of queries [batch, kv_head, query, c], a part of the cache and its mask: the attention of all queries, and
        the logsumexp of their scores [batch, kv_head, query], finite without any key.
    """
    rows, heads, _, c = q.shape
    prompts, kv_heads = len(masks[0]), jax.tree.leaves(prompt)[0].shape[1]
    samples, group = rows // prompts, heads // kv_heads
    q = q.reshape(rows, kv_heads, group, c)

    def by_row(x: Array) -> Array:  # [prompts, kv_head, samples * group, ...] -> [rows, kv_head, group, ...]
        x = x.reshape(prompts, kv_heads, samples, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(rows, kv_heads, group, *x.shape[4:])

    by_prompt = q.reshape(prompts, samples, kv_heads, group, c).swapaxes(1, 2).reshape(prompts, kv_heads, -1, c)
    of_prompt, prompt_sum = (by_row(x) for x in part(by_prompt, *prompt, masks[0]))
    of_response, response_sum = part(q, *response, masks[1])
    # The softmax over two parts is a sigmoid.
    share = jax.nn.sigmoid(prompt_sum - response_sum)[..., None]
    y = share * of_prompt.astype(jnp.float32) + (1 - share) * of_response.astype(jnp.float32)
    return saturate(y, q.dtype).reshape(rows, heads, 1, c)


def padded(x: Array, axis: int, multiple: int) -> Array:
    """``x`` with zeros behind, up to a multiple."""
    widths = [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)
