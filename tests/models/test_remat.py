"""What layers keep for the backward pass changes memory, and neither values nor gradients."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from rlstab_jax.models import ModelConfig, Precision
from rlstab_jax.models.remat import Remat
from rlstab_jax.models.transformer import forward

CONFIG = ModelConfig(
    vocab_size=17, num_layers=6, embed_dim=32, num_heads=2, num_kv_heads=1, num_experts=4, expert_dim=32
)
TOKENS = np.random.default_rng(0).integers(0, 17, (4, 64))


@cache
def results(remat: Remat, unroll: int = 1) -> tuple[Any, Any]:
    """The gradient of a scalar of the hidden states, and what the compiled program needs."""

    def loss(params: dict) -> jax.Array:
        model = tiny.model(CONFIG, remat=remat).clone(unroll=unroll)
        output = forward(model, {"params": params}, jnp.asarray(TOKENS), TOKENS > 0)
        return jnp.sin(output.hidden).sum()

    compiled = jax.jit(jax.grad(loss)).lower(tiny.parameters(CONFIG)).compile()
    return compiled(tiny.parameters(CONFIG)), compiled.memory_analysis()


def test_gradients_are_equal_under_each_policy() -> None:
    wanted = results("none")[0]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for remat in ("full", "dots", "offload"):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), results(remat)[0], wanted)


def test_layers_that_are_written_out_give_the_same_gradients() -> None:
    """4 of 6 layers at once leave 2 over; more than there are is all."""
    wanted = results("none")[0]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for unroll in (4, 10):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * scale), results("none", unroll)[0], wanted)


def test_the_backward_pass_goes_through_the_experts_that_were_used() -> None:
    """In bfloat16 ties are near: live routing has the gradient of its own routes, replayed, bit for bit."""
    config = ModelConfig(
        vocab_size=17, num_layers=3, embed_dim=16, num_heads=1, num_kv_heads=1,
        num_experts=32, experts_per_token=4, expert_dim=8,
    )  # fmt: skip
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 17, (64, 64)))
    model, fed = tiny.model(config, Precision("bfloat16"), remat="full"), jnp.ones(tokens.shape, bool)

    @jax.jit
    def gradient(params: dict, routes: jax.Array) -> tuple[dict, jax.Array]:
        def loss(params: dict) -> tuple[jax.Array, jax.Array]:
            output = forward(model, {"params": params}, tokens, fed, routes)
            return jnp.sin(3 * output.hidden.astype(jnp.float32)).sum(), output.routing.used

        return jax.grad(loss, has_aux=True)(params)

    params = tiny.parameters(config)
    live, routes = gradient(params, jnp.full((3, *tokens.shape, 4), 32, jnp.uint8))
    replayed, again = gradient(params, routes)
    np.testing.assert_array_equal(again, routes)
    jax.tree.map(np.testing.assert_array_equal, replayed, live)


def test_policies_keep_less_and_less() -> None:
    none, dots, full = (results(remat)[1].temp_size_in_bytes for remat in ("none", "dots", "full"))
    print(f"temporaries in KiB: none {none / 1024:.0f}, dots {dots / 1024:.0f}, full {full / 1024:.0f}")
    assert none > 1.2 * dots > 1.2 * 1.2 * full
