"""A training engine in float16: its gradient is neither lost nor overflown, and no update is left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from rlstab_jax.learner import Minibatch, init_state, score, update
from rlstab_jax.learner import loss_scale as scaling
from rlstab_jax.learner.loss_scale import LossScale, init_loss_scale, scaled_gradient
from rlstab_jax.models import Precision
from rlstab_jax.types import RoutingReplay

CONFIG = dataclasses.replace(tiny.MIXED, num_layers=2, dense_layers=())
HALF = Precision(dtype="float16")
NUMBERS = tiny.numbers(max_grad_norm=1e30)


def scale(value: float, updates: int = 0) -> LossScale:
    return LossScale(jnp.float32(value), jnp.int32(updates))


@jax.jit
def gradient_in_half(kept: LossScale, x: jax.Array) -> tuple:
    """Of the sum of 3 x, each term computed in float16."""

    def compute(of: jax.Array) -> tuple:
        value, gradient = jax.value_and_grad(lambda x: of * jnp.sum(3 * x.astype(jnp.float16)).astype(jnp.float32))(x)
        return value, {"tries": of}, gradient, jnp.array([of, jnp.nan])

    return scaled_gradient(kept, compute)


def test_only_float16_is_scaled() -> None:
    assert init_loss_scale(Precision()) is init_loss_scale(Precision(dtype="bfloat16")) is None
    assert scaled_gradient(None, lambda of: (of, 1, 2, 3)) == (None, 1, 2, 3, None)
    assert float(init_loss_scale(HALF).scale) == scaling.BEGIN


def test_the_largest_scale_that_overflows_nothing() -> None:
    value, rest, gradient, other, after = gradient_in_half(scale(2.0**16), jnp.ones(2))
    np.testing.assert_array_equal(other, [1, np.nan])  # scaled alike; that it is not finite seeks no other scale
    assert (float(value), gradient.tolist()) == (6.0, [3.0, 3.0])  # 3 x 2^14 is below 65504, 3 x 2^15 is not
    assert float(rest["tries"]) == float(after.scale) == 2.0**14
    assert int(after.updates) == 0
    *_, again = gradient_in_half(after, jnp.ones(2))
    assert (float(again.scale), int(again.updates)) == (2.0**14, 1)


def test_the_scale_doubles_after_so_many_updates_and_has_a_bound() -> None:
    *_, after = gradient_in_half(scale(8.0, scaling.PATIENCE - 1), jnp.ones(2))
    assert (float(after.scale), int(after.updates)) == (16.0, 0)
    nothing = jax.jit(lambda kept: scaled_gradient(kept, lambda of: (of * 0, (), jnp.zeros(2), ())))
    assert float(nothing(scale(scaling.LARGEST, scaling.PATIENCE - 1))[-1].scale) == scaling.LARGEST


def test_what_no_scale_mends_shows_and_leaves_the_scale() -> None:
    broken = jax.jit(lambda kept: scaled_gradient(kept, lambda of: (of, (), jnp.full(2, jnp.inf), ())))
    _, _, gradient, _, after = broken(scale(2.0**10, 7))
    assert not np.isfinite(gradient).any()
    assert (float(after.scale), int(after.updates)) == (2.0**10, 7)


def step(precision: Precision, batch: Minibatch, begin: float | None = None) -> tuple:
    """One update in that precision; the gradient is read off Adam's first moment."""
    params = jax.tree.map(jnp.copy, tiny.parameters(CONFIG))
    state = init_state(params, NUMBERS, precision=precision)
    if begin is not None:
        state = state.replace(loss_scale=scale(begin))
    model = tiny.model(CONFIG, precision, remat="full")
    state, _, measures = update(model, state, batch, tiny.MINIRL, NUMBERS, replay=RoutingReplay.R3)
    return state, measures, jax.flatten_util.ravel_pytree(tiny.gradient_of_step(state))[0]


def cosine(a: jax.Array, b: jax.Array) -> float:
    return float(a @ b / jnp.sqrt((a @ a) * (b @ b)))


def test_a_gradient_that_float16_would_lose() -> None:
    """Advantages of 1e-8, as a mini-batch of a million tokens has: without a scale nothing of the gradient is left."""
    rollout = tiny.rollout()
    batches = {}
    for precision in (tiny.FLOAT32, HALF):
        old, _ = score(
            tiny.model(CONFIG, precision), {"params": tiny.parameters(CONFIG)}, rollout, replay=RoutingReplay.R3
        )
        batch = tiny.minibatch(rollout, old, tiny.MINIRL)
        batches[precision] = dataclasses.replace(batch, advantage=1e-8 * batch.advantage)
    _, measures, wanted = step(tiny.FLOAT32, batches[tiny.FLOAT32])
    assert "learner/loss_scale" not in measures
    state, measures, got = step(HALF, batches[HALF], begin=2.0**24)
    assert cosine(got, wanted) > 0.999
    np.testing.assert_allclose(jnp.linalg.norm(got), jnp.linalg.norm(wanted), rtol=0.02)
    assert float(measures["learner/loss_scale"]) == float(state.loss_scale.scale) == 2.0**24
    _, _, lost = step(HALF, batches[HALF], begin=1.0)
    assert cosine(lost, wanted) < 0.95
    # And one that overflows: the scale falls until it does not.
    large = dataclasses.replace(batches[HALF], advantage=1e12 * batches[HALF].advantage)
    state, measures, got = step(HALF, large, begin=2.0**20)
    assert cosine(got, wanted) > 0.999
    assert 1 < float(measures["learner/loss_scale"]) < 2.0**20
    assert np.isfinite(measures["learner/grad_norm"])
    huge = dataclasses.replace(large, advantage=1e4 * large.advantage)
    state, measures, got = step(HALF, huge, begin=2.0**20)
    assert cosine(got, wanted) > 0.999
    assert scaling.SMALLEST < float(measures["learner/loss_scale"]) < 1
