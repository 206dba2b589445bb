"""The optimiser's memory: moments rounded to bfloat16 without standing still, and moments kept off the device."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlstab_jax.learner import TrainState, init_state
from rlstab_jax.learner.optimizer import apply_gradient, check_frozen, offloaded, stochastically_rounded
from rlstab_jax.parallel.host_memory import check_offload
from rlstab_jax.types import UserError

NUMBERS = tiny.numbers(learning_rate=1e-2, max_grad_norm=1e9, adam_b2=0.999)
step = jax.jit(apply_gradient)


def state(moments_dtype: str = "float32") -> TrainState:
    return init_state({"w": {"kernel": jnp.ones((64, 64))}}, NUMBERS, moments_dtype)


def adam(state: TrainState) -> Any:
    return next(part for part in state.opt_state if hasattr(part, "mu"))


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact() -> None:
    x = jnp.asarray([1.0 + 2**-10, -3.0 - 2**-8, 1.5, 0.0, 1e-30, np.inf, np.nan], jnp.float32)
    draws = jax.vmap(stochastically_rounded, (None, 0))(x, jax.random.split(jax.random.key(0), 20_000))
    assert draws.dtype == jnp.bfloat16
    draws = np.asarray(draws, np.float64)
    assert set(np.unique(draws[:, 0])) == {1.0, 1.0 + 2**-7}  # its two neighbours; 2^-10 is an eighth of the way
    np.testing.assert_allclose((draws[:, 0] > 1).mean(), 1 / 8, atol=0.01)
    np.testing.assert_allclose((draws[:, 1] < -3).mean(), 1 / 4, atol=0.015)
    assert (draws[:, 2:4] == [1.5, 0]).all()
    np.testing.assert_allclose(draws[:, 4].mean(), 1e-30, rtol=1e-3)
    assert np.isposinf(draws[:, 5]).all()
    assert np.isnan(draws[:, 6]).all()


def test_bfloat16_moments_decay_as_float32_ones_do() -> None:
    """After one large gradient v decays by 0.1% a step: less than half of bfloat16's step, which rounding to nearest
    would never leave."""
    results = []
    for dtype in ("bfloat16", "float32"):
        after = state(dtype)
        for i in range(200):
            gradient = jnp.full((64, 64), 1.0 if i == 0 else 1e-3)
            after, _ = step(after, {"w": {"kernel": gradient}}, NUMBERS)
        assert adam(after).mu["w"]["kernel"].dtype == adam(after).nu["w"]["kernel"].dtype == dtype
        results.append(jax.tree.map(lambda x: np.asarray(x, np.float64).mean(), (after.params, adam(after))))
    (params, moments), (wanted_params, wanted) = results
    nu = 1e-3 * 0.999**199 + 1e-6 * (1 - 0.999**199)
    np.testing.assert_allclose(wanted.nu["w"]["kernel"], nu, rtol=1e-4)
    np.testing.assert_allclose(moments.nu["w"]["kernel"], nu, rtol=2e-3)
    np.testing.assert_allclose(moments.mu["w"]["kernel"], wanted.mu["w"]["kernel"], rtol=2e-3)
    moved, wanted_moved = 1 - params["w"]["kernel"], 1 - wanted_params["w"]["kernel"]
    np.testing.assert_allclose(moved, wanted_moved, rtol=5e-3)


def test_the_first_step_is_by_the_numbers_of_adam() -> None:
    """g = 1: the first moment is 1 - b1, and the corrected moments are 1, so that the step is rate / (1 + eps)."""
    gradient = {"w": {"kernel": jnp.ones((64, 64))}}
    after, _ = step(state(), gradient, NUMBERS.replace(adam_b1=jnp.float32(0.5), adam_eps=jnp.float32(1.0)))
    np.testing.assert_allclose(adam(after).mu["w"]["kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(adam(after).nu["w"]["kernel"], 1e-3, rtol=1e-4)
    np.testing.assert_allclose(1 - after.params["w"]["kernel"], 1e-2 / 2, rtol=1e-4)


def test_frozen_parameters_neither_move_nor_count() -> None:
    """Nor do they decay. Frozen as a whole, a state changes its step count alone."""
    params = {"router": {"kernel": jnp.full((2, 2), 3.0)}, "w": {"kernel": jnp.ones((2, 2))}}
    begun = init_state(params, NUMBERS)
    gradient = jax.tree.map(jnp.ones_like, params)
    numbers = NUMBERS.replace(weight_decay=jnp.float32(0.1))
    frozen = jax.jit(apply_gradient, static_argnames="freeze")
    after, measures = frozen(begun, gradient, numbers, freeze=("router",))
    np.testing.assert_array_equal(after.params["router"]["kernel"], params["router"]["kernel"])
    assert measures["learner/grad_norm"] == 2  # of four ones
    only = init_state({"w": params["w"]}, NUMBERS)
    alone, _ = step(only, {"w": gradient["w"]}, numbers)
    np.testing.assert_array_equal(after.params["w"]["kernel"], alone.params["w"]["kernel"])
    assert (after.params["w"]["kernel"] < 1).all()
    still, _ = frozen(after, gradient, numbers, freeze=("router", "w"))
    jax.tree.map(np.testing.assert_array_equal, still.params, after.params)
    with pytest.raises(UserError, match="no parameter is named 'rooter'; there are kernel, router, w"):
        check_frozen(params, ("rooter",))
    check_frozen(params, ("router",))
    with pytest.raises(UserError, match=r"learner.freeze = \('w', 'router'\) leaves no parameter to train"):
        check_frozen(params, ("w", "router"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_off_the_device_give_the_same_step(dtype: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), "data")
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state(dtype))
    here, there = (jax.device_put(state(dtype), at) for at in (places, offloaded(places, state(dtype))))
    good, bad = ({"w": {"kernel": jnp.full((64, 64), value)}} for value in (0.3, np.nan))
    for gradient in (good, bad, good):
        (here, _), (there, _) = step(here, gradient, NUMBERS), step(there, gradient, NUMBERS)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((adam(there).mu, adam(there).nu))} == {
            "pinned_host"
        }
        assert there.params["w"]["kernel"].sharding.memory_kind == here.params["w"]["kernel"].sharding.memory_kind
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), here, there)


def test_a_device_that_does_not_reach_the_host_s_memory_is_refused() -> None:
    device = SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: [SimpleNamespace(kind="beads")])
    with pytest.raises(UserError, match=r"learner\.remat = 'offload': the host's memory .* Abacus, .* beads"):
        check_offload([device], "learner.remat = 'offload'")
    check_offload(jax.devices(), "learner.offload_optimizer")
