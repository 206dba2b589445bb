"""Which parameters an engine stores narrow, how their scales lie, and what its log-probs make of it."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from rlstab_jax.inference import prepare, with_noise
from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.models import ModelConfig, Precision, fp8, quantised
from rlstab_jax.models.by_layer import LAYERS, by_layer
from rlstab_jax.models.layers import SCALE
from rlstab_jax.models.transformer import embed, forward, logits_of
from tests.xla import virtual

UNTIED = dataclasses.replace(tiny.MIXED, tie_embeddings=False)
LINEAR = {"q", "k", "v", "o", "gate", "up", "down"}


def collection(variables: dict, name: str) -> dict[tuple[str, ...], jax.Array]:
    """The leaves of a collection by their path, which for those of a layer begins with its depth."""
    parts = variables.get(name, {}) | {depth: layer.get(name, {}) for depth, layer in variables[LAYERS].items()}
    return traverse_util.flatten_dict(parts)


def source_of(params: dict) -> dict[tuple[str, ...], jax.Array]:
    return collection(by_layer({"params": params}), "params")


def with_scales(config: object, precision: Precision) -> set[str]:
    """Names of the parameters that have scales: the module's or, for experts, the parameter's own."""
    flat = collection(prepare(tiny.parameters(config), precision), SCALE)
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
    assert with_scales(tiny.MIXED, fp8(**changes)) == tied
    assert with_scales(UNTIED, fp8(**changes)) == untied


def test_stored_values_and_scales() -> None:
    params = tiny.parameters()
    variables = prepare(params, fp8(quantise_router=False, dtype="bfloat16"))
    flat, scales, source = collection(variables, "params"), collection(variables, SCALE), source_of(params)
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
    for dtype in ("float32", "bfloat16", "float16"):
        flat = collection(prepare(tiny.parameters(UNTIED), Precision(dtype)), "params")
        for path, leaf in flat.items():
            kept = path[-1] == "gain" or "router" in path
            assert leaf.dtype == (jnp.float32 if kept else jnp.dtype(dtype)), path


@pytest.mark.parametrize("precision", [Precision("bfloat16"), fp8(dtype="bfloat16", quantise_lm_head=False)])
def test_a_float32_head_in_a_narrow_engine(precision: Precision) -> None:
    """Its weight stays as it is, and all else as it was; a tied embedding's rows are looked up in bfloat16."""
    wide = dataclasses.replace(precision, float32_lm_head=True)
    for config, head in ((tiny.MIXED, ("embedding",)), (UNTIED, ("lm_head", "kernel"))):
        params = tiny.parameters(config)
        plain, variables = prepare(params, precision), prepare(params, wide)
        before, after, source = collection(plain, "params"), collection(variables, "params"), source_of(params)
        assert before.pop(head).dtype == jnp.bfloat16
        np.testing.assert_array_equal(after.pop(head), source[head], strict=True)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), after, before)
        jax.tree.map(np.testing.assert_array_equal, collection(variables, SCALE), collection(plain, SCALE))
        found, wanted = (
            embed(tiny.model(config, of), at_rest, np.arange(17))
            for of, at_rest in ((wide, variables), (precision, plain))
        )
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, wanted)


def test_float16_weights_saturate() -> None:
    params = jax.tree.map(lambda a: a * np.float32(1e6), tiny.parameters(UNTIED))
    flat = collection(prepare(params, Precision("float16")), "params")
    largest = {path: np.abs(np.asarray(leaf, np.float32)).max() for path, leaf in flat.items()}
    assert {largest[path] for path, leaf in flat.items() if leaf.dtype == jnp.float16} == {65504.0}


def test_scales_by_block() -> None:
    """Squares of 8 over input and output, per expert and layer; a tied embedding has the blocks of its transpose."""
    params = tiny.parameters()
    scales = collection(prepare(params, fp8(scales="block", block=8)), SCALE)
    assert scales["embedding",].shape == (3, 4)  # 17 tokens, width 32
    up = "2", "moe", "up"
    assert scales[up].shape == (8, 4, 2)
    weight = np.asarray(source_of(params)[up])
    largest = np.abs(weight.reshape(8, 4, 8, 2, 8)).max((2, 4))
    np.testing.assert_array_equal(scales[up], largest * (1 / np.float32(448)))


SHALLOW = dataclasses.replace(tiny.MIXED, num_layers=1, dense_layers=())
PRECISIONS = {
    "float16": Precision("float16"),
    "bfloat16": Precision("bfloat16"),
    "int8": quantised("int8"),
    "e4m3": fp8(),
    "e4m3 native": fp8(products="native"),
    "e5m2 by block": fp8("float8_e5m2", scales="block", block=8),
    "4 bits": quantised("float4_e2m1fn"),
}


@functools.cache
def log_probs(precision: Precision, replay: bool = True) -> tuple[np.ndarray, Any]:
    """Log-probs [row, vocab] of a model of one layer on random tokens, and its routes; those of float32 if replayed."""
    model = tiny.model(SHALLOW, precision)
    tokens = np.random.default_rng(0).integers(0, SHALLOW.vocab_size, (4, 16))
    routes = log_probs(tiny.FLOAT32, replay=False)[1] if replay else None

    @jax.jit
    def run(variables: dict, routes: Any) -> tuple[jax.Array, jax.Array]:
        output = forward(model, variables, tokens, np.ones(tokens.shape, bool), routes)
        logits = logits_of(model, variables, output.hidden.reshape(-1, SHALLOW.embed_dim))
        return jax.nn.log_softmax(logits), output.routing.used

    return run(prepare(tiny.parameters(SHALLOW), precision), routes)


def error(name: str) -> float:
    """Median |d log-prob| against float32 with equal routes."""
    exact, _ = log_probs(tiny.FLOAT32, replay=False)
    return float(np.median(np.abs(log_probs(PRECISIONS[name])[0] - exact)))


@pytest.mark.parametrize("name", PRECISIONS)
def test_error_has_the_size_of_the_format(name: str) -> None:
    """Rounding errors are half a unit in the last place: 2^-12 in float16, 2^-9 in bfloat16, 2^-5 in e4m3, 2^-4 in
    e5m2, 2^-3 in 4 bits, each relative, and 1/254 of a row's largest in int8. They add up as noise does."""
    low, high = {
        "float16": (1e-5, 2e-3),
        "bfloat16": (1e-4, 2e-2),
        "int8": (1e-3, 5e-2),
        "e4m3": (5e-3, 2e-1),
        "e5m2": (1e-2, 4e-1),
        "4 bits": (5e-2, 1.5),
    }[name.removesuffix(" by block").removesuffix(" native")]
    assert low < error(name) < high


def test_errors_are_ordered_as_the_formats_are() -> None:
    ordered = [error(name) for name in ("float16", "bfloat16", "int8", "e4m3", "e5m2 by block", "4 bits")]
    assert ordered == sorted(ordered)
    native, emulated = (log_probs(PRECISIONS[name])[0] for name in ("e4m3 native", "e4m3"))
    assert np.median(np.abs(native - emulated)) < 1e-5


def test_noise_on_weights() -> None:
    """Of its size in each matrix, none on gains; another key draws another, and no size is no change."""
    params = tiny.parameters(tiny.MIXED)
    before, key = traverse_util.flatten_dict(params), jax.random.key(3)
    noisy, again, other, none = (
        traverse_util.flatten_dict(with_noise(params, size, key))
        for size, key in ((0.1, key), (0.1, key), (0.1, jax.random.key(4)), (0.0, key))
    )
    large = 0
    for path, leaf in before.items():
        np.testing.assert_array_equal(noisy[path], again[path])
        np.testing.assert_array_equal(none[path], leaf)
        errors = [np.asarray(of[path] - leaf) for of in (noisy, other)]
        if path[-1] == "gain":
            assert not errors[0].any()
            continue
        rms = float(jnp.sqrt(jnp.mean(leaf**2)))
        for error in errors:
            assert error.std() == pytest.approx(0.1 * rms, rel=5 / np.sqrt(2 * error.size))
        assert abs(np.mean(errors[0] * errors[1])) < 5 * (0.1 * rms) ** 2 / np.sqrt(leaf.size)
        large += leaf.size > 1000
    assert large > 3


def test_laid_out_on_meshes() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | virtual(8) | {"PYTHONPATH": str(root)}
    script = Path(__file__).with_name("prepared_on_meshes.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal in") == 4


@pytest.mark.optimised
def test_decoding_has_no_second_copy_of_the_weights() -> None:
    """Stacked layers are taken apart outside the loop over tokens, which copies them; those that lie apart are not. Nor
    does their cast make a copy in between."""
    config = ModelConfig(**(vars(SHALLOW) | {"expert_dim": 2048, "num_layers": 2}))
    model = tiny.model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    temporaries, stored = {}, 0
    for stacked in (False, True):
        prepared = functools.partial(prepare, precision=tiny.FLOAT32)
        variables = {"params": params["params"]} if stacked else jax.eval_shape(prepared, params["params"])
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
        program = sample_batch.lower(
            model, variables, *tiny.prompts(), tiny.keys(), tiny.sampling(),
            response_length=4, samples_per_prompt=tiny.SAMPLES, support=0, record_routes=True,
        ).compile()  # fmt: skip
        temporaries[stacked] = program.memory_analysis().temp_size_in_bytes
    assert temporaries[False] < stored / 10
    assert temporaries[True] > stored
    cast = prepare.lower(params["params"], Precision("bfloat16")).compile().memory_analysis()
    assert cast.temp_size_in_bytes < stored / 10 < cast.output_size_in_bytes
