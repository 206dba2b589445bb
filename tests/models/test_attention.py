"""The reference attention against a loop in NumPy, with grouped heads and several sequences a row; stages, chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.models.attention import BLOCK, chunked, decode_reference, reference


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros_like(q)
    share = q.shape[1] // k.shape[1]  # consecutive query heads share a key head
    for b, h, t in np.ndindex(q.shape[:3]):
        keep = mask[b, t]
        scores = k[b, h // share, keep] @ q[b, h, t] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights / weights.sum() @ v[b, h // share, keep]
    return out


def test_grouped_query_attention() -> None:
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, 6, 7, 4))
    k, v = generator.standard_normal((2, 2, 3, 7, 4))
    fed = np.ones((2, 7), bool)
    fed[1, [0, 1, 6]] = False
    got = reference(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(fed))
    wanted = oracle(q, k, v, np.tril(np.ones((7, 7), bool)) & (fed[:, None] | np.eye(7, dtype=bool)))
    for row in range(2):
        np.testing.assert_allclose(got[row][:, fed[row]], wanted[row][:, fed[row]], atol=1e-6)


def test_sequences_of_a_row_do_not_see_each_other() -> None:
    generator = np.random.default_rng(2)
    q = generator.standard_normal((2, 6, 7, 4))
    k, v = generator.standard_normal((2, 2, 3, 7, 4))
    segments = np.array([[0, 1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 1, 2, 2]], np.int32)
    got = reference(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(segments))
    wanted = oracle(q, k, v, np.tril(np.ones((7, 7), bool)) & (segments[:, :, None] == segments[:, None]))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_what_is_not_fed_is_not_read_and_a_row_without_keys_is_finite() -> None:
    generator = np.random.default_rng(1)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in generator.standard_normal((3, 1, 2, 3, 4)))
    fed = jnp.asarray([[False, True, True]])
    first = reference(q, k, v, fed)
    second = reference(q, k.at[:, :, 0].set(1e4), v.at[:, :, 0].set(-1e9), fed)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first[:, :, 1:], second[:, :, 1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_decode_step_rounds_as_the_whole_sequence_does(dtype: str) -> None:
    """The last query, over a prompt's and a response's part of its keys; values so large that in float16 a weight that
    is rounded up, or a sum that is, would be infinite."""
    generator = np.random.default_rng(3)
    rows, prompt, time = 64, 4, 9
    q, k = (jnp.asarray(3 * generator.standard_normal((rows, h, time, 8)), dtype) for h in (4, 2))
    v = jnp.asarray(generator.choice([65504, -65504, 1.0], (rows, 2, time, 8), p=[0.8, 0.1, 0.1]), dtype)
    whole = jax.jit(reference)(q, k, v, jnp.ones((rows, time), bool))[:, :, -1:]
    parts = [(k[:, :, at].swapaxes(2, 3), v[:, :, at]) for at in (slice(prompt), slice(prompt, time))]
    masks = jnp.ones((rows, prompt), bool), jnp.ones((rows, time - prompt), bool)
    step = jax.jit(decode_reference)(q[:, :, -1:], *parts, *masks)
    assert np.isfinite(np.float32(step)).all()
    assert np.mean(np.asarray(step) != np.asarray(whole)) < 0.01  # sums in another order, at the border of two numbers
    np.testing.assert_allclose(np.float32(step), np.float32(whole), rtol=2**-6, atol=1)


def test_softmax_is_float32_in_bfloat16() -> None:
    """Scores that bfloat16 cannot tell apart must still be weighed by their difference."""
    q = jnp.full((1, 1, 2, 2), 16.0, jnp.bfloat16)
    k = jnp.asarray([[16.0, 16.0], [16.0, 15.9375]], jnp.bfloat16)[None, None]
    v = jnp.asarray([[1.0, 0.0], [0.0, 1.0]], jnp.bfloat16)[None, None]
    got = reference(q, k, v, jnp.ones((1, 2), bool))[0, 0, 1]
    share = 1 / (1 + np.exp(-1 / np.sqrt(2)))  # the scores are 512 / sqrt 2 and 511 / sqrt 2
    np.testing.assert_allclose(np.asarray(got, np.float32), [share, 1 - share], atol=4e-3)


def gradients(kernel: Callable, segments: Any, *arrays: Any) -> Any:
    """Of the sum of the result's sines, and the result."""

    def loss(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        y = kernel(*arrays, segments)
        return jnp.sin(y).sum(), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """All scores at once, half of them to be masked."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    mask = jnp.tril(jnp.ones((q.shape[2],) * 2, bool)) & (segments[:, :, None] == segments[:, None])
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bhkc->bhqc", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)), v)


@pytest.mark.parametrize("time", [4 * BLOCK + 70, BLOCK + 5])
def test_stages_and_chunks_of_queries_equal_attention_at_once(time: int) -> None:
    """Stages of two blocks, of one, and of a part of one, with sequences that cross their borders; gradients too."""
    generator = np.random.default_rng(3)
    q = jnp.asarray(generator.standard_normal((2, 4, time, 8)), jnp.float32)
    k, v = jnp.asarray(generator.standard_normal((2, 2, 2, time, 8)), jnp.float32)
    column = np.arange(time)
    segments = jnp.asarray(np.stack([1 + (column > 100) + (column > 200), np.where(column < 250, 1, 0)]))
    for numbers in (segments, segments != 0):
        kernels = plain, reference, chunked
        wanted, *others = (jax.jit(partial(gradients, kernel))(numbers, q, k, v) for kernel in kernels)
        for got in others:
            jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, wanted)


def test_chunks_need_memory_in_proportion_to_the_length() -> None:
    def temporaries(kernel: Callable, time: int) -> int:
        array = jax.ShapeDtypeStruct((1, 2, time, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, time), bool)
        compiled = jax.jit(partial(gradients, kernel)).lower(segments, array, array, array).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long, whole = temporaries(chunked, 1024), temporaries(chunked, 2048), temporaries(reference, 2048)
    print(f"temporaries in MiB: chunked {short / 2**20:.1f} and {long / 2**20:.1f}, reference {whole / 2**20:.1f}")
    assert long < 2.2 * short
    assert long < whole / 4
