"""On an accelerator: the bytes that a decode step must move, per second, against the copy bandwidth of the same run.

Decoding is bound by memory. A step reads the weights that every token passes, the experts that at least one token
touched, and the filled part of the KV cache, and writes one position of it; activations are left out, being small.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Contender, environment, measure
from rlstab_jax.inference import Sampling, sample, sample_keys
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, resolve_kernels
from rlstab_jax.models.by_layer import by_layer


@dataclasses.dataclass(frozen=True)
class Load:
    """What is decoded, in one dtype without quantisation. All layers MoE, the head untied."""

    model: ModelConfig
    """Sizes of the model."""
    batch: int
    """Rows."""
    prompt: int
    """Tokens of each prompt."""
    response: int
    """New tokens of each row."""
    precision: Precision = Precision(dtype="bfloat16")
    """Of weights, activations and KV cache."""
    copied: int = 2**30
    """Bytes of the buffer whose copy gives the bandwidth."""
    copies: int = 64
    """Copies in one timed run."""
    repetitions: int = 7
    """Timed runs."""


FULL = Load(
    model=ModelConfig(
        vocab_size=151_936,
        num_layers=12,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=64,
        experts_per_token=8,
        expert_dim=768,
        rope_theta=1e6,
    ),
    batch=64,
    prompt=512,
    response=512,
)
TINY = Load(
    model=ModelConfig(
        vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=8, expert_dim=16
    ),
    batch=2,
    prompt=4,
    response=4,
    copied=2**16,
    copies=4,
    repetitions=2,
)


def bytes_per_value(precision: Precision) -> int:
    return jnp.dtype(precision.dtype).itemsize


def common_bytes(load: Load) -> int:
    """Weights that every step reads: attention, norms and router of each layer, the final norm, the head.

    Norms and router are float32. Of the embedding a step reads one row for each token.
    """
    c, width = load.model, bytes_per_value(load.precision)
    query, key_value = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = width * c.embed_dim * (2 * query + 2 * key_value)
    float32 = 4 * (2 * c.embed_dim + 2 * c.head_dim + c.embed_dim * c.num_experts)
    head = width * c.embed_dim * c.vocab_size + 4 * c.embed_dim
    return c.num_layers * (attention + float32) + head + width * load.batch * c.embed_dim


def expert_bytes(load: Load) -> int:
    """The three matrices of one expert of one layer."""
    return bytes_per_value(load.precision) * 3 * load.model.embed_dim * load.model.expert_dim


def cache_bytes(load: Load, filled: int) -> int:
    """Keys and values of all layers: a step reads ``filled`` positions of each row, of which it wrote the last."""
    c = load.model
    return bytes_per_value(load.precision) * c.num_layers * load.batch * 2 * c.num_kv_heads * c.head_dim * (filled + 1)


def touched(routes: np.ndarray, num_experts: int) -> np.ndarray:
    """Distinct experts for each layer and position, [layer, fed], of routes [layer, batch, fed, k].

    A step decodes one position of every row. The sentinel is no expert.
    """
    return np.stack([(routes == expert).any((1, 3)) for expert in range(num_experts)]).sum(0)


def bytes_moved(load: Load, routes: np.ndarray) -> int:
    """Bytes of all decode steps of a rollout whose rows are full. The prompt's positions belong to the prefill."""
    steps = range(load.prompt, load.prompt + load.response - 1)  # the position that a step feeds
    experts = int(touched(routes, load.model.num_experts)[:, load.prompt :].sum())
    cache = sum(cache_bytes(load, position + 1) for position in steps)
    return len(steps) * common_bytes(load) + experts * expert_bytes(load) + cache


def parameters(load: Load) -> dict:
    """Random weights as `prepare` would store them, drawn on the device in their own dtype, one leaf at a time."""
    model = Transformer(load.model, load.precision, Kernels("reference", "dense"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    count = iter(range(10_000))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [part.key for part in path]
        if names[-1] == "gain":
            return jnp.ones(leaf.shape, jnp.float32)
        dtype = jnp.float32 if "router" in names else jnp.dtype(load.precision.dtype)
        scale = 1.0 if names[-1] == "embedding" else leaf.shape[-2] ** -0.5
        key = jax.random.fold_in(jax.random.key(0), next(count))
        return jax.random.normal(key, leaf.shape, dtype) * jnp.asarray(scale, dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(by_layer, {"params": shapes["params"]}))


def study(load: Load) -> dict[str, Any]:
    """Decode and copy, interleaved. A decode's seconds are those of a rollout less those of one that only prefills."""
    kernels = resolve_kernels(Kernels(), jax.default_backend()).for_inference()
    model, variables = Transformer(load.model, load.precision, kernels), parameters(load)
    prompts = np.random.default_rng(0).integers(0, load.model.vocab_size, (load.batch, load.prompt)).astype(np.int32)
    keys = sample_keys(jax.random.key(0), 0, range(load.batch), 1)

    def rollout(response: int) -> Any:
        mask = np.ones(prompts.shape, bool)
        sampling = Sampling(np.float32(1.0))
        result = sample(model, variables, prompts, mask, keys, sampling, response_length=response)
        return jax.block_until_ready(result)

    moved = bytes_moved(load, np.asarray(rollout(load.response).routes))
    stream = jnp.zeros(load.copied, jnp.uint8)

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, load.copies, lambda _, y: y + 1, x)  # reads the whole and writes the whole

    whole, prefill, copied = measure(
        [
            Contender("rollout", lambda: rollout(load.response), moved),
            Contender("prefill", lambda: rollout(1), 0),
            Contender("copy", lambda: jax.block_until_ready(copy(stream)), 2 * load.copied * load.copies),
        ],
        load.repetitions,
    )
    decode = whole | {"name": "decode", "seconds": list(np.subtract(whole["seconds"], prefill["seconds"]))}
    tokens = load.batch * (load.response - 1)
    cell = {"batch": load.batch, "tokens": tokens, "contenders": [decode, copied]}
    settings = dataclasses.asdict(load) | {"kernels": dataclasses.asdict(kernels)}
    return {"environment": environment(), "settings": settings, "cells": [cell]}
