"""Which parameters an engine stores in fp8, and along which axis their scales lie."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from rlstab_jax.inference import prepare
from rlstab_jax.models import Precision, fp8
from rlstab_jax.models.transformer import SCALE

UNTIED = dataclasses.replace(tiny.MIXED, tie_embeddings=False)
LINEAR = {"q", "k", "v", "o", "gate", "up", "down"}


def quantised(config: object, precision: Precision) -> set[str]:
    """Names of the parameters that have scales: the module's or, for experts, the parameter's own."""
    flat = traverse_util.flatten_dict(prepare(tiny.parameters(config), precision)[SCALE])
    return {path[-2] if path[-1] == "kernel" else path[-1] for path in flat}


@pytest.mark.parametrize(
    ("changes", "tied", "untied"),
    [
        ({}, LINEAR | {"router", "embedding"}, LINEAR | {"router", "lm_head"}),
        ({"quantise_router": False}, LINEAR | {"embedding"}, LINEAR | {"lm_head"}),
        ({"quantise_lm_head": False}, LINEAR | {"router"}, LINEAR | {"router"}),
        ({"weights": "none"}, set(), set()),
    ],
)
def test_exemptions(changes: dict, tied: set[str], untied: set[str]) -> None:
    assert quantised(tiny.MIXED, fp8(**changes)) == tied
    assert quantised(UNTIED, fp8(**changes)) == untied


def test_stored_values_and_scales() -> None:
    params = tiny.parameters()
    variables = prepare(params, fp8(quantise_router=False, dtype="bfloat16"))
    flat, scales, source = (
        traverse_util.flatten_dict(tree) for tree in (variables["params"], variables[SCALE], params)
    )
    assert flat.keys() == source.keys()
    for path, leaf in source.items():
        stored = flat[path]
        if path[-1] == "gain" or "router" in path:
            assert stored.dtype == jnp.float32
            np.testing.assert_array_equal(stored, leaf)
            continue
        assert stored.dtype == jnp.float8_e4m3fn
        axis = -1 if path == ("embedding",) else -2  # one scale per output channel; per token of a tied embedding
        expected = np.abs(np.asarray(leaf)).max(axis, keepdims=True) * (1 / np.float32(448))
        np.testing.assert_array_equal(scales[path], expected)
        loaded = np.asarray(stored, np.float32) * np.asarray(scales[path])
        # Three bits behind the point: half a unit in the last place is 1/16 of the value; below 2^-6 it is 2^-10.
        error = np.abs(loaded - leaf)
        assert (error <= np.maximum(np.abs(leaf) / 16, expected * 2**-10) * 1.001).all()
        assert (np.abs(np.asarray(stored, np.float32)).max(axis) == 448).all()


def test_plain_engines() -> None:
    for dtype in ("float32", "bfloat16"):
        flat = traverse_util.flatten_dict(prepare(tiny.parameters(UNTIED), Precision(dtype))["params"])
        for path, leaf in flat.items():
            kept = path[-1] == "gain" or "router" in path
            assert leaf.dtype == (jnp.float32 if kept else jnp.dtype(dtype)), path
