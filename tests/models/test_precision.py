"""Stored values against ml_dtypes bit for bit, and the one matrix product against NumPy."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rlstab_jax.models.precision import Precision, fp8, matmul, store

FORMATS = {"float8_e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "float8_e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def stored_by_numpy(x: np.ndarray, name: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    dtype, largest = FORMATS[name]
    amax = np.abs(x).max(axis, keepdims=True)
    scale = np.where(amax > 0, amax * (1 / np.float32(largest)), np.float32(1))
    return np.clip(x / scale, -largest, largest).astype(dtype), scale


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_store_equals_ml_dtypes(name: str, axis: int) -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((64, 48)).astype(np.float32) * np.exp(generator.standard_normal((64, 1)) * 8)
    x = x.astype(np.float32)
    x[3], x[:, 5] = 0, 0
    stored = store(jnp.asarray(x), name, axis)
    values, scale = stored_by_numpy(x, name, axis)
    np.testing.assert_array_equal(np.asarray(stored.values).view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(stored.scale, scale)


@pytest.mark.parametrize("name", FORMATS)
def test_store_saturates_and_keeps_zeros(name: str) -> None:
    """x / scale can round up past the largest value, which casts to NaN; a row of zeros has no scale."""
    x = np.random.default_rng(1).standard_normal((4096, 3)).astype(np.float32)
    x[7] = 0
    loaded = np.asarray(store(jnp.asarray(x), name).load())
    assert np.isfinite(loaded).all()
    assert (loaded[7] == 0).all()
    largest = np.abs(x).argmax(1)
    rows = np.arange(len(x))
    np.testing.assert_allclose(loaded[rows, largest], x[rows, largest], rtol=3e-7)


def test_infinity_is_stored_as_nan_and_shows() -> None:
    """An overflow upstream must not turn into plausible numbers."""
    stored = store(jnp.asarray([[jnp.inf, 1.0]]), "float8_e4m3fn")
    assert not np.isfinite(np.asarray(stored.load())).all()


@pytest.mark.parametrize("activations", ["none", "float8_e4m3fn"])
@pytest.mark.parametrize("weights", ["none", "float8_e5m2"])
def test_product_of_stored_values(activations: str, weights: str) -> None:
    generator = np.random.default_rng(2)
    x, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, 32), (32, 7)))
    precision = Precision(weights=weights, activations=activations)
    y = matmul(jnp.asarray(x), store(jnp.asarray(w), weights, -2), precision, "float32")

    def loaded(values: np.ndarray, name: str, axis: int) -> np.ndarray:
        if name == "none":
            return values.astype(np.float64)
        stored, scale = stored_by_numpy(values, name, axis)
        return stored.astype(np.float64) * scale

    np.testing.assert_allclose(y, loaded(x, activations, -1) @ loaded(w, weights, -2), rtol=2e-6, atol=2e-5)


def test_fp8_overrides() -> None:
    precision = fp8("float8_e5m2", kv_cache="none", quantise_router=False)
    assert (precision.weights, precision.activations, precision.kv_cache) == ("float8_e5m2", "float8_e5m2", "none")
    assert not precision.quantise_router
    assert precision.exempt().weights == precision.exempt().activations == "none"
