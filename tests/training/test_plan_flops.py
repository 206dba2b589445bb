"""Products counted from jaxprs, against formulas by hand."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from rlstab_jax.learner import score, update
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer
from rlstab_jax.models.attention_tpu import splash
from rlstab_jax.models.experts import KERNELS, ExpertWeights
from rlstab_jax.models.grouped_dots import narrow
from rlstab_jax.models.precision import Stored
from rlstab_jax.models.sorted_experts import even_tiles, tile_size, tiling
from rlstab_jax.training.plan_flops import products
from rlstab_jax.types import RoutingReplay
from tests import tiny

CONFIG = ModelConfig(
    vocab_size=96, num_layers=3, embed_dim=64, num_heads=8, num_kv_heads=2, head_dim=16, num_experts=8,
    experts_per_token=2, expert_dim=48,
)  # fmt: skip
BATCH, PROMPT, RESPONSE = 4, 9, 24


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(f: Any, *arguments: Any, **how: Any) -> dict[str, float]:
    return dict(products(jax.jit(f).trace(*arguments).jaxpr, **how))


def forward_by_hand(c: ModelConfig, rows: int, fed: int) -> float:
    """Layers: projections, attention over all pairs of tokens, router, chosen experts; then the head over responses."""
    projections = 2 * c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    attention = projections + 4 * fed * c.num_heads * c.head_dim
    moe = 2 * c.embed_dim * c.num_experts + c.experts_per_token * 3 * 2 * c.embed_dim * c.expert_dim
    return rows * fed * c.num_layers * (attention + moe) + rows * RESPONSE * 2 * c.embed_dim * c.vocab_size


def rollout() -> Any:
    made = tiny.rollout()
    sizes = {"tokens": (PROMPT + RESPONSE,), "prompt_mask": (PROMPT,), "response_mask": (RESPONSE,),
             "log_probs": (RESPONSE,), "truncated": (), "temperature": ()}  # fmt: skip
    arrays = {name: shape(BATCH, *rest, dtype=getattr(made, name).dtype) for name, rest in sizes.items()}
    return dataclasses.replace(made, routes=None, support=None, **arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformer(dtype: Any) -> None:
    """A scan over layers, in micro-batches or not, forwards; and backwards, where remat makes it four times that."""
    model = Transformer(CONFIG, Precision(dtype), Kernels("reference", "ragged_dot", "reference", "ragged_dot"), "full")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    by_hand = forward_by_hand(CONFIG, BATCH, PROMPT + RESPONSE - 1)
    traced = score.trace(model, params, rollout())
    of_score = products(traced.jaxpr)
    assert sum(of_score.values()) == pytest.approx(by_hand, rel=0.03)
    assert set(of_score) == {"float32", dtype}
    assert max(of_score, key=lambda rate: of_score[rate]) == dtype  # the router is float32 in either
    parts = products(score.trace(model, params, rollout(), micro_batches=2).jaxpr)
    assert sum(parts.values()) == pytest.approx(sum(of_score.values()), rel=1e-6)

    old, _ = traced.out_info
    batch = tiny.Minibatch(rollout(), old, shape(BATCH), shape(BATCH, dtype=jnp.int32))
    state = jax.eval_shape(lambda p: tiny.init_state(p, tiny.LearnerConfig().numbers()), params["params"])
    of_update = update.trace(
        model, state, batch, tiny.MINIRL, tiny.LearnerConfig().numbers(), replay=RoutingReplay.LIVE
    )
    assert sum(products(of_update.jaxpr).values()) == pytest.approx(4 * by_hand, rel=0.05)


def test_rates() -> None:
    """The widest operand decides, and of float32 the precision asked for."""
    exact = partial(jnp.matmul, precision="highest")
    x, w = shape(4, 8), shape(8, 2)
    assert counted(exact, x, w) == {"float32": 2 * 4 * 8 * 2}
    assert counted(jnp.matmul, x, w) == {"bfloat16": 128}
    fp8 = shape(4, 8, dtype=jnp.float8_e4m3fn)
    assert counted(lambda a: jnp.matmul(a, a.T, preferred_element_type=jnp.float32), fp8) == {"narrow_float": 256}
    int8 = shape(4, 8, dtype=jnp.int8)
    assert counted(lambda a: jnp.matmul(a, a.T, preferred_element_type=jnp.int32), int8) == {"int8": 256}


def test_grouped_products() -> None:
    """Forward and both gradients cost the same: each row meets one group's matrix. Rows without tokens do not count."""

    def loss(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, sizes).sum()

    arguments = shape(100, 32), shape(4, 32, 16), shape(4, dtype=jnp.int32)
    one = 2 * 100 * 32 * 16
    assert counted(loss, *arguments) == {"bfloat16": one}
    assert counted(jax.value_and_grad(loss, (0, 1)), *arguments)["bfloat16"] == 3 * one
    assert counted(loss, *arguments, used=0.25) == {"bfloat16": one / 4}


D, F, EXPERTS, K = 32, 16, 64, 4


def expert_weights(devices: int = 1) -> ExpertWeights:
    gate, down = (Stored(shape(EXPERTS, *sizes), None) for sizes in ((D, F), (F, D)))
    return ExpertWeights(gate, gate, down, devices)


@pytest.mark.parametrize("tokens", [2, 8, 16, 32, 500, 4096])
@pytest.mark.parametrize("kernel", ["tiles", "grouped", "ragged_dot"])
def test_experts(kernel: str, tokens: int) -> None:
    """Whatever the kernel, each token meets the gate, up and down matrices of K experts; their sums are left out."""
    by_hand = tokens * K * 3 * 2 * D * F

    def forward(x: jax.Array, weights: ExpertWeights, experts: jax.Array, gates: jax.Array) -> jax.Array:
        return KERNELS[kernel](x, experts, gates, weights, Precision("bfloat16"))

    arguments = shape(tokens, D), expert_weights(), shape(tokens, K, dtype=jnp.int32), shape(tokens, K)
    assert counted(forward, *arguments)["bfloat16"] == pytest.approx(by_hand)
    if kernel == "tiles":  # its gradient computes nothing again: two products for each one
        gradient = jax.grad(lambda *a: forward(*a).sum(), (0, 1))
        assert counted(gradient, *arguments)["bfloat16"] == pytest.approx(3 * by_hand)


@pytest.mark.parametrize("tokens", [1, 8, 32, 500, 4096])
@pytest.mark.parametrize("devices", [1, 2])
def test_even_tiles(tokens: int, devices: int) -> None:
    """No more tiles than where each expert has an equal share; nearly as many as where tokens draw their experts."""
    everywhere, weights = EXPERTS * devices, expert_weights(devices)
    tile = tile_size(tokens * K, everywhere)

    @jax.jit
    @jax.vmap
    def used(experts: jax.Array) -> jax.Array:
        return tiling(jnp.where(experts < EXPERTS, experts, EXPERTS), EXPERTS, tile).used

    equal = jnp.arange(tokens * K).reshape(1, tokens, K) % everywhere
    plan = jax.eval_shape(lambda: tiling(equal[0], EXPERTS, tile))
    rounds, held = even_tiles(plan, weights, tile)
    assert rounds * tile * held == pytest.approx(tokens * K / devices)
    # One token has its experts on one device or on the other.
    assert rounds <= used(equal).item() / (1 if tokens > 1 else devices) + 1e-9
    scores = jax.random.uniform(jax.random.key(0), (30, tokens, everywhere))
    drawn = used(jax.lax.top_k(scores, K)[1]).mean()
    assert 0.75 * drawn <= rounds <= 1.1 * drawn


def test_a_kernel_that_states_its_products() -> None:
    """`narrow` multiplies fp8 numbers as bfloat16; it counts whole blocks of rows and columns."""
    one = 2 * 128 * 128 * 256
    for dtype, rate in ((jnp.float8_e4m3fn, "bfloat16"), (jnp.int8, "int8"), (jnp.float32, "float32")):
        arguments = shape(128, 128, dtype=dtype), shape(4, 128, 256, dtype=dtype), shape(4, dtype=jnp.int32)
        assert counted(narrow, *arguments) == {rate: one}
        assert counted(narrow, *arguments, used=0.25) == {rate: one / 4}


def test_loops_branches_and_maps() -> None:
    w = shape(8, 8)

    def scanned(w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=5)[0]

    assert counted(scanned, w) == {"bfloat16": 5 * 1024}
    assert counted(lambda w: jax.lax.fori_loop(0, 7, lambda _, x: x @ w, w), w) == {"bfloat16": 7 * 1024}
    assert counted(lambda w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, w), w) == {"bfloat16": 1024}
    assert counted(lambda w: (w @ w, w)[1], w) == {}  # nothing uses it
    either = counted(lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w @ w @ w, lambda w: w @ w, w), w)
    assert either == {"bfloat16": 2 * 1024}
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert counted(mapped, w, w) == {"bfloat16": 1024}  # 2 rows on each of 4 devices


def test_a_kernel_that_skips_blocks() -> None:
    """Splash attention makes two products over the blocks on and under the diagonal: 36 of 8 x 8."""
    q, kv = shape(2, 4, 4096, 128, dtype=jnp.bfloat16), shape(2, 2, 4096, 128, dtype=jnp.bfloat16)
    arguments = q, kv, kv, shape(2, 4096, dtype=bool)
    whole = 2 * 2 * 2 * 4 * 4096**2 * 128
    assert counted(splash, *arguments) == {"bfloat16": whole * 36 / 64}
    assert counted(splash, *arguments, silent=False) == {}
