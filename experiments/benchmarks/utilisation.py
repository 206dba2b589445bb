"""On an accelerator: the floating-point operations of an update, per second, against the matrix rate of the same run.

Counted are the products that the mathematics needs: those of the parameters that a token passes, and causal attention;
the gradient costs twice the forward pass. What is computed once more to save memory, padding, norms, softmax and Adam
are not counted.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Contender, environment, measure
from rlstab_jax.learner import LearnerConfig, Minibatch, PolicyScores, init_state, update
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, resolve_kernels
from rlstab_jax.models.config import has_tokamax
from rlstab_jax.objectives import minirl
from rlstab_jax.types import Rollout, RoutingReplay


@dataclasses.dataclass(frozen=True)
class Load:
    """What is updated. All layers of a model alike, the head untied."""

    models: dict[str, ModelConfig]
    """By name."""
    rows: int
    """Sequences."""
    tokens: int
    """Tokens that are fed of each, each with a target."""
    precision: Precision = Precision(dtype="bfloat16")
    """Of the training engine; master weights and Adam are float32."""
    matrix: int = 8192
    """Rows and columns of the matrices whose product gives the rate."""
    products: int = 32
    """Products in one timed run."""
    repetitions: int = 7
    """Timed runs."""


_DENSE = ModelConfig(
    vocab_size=32_768,
    num_layers=12,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    num_experts=0,
    mlp_dim=8192,
    rope_theta=1e6,
)
FULL = Load(
    models={
        "dense": _DENSE,
        "MoE": dataclasses.replace(_DENSE, num_experts=32, experts_per_token=4, expert_dim=1024),
    },
    rows=16,
    tokens=2048,
)
_TINY = dataclasses.replace(
    _DENSE, vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32
)
TINY = Load(
    models={
        "dense": _TINY,
        "MoE": dataclasses.replace(_TINY, num_experts=4, experts_per_token=2, expert_dim=16),
    },
    rows=4,
    tokens=8,
    matrix=64,
    products=2,
    repetitions=2,
)


def flops_per_token(model: ModelConfig, tokens: int) -> float:
    """Of an update, for one token of a sequence of so many: 3 x 2 x (multiplications of the forward pass)."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections = model.embed_dim * (2 * queries + 2 * keys)
    attention = 2 * queries * (tokens + 1) / 2  # scores and values, over the tokens up to this one
    moe = model.embed_dim * (model.num_experts + 3 * model.experts_per_token * model.expert_dim)
    dense = 3 * model.embed_dim * model.mlp_dim
    layers = sum(projections + attention + (moe if is_moe else dense) for is_moe in model.kinds)
    return 6 * (layers + model.embed_dim * model.vocab_size)


def kernels_of(platform: str) -> Kernels:
    """The fastest ones of the platform: fused attention, and a grouped product where one is installed."""
    attention = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "auto")
    experts = "tokamax" if platform == "gpu" and has_tokamax() else "megablox" if platform == "tpu" else "auto"
    return resolve_kernels(Kernels(attention=attention, experts=experts), platform)  # type: ignore[arg-type]


def contender(name: str, load: Load, model: ModelConfig) -> Contender:
    """An update of random weights on random tokens."""
    transformer = Transformer(model, load.precision, kernels_of(jax.default_backend()), remat="full")
    numbers, shape = LearnerConfig().numbers(), (load.rows, load.tokens)

    @jax.jit
    def initial() -> Any:
        params = transformer.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]
        return init_state(params, numbers)

    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (load.rows, load.tokens + 1)).astype(np.int32)
    log_probs = jnp.full(shape, -np.log(model.vocab_size), jnp.float32)
    rollout = Rollout(
        tokens=jnp.asarray(tokens),
        prompt_mask=jnp.ones((load.rows, 1), bool),
        response_mask=jnp.ones(shape, bool),
        log_probs=log_probs,
        truncated=jnp.zeros(load.rows, bool),
        routes=None,
        temperature=jnp.ones(load.rows),
    )
    advantage = np.random.default_rng(3).standard_normal(load.rows).astype(np.float32)
    old = PolicyScores(log_probs, jnp.zeros(shape), None, None, None)
    minibatch = Minibatch(rollout, old, jnp.asarray(advantage), jnp.arange(load.rows) // 4)
    state = [initial()]

    def run() -> None:
        state[0], _, _ = update(transformer, state[0], minibatch, minirl(), numbers, replay=RoutingReplay.LIVE)
        jax.block_until_ready(state[0])

    return Contender(name, run, load.rows * load.tokens * flops_per_token(model, load.tokens))


def products(load: Load) -> Contender:
    """Square products in the precision's dtype, one after another."""
    size = load.matrix
    key = jax.random.key(0)
    a = jax.random.normal(key, (size, size), jnp.dtype(load.precision.dtype)) * jnp.asarray(size**-0.5, jnp.bfloat16)

    @jax.jit
    def chain(a: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, load.products, lambda _, x: a @ x, x)

    return Contender("matrix products", lambda: jax.block_until_ready(chain(a, a)), load.products * 2.0 * size**3)


def study(load: Load) -> dict[str, Any]:
    """Updates and products, interleaved; one model after the other, since both may not fit at once."""
    cells, platform = [], jax.default_backend()
    kernels = kernels_of(platform)
    for name, model in load.models.items():
        tokens = load.rows * load.tokens
        results = measure([contender(name, load, model), products(load)], load.repetitions)
        cells.append({"model": name, "tokens": tokens, "contenders": results})
    settings = dataclasses.asdict(load) | {"kernels": dataclasses.asdict(kernels)}
    return {"environment": environment(), "settings": settings, "cells": cells}
