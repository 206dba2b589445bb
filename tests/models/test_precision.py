"""Stored values against ml_dtypes bit for bit, and the one matrix product against NumPy."""

import dataclasses
from functools import partial
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from rlstab_jax.models.precision import (
    Precision,
    Stored,
    as_bytes,
    fp8,
    from_bytes,
    quantised,
    saturate,
    saturating,
    store,
    store_activations,
    store_blocks,
    store_weight,
)
from rlstab_jax.models.products import matmul, take
from rlstab_jax.types import UserError
from tests.xla import exact

FORMATS = {
    "int8": (np.int8, 127.0),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0),
    "float8_e5m2": (ml_dtypes.float8_e5m2, 57344.0),
    "float4_e2m1fn": (ml_dtypes.float4_e2m1fn, 6.0),
}
TINY = np.finfo(np.float32).tiny
SHAPE, HEIGHT, WIDTH = (5, 7), 2, 3  # 3 x 3 blocks, the last ones shorter


def by_numpy(x: np.ndarray, name: str, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, from the largest absolute value that each number shares its scale with."""
    dtype, largest = FORMATS[name]
    x, amax = (np.where(np.abs(a) < TINY, np.float32(0), a) for a in (x, amax))
    scale = np.where(amax > 0, np.maximum(amax * (1 / np.float32(largest)), TINY), np.float32(1))
    ratio = np.clip(x / scale, -largest, largest)
    return (np.rint(ratio) if name == "int8" else ratio).astype(dtype), scale


def along(x: np.ndarray, axis: int) -> np.ndarray:
    return np.broadcast_to(np.abs(x).max(axis, keepdims=True), x.shape)


def in_blocks(x: np.ndarray, height: int, width: int) -> np.ndarray:
    amax = np.empty_like(x)
    for i in range(0, x.shape[-2], height):
        for j in range(0, x.shape[-1], width):
            block = np.s_[..., i : i + height, j : j + width]
            amax[block] = np.abs(x[block]).max((-2, -1), keepdims=True)
    return amax


def loaded(x: np.ndarray, name: str, amax: np.ndarray) -> np.ndarray:
    if name == "none":
        return x.astype(np.float64)
    values, scale = by_numpy(x, name, amax)
    return values.astype(np.float64) * scale


def assert_stored(stored: Stored, values: np.ndarray, scale: np.ndarray) -> None:
    assert np.asarray(stored.values).dtype == values.dtype
    np.testing.assert_array_equal(np.asarray(stored.values).view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(stored.scale, scale)


jitted_store = jax.jit(store, static_argnums=(1, 2), **exact())
jitted_store_blocks = jax.jit(store_blocks, static_argnums=(1, 2, 3), **exact())


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_all_sizes() -> np.ndarray:
    x = random(0, 64, 48) * np.exp(random(1, 64, 1) * 8)
    x[3], x[:, 5] = 0, 0
    return x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_store_equals_ml_dtypes(name: str, axis: int) -> None:
    x = of_all_sizes()
    values, scale = by_numpy(x, name, along(x, axis))
    assert_stored(jitted_store(x, name, axis), values, scale[:, :1] if axis == -1 else scale[:1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [(16, 16), (7, 11), (1, 16), (128, 128)])
def test_store_blocks_equals_ml_dtypes(name: str, block: tuple[int, int]) -> None:
    x = of_all_sizes()
    values, scale = by_numpy(x, name, in_blocks(x, *block))
    assert_stored(jitted_store_blocks(x, name, *block), values, scale[:: block[0], :: block[1]])


# All finite float32 numbers, and often those on which rounding and saturation turn.
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-39, float(TINY), 3.4028234663852886e38, -3.4e38]),
    st.sampled_from(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 448.0, 57344.0, 127.0, 63.5, 0.5, -2.5, 2**-9, 2**-16]
    ),
)


@pytest.mark.parametrize("name", FORMATS)
@hypothesis.settings(max_examples=40, deadline=None, database=None)
@hypothesis.given(x=arrays.arrays(np.float32, SHAPE, elements=NUMBERS, fill=st.just(np.float32(0))))
def test_every_number_is_stored_as_ml_dtypes_would(name: str, x: np.ndarray) -> None:
    values, scale = by_numpy(x, name, along(x, -1))
    assert_stored(jitted_store(x, name, -1), values, scale[:, :1])
    values, scale = by_numpy(x, name, in_blocks(x, HEIGHT, WIDTH))
    assert_stored(jitted_store_blocks(x, name, HEIGHT, WIDTH), values, scale[::HEIGHT, ::WIDTH])


@pytest.mark.parametrize("name", FORMATS)
def test_store_saturates_and_keeps_zeros(name: str) -> None:
    """x / scale can round up past the largest value, which casts to NaN or infinity; a row of zeros has no scale."""
    x = random(1, 4096, 3)
    x[7] = 0
    numbers = np.asarray(store(jnp.asarray(x), name).load())
    assert np.isfinite(numbers).all()
    assert (numbers[7] == 0).all()
    largest = np.abs(x).argmax(1)
    rows = np.arange(len(x))
    np.testing.assert_allclose(numbers[rows, largest], x[rows, largest], rtol=3e-7)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_show(name: str, bad: float) -> None:
    """An overflow upstream must not turn into plausible numbers, not even in formats that have no NaN."""
    x = jnp.asarray([[bad, 1.0], [2.0, 1.0]])
    for stored in (store(x, name), store_blocks(x, name, 1, 2)):
        numbers = np.asarray(stored.load(block=2))
        assert not np.isfinite(numbers[0]).any()
        assert np.isfinite(numbers[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_saturate(dtype: str) -> None:
    x = np.array([65504.0, 65519.0, 65520.0, -1e30, 1.0, 1e-8, np.inf, -np.inf], np.float32)
    got = np.asarray(jax.jit(saturate, static_argnums=1)(x, dtype)).astype(np.float32)
    want = np.clip(x, -65504, 65504) if dtype == "float16" else x
    want = np.where(np.isinf(x), x, want).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    assert np.isnan(saturate(jnp.float32(np.nan), dtype))
    assert np.isfinite(np.asarray(saturate(jnp.asarray([65520.0, -1e38], "bfloat16"), dtype), np.float32)).all()
    half = jnp.asarray([60000.0, 1.5], dtype)
    total, product = saturating(jnp.add, half, half), saturating(jnp.multiply, half, half)
    assert total.dtype == product.dtype == jnp.dtype(dtype)
    assert np.isfinite(np.asarray(total, np.float32)).all()
    assert np.isfinite(np.asarray(product, np.float32)).all()
    assert (total[1], product[1]) == (3, 2.25)
    if dtype == "float16":
        assert total[0] == product[0] == 65504


def test_a_float16_product_saturates() -> None:
    x, w = jnp.full((2, 8), 300.0), jnp.full((8, 3), 300.0)
    assert (matmul(x, Stored(w), Precision("float16"), "float16") == 65504).all()
    assert (matmul(x, Stored(w), Precision("float16"), "float32") == 720_000).all()
    stored = quantised("int8", dtype="float16")
    assert (matmul(x, store_weight(w, stored), stored, "float16") == 65504).all()
    assert (store(jnp.asarray([[1e6, 1.0]]), "float8_e4m3fn").load("float16")[0, 0]) == 65504


CONTRACTED, COLUMNS, BLOCK = 40, 21, 16  # blocks of 16, 16, 8 by 16, 5
multiply = jax.jit(
    lambda x, w, precision: matmul(x, store_weight(w, precision), precision, "float32"),
    static_argnames="precision",
    **exact(),
)


def expected_product(x: np.ndarray, w: np.ndarray, precision: Precision) -> np.ndarray:
    """Sum over contracted blocks of narrow products times both scales, which is the product of the loaded numbers."""
    if precision.scales == "block":
        of_x, of_w = in_blocks(x, 1, precision.block), in_blocks(w, precision.block, precision.block)
    else:
        of_x, of_w = along(x, -1), along(w, -2)
    return loaded(x, precision.activations, of_x) @ loaded(w, precision.weights, of_w)


@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int8", "none"),
        ("none", "int8"),
        ("int8", "int8"),
        ("int8", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e4m3fn"),
        ("float4_e2m1fn", "float8_e4m3fn"),
        ("float4_e2m1fn", "float4_e2m1fn"),
    ],
)
def test_product_of_stored_values(weights: str, activations: str, scales: str) -> None:
    """Also of mixed formats. Blocks of very different size would show a scale that is applied to another block."""
    x, w = random(2, 6, CONTRACTED), random(3, CONTRACTED, COLUMNS)
    x[:, :BLOCK] *= 100
    w[BLOCK : 2 * BLOCK, BLOCK:] *= 1000
    precision = Precision(weights=weights, activations=activations, scales=scales, block=BLOCK)
    want = expected_product(x, w, precision)
    np.testing.assert_allclose(multiply(x, w, precision), want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("block", [1, 3, 8, 128])
def test_blocks_of_every_length(block: int) -> None:
    """One number to a block, more blocks than are unrolled, a whole number of blocks, and one block larger than all."""
    x, w = random(4, 6, CONTRACTED), random(5, CONTRACTED, COLUMNS)
    precision = quantised("float8_e4m3fn", scales="block", block=block)
    want = expected_product(x, w, precision)
    np.testing.assert_allclose(multiply(x, w, precision), want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_batch_axes(batch: tuple[int, ...]) -> None:
    """A product for each index of the leading axes is the product of the slices, bit for bit."""
    x, w = random(6, *batch, 4, CONTRACTED), random(7, *batch, CONTRACTED, COLUMNS)
    for scales in ("channel", "block"):
        precision = quantised("int8", scales=scales, block=BLOCK)
        got = multiply(x, w, precision)
        for index in np.ndindex(batch):
            np.testing.assert_array_equal(got[index], multiply(x[index], w[index], precision))


def integers(seed: int, *shape: int) -> np.ndarray:
    """Integers up to 127, the largest in each row and column: stored in int8, their scales are 1."""
    x = np.random.default_rng(seed).integers(-127, 128, shape).astype(np.float32)
    x[..., 0], x[..., 0, :] = 127, 127
    return x


@pytest.mark.parametrize("products", ["emulated", "native"])
@pytest.mark.parametrize("contracted", [40, 2048, 12_000])
def test_int8_products_are_exact(contracted: int, products: str) -> None:
    """2048 numbers already sum past 2^24, where float32 sums lose units; the int32 sum is then rounded once."""
    x, w = integers(8, 3, contracted), integers(9, contracted, 5)
    x[1], w[:, 1] = 127, 127
    exact = x.astype(np.int64) @ w.astype(np.int64)
    assert contracted < 2000 or exact.max() > 2**24
    got = multiply(x, w, quantised("int8", products=products))
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert (store(jnp.asarray(w), "int8", -2).scale == 1).all()


def test_int8_products_with_scales_are_exact_until_scaled() -> None:
    x, w = random(10, 6, 3000), random(11, 3000, 9)
    (vx, sx), (vw, sw) = by_numpy(x, "int8", along(x, -1)), by_numpy(w, "int8", along(w, -2))
    exact = (vx.astype(np.int64) @ vw.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(multiply(x, w, quantised("int8")), exact * sx[:, :1] * sw[:1])


@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int8", "int8"),
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e5m2"),
        ("float8_e5m2", "float8_e4m3fn"),
        ("float4_e2m1fn", "float4_e2m1fn"),
        ("float4_e2m1fn", "float8_e4m3fn"),
    ],
)
def test_native_products(weights: str, activations: str, scales: str) -> None:
    """Narrow operands as they are: float32 noise apart from emulation, and equal where the sum is exact."""
    emulated = Precision(weights=weights, activations=activations, scales=scales, block=BLOCK)
    native = dataclasses.replace(emulated, products="native")
    x, w = random(12, 6, CONTRACTED), random(13, CONTRACTED, COLUMNS)
    want = multiply(x, w, emulated)
    np.testing.assert_allclose(multiply(x, w, native), want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    # Where every number is the largest of its format, scales are 1 and no sum is rounded.
    x, w = np.sign(x) * FORMATS[activations][1], np.sign(w) * FORMATS[weights][1]
    np.testing.assert_array_equal(multiply(x, w, native), x.astype(np.float64) @ w)
    np.testing.assert_array_equal(multiply(x, w, emulated), x.astype(np.float64) @ w)


def dots(precision: Precision) -> list[tuple[str, str]]:
    """The types of both operands of each matrix product."""
    x, w = jnp.ones((4, CONTRACTED)), store_weight(jnp.ones((CONTRACTED, COLUMNS)), precision)
    jaxpr = jax.make_jaxpr(lambda x, w: matmul(x, w, precision, "float32"))(x, w)
    found = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(tuple(str(v.aval.dtype) for v in equation.invars))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    walk(inner.jaxpr)

    walk(jaxpr.jaxpr)
    return found


def test_which_types_are_multiplied() -> None:
    for name in ("float8_e4m3fn", "float8_e5m2"):
        assert dots(quantised(name)) == [("float32", "float32")]
        assert dots(quantised(name, products="native")) == [(name, name)]
    assert dots(quantised("float4_e2m1fn")) == [("float32", "float32")]
    assert dots(quantised("float4_e2m1fn", products="native")) == [("float8_e4m3fn", "float8_e4m3fn")]
    for products in ("emulated", "native"):
        assert dots(quantised("int8", products=products)) == [("int8", "int8")]
    assert dots(Precision("float16")) == [("float16", "float16")]
    blocks = dots(quantised("int8", scales="block", block=BLOCK))
    assert blocks == [("int8", "int8")] * 3


@pytest.mark.parametrize(
    ("name", "scales"),
    [("none", "channel"), ("float8_e4m3fn", "channel"), ("float4_e2m1fn", "block"), ("int8", "block")],
)
def test_rows_of_a_stored_matrix(name: str, scales: str) -> None:
    """A tied embedding is looked up by row, with the scales that it has as the transposed head."""
    table = random(15, 37, 24)
    precision = Precision(weights=name, scales=scales, block=BLOCK)
    rows = np.array([[0, 36, 15], [16, 31, 32]])
    got = take(store_weight(jnp.asarray(table), precision, transposed=True), jnp.asarray(rows), precision)
    amax = in_blocks(table, BLOCK, BLOCK) if scales == "block" else along(table, -1)
    np.testing.assert_array_equal(got, loaded(table, name, amax)[rows].astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_cache_is_read_and_written(name: str) -> None:
    """What decoding does with stored keys and values: pad, repeat, write a column in a loop, gather rows, load."""
    x, new = random(16, 2, 3, 4, 8), random(17, 4, 3, 1, 8)

    @jax.jit
    def run(stored: Stored, column: Stored) -> tuple[Stored, jax.Array]:
        stored, column = as_bytes(stored), as_bytes(column)
        cache = jax.tree.map(lambda a: jnp.repeat(jnp.pad(a, ((0, 0), (0, 0), (0, 3), (0, 0))), 2, axis=0), stored)

        def write(i: jax.Array, cache: Stored) -> Stored:
            return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=4 + i, axis=2), cache, column)

        cache = jax.lax.fori_loop(0, 2, write, cache)
        return cache, from_bytes(jax.tree.map(lambda a: a[jnp.array([3, 0])], cache), name).load()

    cache, picked = run(store(jnp.asarray(x), name), store(jnp.asarray(new), name))
    assert cache.values.dtype == ("int8" if name == "int8" else "uint8")
    want = np.zeros((4, 3, 7, 8), np.float32)
    want[:, :, :4] = np.repeat(loaded(x, name, along(x, -1)), 2, axis=0)
    want[:, :, 4:6] = loaded(new, name, along(new, -1))
    assert from_bytes(cache, name).values.dtype == name
    np.testing.assert_array_equal(from_bytes(cache, name).load(), want)
    np.testing.assert_array_equal(picked, want[[3, 0]])


def test_every_code_survives_as_a_byte() -> None:
    for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"):
        codes = np.arange(16 if name == "float4_e2m1fn" else 256, dtype=np.uint8)
        values = jnp.asarray(codes.view(FORMATS[name][0]))
        moved = as_bytes(Stored(values))
        np.testing.assert_array_equal(moved.values, codes)
        back = np.asarray(from_bytes(moved, name).values)
        np.testing.assert_array_equal(back.view(np.uint8), codes)
    for unchanged in (jnp.ones(3), jnp.ones(3, jnp.float16), jnp.ones(3, jnp.int8)):
        assert as_bytes(Stored(unchanged)).values is unchanged


def test_activations_by_block_are_stored_by_token() -> None:
    precision = quantised("int8", scales="block", block=BLOCK)
    stored = store_activations(jnp.asarray(random(18, 2, 5, CONTRACTED)), precision)
    assert stored.scale.shape == (2, 5, 3)
    assert store_weight(jnp.ones((2, CONTRACTED, COLUMNS)), precision).scale.shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (quantised("int8", scales="block", block=0), r"rollout.precision.block = 0: expected at least 1"),
        (Precision(scales="block"), r"rollout.precision.scales = 'block', but neither"),
        (Precision(scales="block", kv_cache="int8"), r"rollout.precision.scales = 'block', but neither"),
        (
            fp8(activations="none", float32_lm_head=True),
            r"rollout.precision.float32_lm_head and rollout.precision.quantise_lm_head with weights in float8_e4m3fn",
        ),
        (Precision(products="native"), r"products = 'native' with weights in none and activations in none"),
        (Precision(weights="int8", products="native"), r"'native' with weights in int8 and activations in none"),
        (
            quantised("int8", weights="float8_e5m2", products="native"),
            r"weights in float8_e5m2 and activations in int8",
        ),
    ],
)
def test_contradictions_are_one_line(precision: Precision, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        precision.validate(tiny.MIXED, "rollout.precision")
    assert "\n" not in str(error.value)


def test_a_float32_head_goes_with_what_quantises_no_head() -> None:
    for precision in (Precision("bfloat16"), Precision(kv_cache="int8"), fp8(quantise_lm_head=False)):
        dataclasses.replace(precision, float32_lm_head=True).validate(tiny.MIXED)


def test_sizes_that_int8_cannot_sum() -> None:
    wide = dataclasses.replace(tiny.MIXED, mlp_dim=133_145)
    for precision in (quantised("int8"), quantised("int8", scales="block", block=200_000)):
        with pytest.raises(UserError, match=r"model.mlp_dim = 133145: an int32 holds the sum of 133144 products"):
            precision.validate(wide)
    for precision in (quantised("int8", scales="block"), quantised("int8", activations="none"), fp8(), Precision()):
        precision.validate(wide)
    quantised("int8").validate(dataclasses.replace(wide, mlp_dim=133_144))
    quantised("int8").validate(dataclasses.replace(wide, dense_layers=()))  # has no dense layer


def test_overrides() -> None:
    precision = fp8("float8_e5m2", kv_cache="none", quantise_router=False)
    assert (precision.weights, precision.activations, precision.kv_cache) == ("float8_e5m2", "float8_e5m2", "none")
    assert not precision.quantise_router
    assert precision.exempt().weights == precision.exempt().activations == "none"
    assert quantised("int8", scales="block") == Precision("float32", "int8", "int8", "int8", "block")
