"""The expert kernels against a loop over tokens in NumPy, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.models.experts import KERNELS, ExpertWeights
from rlstab_jax.models.layers import route
from rlstab_jax.models.precision import Precision, Stored, fp8, quantised, store, store_activations, store_weight
from rlstab_jax.models.products import at_rest, gradient_of
from rlstab_jax.models.sharding import Layout
from rlstab_jax.models.sorted_experts import group_sizes

D, F = 8, 6
# Those of accelerators are in test_accelerator_kernels.py.
ELSEWHERE = ("megablox", "narrow", "tokamax", "triton")
EVERYWHERE = {name: kernel for name, kernel in KERNELS.items() if name not in ELSEWHERE}
PRECISIONS = {"float32": Precision(), "e4m3": fp8(), "e4m3 weights": fp8(activations="none")}
OTHERS = {
    "float16": Precision("float16"),
    "bfloat16": Precision("bfloat16"),
    "int8": quantised("int8"),
    "int8 by block": quantised("int8", scales="block", block=4),
    "e4m3 by block, native": fp8(scales="block", block=4, products="native"),
    "4-bit weights by block": Precision(weights="float4_e2m1fn", scales="block", block=4),
}


def distinct(generator: np.random.Generator, tokens: int, k: int, num_experts: int) -> np.ndarray:
    return np.stack([generator.permutation(num_experts)[:k] for _ in range(tokens)])


def cases() -> dict[str, tuple[np.ndarray, int]]:
    """Experts [tokens, k] and their number; the number itself means "not dispatched"."""
    generator = np.random.default_rng(0)
    some = distinct(generator, 40, 2, 5)
    some[::3] = 5
    return {
        "random": (distinct(generator, 40, 2, 5), 5),
        "one hot expert": (np.tile([3, 5], (40, 1)), 5),
        "none dispatched": (np.full((40, 2), 5), 5),
        "some dispatched": (some, 5),
        "k = E": (distinct(generator, 11, 3, 3), 3),
        "E > tokens": (distinct(generator, 3, 2, 16), 16),
    }


def arrays(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    experts, num_experts = cases()[name]
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    values = {
        "x": normal(len(experts), D),
        "gates": generator.random(experts.shape).astype(np.float32),
        "gate": normal(num_experts, D, F),
        "up": normal(num_experts, D, F),
        "down": normal(num_experts, F, D),
    }
    values["gates"][(experts == num_experts).any(1)] = 0  # as the model has it
    return values, experts.astype(np.int32), num_experts


@partial(jax.jit, static_argnames=("kernel", "precision"))
def run(kernel: str, values: dict, experts: np.ndarray, precision: Precision) -> jax.Array:
    stored = {name: store_weight(values[name], precision) for name in ("gate", "up", "down")}
    return EVERYWHERE[kernel](values["x"], experts, values["gates"], ExpertWeights(**stored), precision)


@partial(jax.jit, static_argnames="kernel")
def gradients(values: dict, kernel: str, experts: np.ndarray, direction: np.ndarray) -> tuple[jax.Array, dict]:
    """Output, and the gradient of its product with ``direction``; rows whose direction is 0 are never read."""

    def loss(values: dict) -> tuple[jax.Array, jax.Array]:
        y = run(kernel, values, experts, Precision())
        return jnp.sum(jnp.where(direction != 0, y, 0.0) * direction), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(values)
    return y, gradient


def oracle(values: dict, experts: np.ndarray, precision: Precision) -> np.ndarray:
    def activation(x: np.ndarray) -> np.ndarray:
        stored = store_activations(jnp.asarray(x, jnp.float32)[None], precision)
        return np.asarray(stored.load(block=precision.block), np.float64)[0]

    def weight(name: str) -> np.ndarray:
        return np.asarray(store_weight(jnp.asarray(values[name]), precision).load(block=precision.block), np.float64)

    gate, up, down = (weight(name) for name in ("gate", "up", "down"))
    out = np.zeros(values["x"].shape)
    for t, slot in np.ndindex(experts.shape):
        e, x = experts[t, slot], activation(values["x"][t])
        if e < len(gate):
            hidden = x @ gate[e] / (1 + np.exp(-(x @ gate[e]))) * (x @ up[e])
            out[t] += values["gates"][t, slot] * (activation(hidden) @ down[e])
    return out


@pytest.mark.parametrize("kernel", EVERYWHERE)
@pytest.mark.parametrize("case", cases())
def test_values(kernel: str, case: str) -> None:
    values, experts, _ = arrays(case)
    for name, precision in PRECISIONS.items():
        got = run(kernel, values, experts, precision)
        want = oracle(values, experts, precision)
        # Sums differ by 1e-6; where hidden activations are stored in 4 bits of significand, a sum on the border between
        # two values moves one of them by 1/8, which a small share of tokens shows.
        error = np.abs(got - want).max(1)
        tolerance = 2e-5 * max(1.0, np.abs(want).max())
        share = 0.05 if precision.activations != "none" else 0.0
        assert (error > tolerance).mean() <= share, (name, np.sort(error)[-3:])


@pytest.mark.parametrize("kernel", EVERYWHERE)
@pytest.mark.parametrize("name", OTHERS)
def test_values_in_other_precisions(kernel: str, name: str) -> None:
    """As above; float16 and bfloat16 round each product, and the gated product, to 11 and 8 bits."""
    precision = OTHERS[name]
    values, experts, _ = arrays("some dispatched")
    want = oracle(values, experts, precision)
    if precision.weights == "none":
        values["x"] = values["x"].astype(precision.dtype)
    got = run(kernel, values, experts, precision)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got, np.float64) - want).max(1)
    digits = {"float16": 2**-11, "bfloat16": 2**-8}.get(precision.dtype, 2e-6)
    share = 0.05 if precision.activations != "none" else 0.0
    assert (error > 10 * digits * max(1.0, np.abs(want).max())).mean() <= share, np.sort(error)[-3:]


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_a_float16_expert_saturates(kernel: str) -> None:
    """silu(gate) * up overflows first: 300 * 300 is 65504 there, times 1 / 65504 down to about 1."""
    values, experts, _ = arrays("random")
    values = {name: np.full_like(value, 300 / D) for name, value in values.items()}
    values |= {"x": values["x"] * 0 + 1, "down": values["down"] * 0 + 1 / 65504, "gates": values["gates"] * 0 + 0.5}
    got = np.asarray(run(kernel, jax.tree.map(lambda a: a.astype(np.float16), values), experts, Precision("float16")))
    np.testing.assert_allclose(got.astype(np.float32), F, rtol=0.05)


@pytest.mark.parametrize("kernel", ["tiles", "grouped", "ragged_dot"])
@pytest.mark.parametrize("case", cases())
def test_gradients_equal_the_reference(kernel: str, case: str) -> None:
    values, experts, _ = arrays(case)
    direction = np.random.default_rng(2).standard_normal(values["x"].shape).astype(np.float32)
    (_, got), (_, want) = (gradients(values, name, experts, direction) for name in (kernel, "dense"))
    for name in values:
        scale = max(1.0, np.abs(want[name]).max())
        # A token that was not dispatched has no gate: its gradient there is 0 in both.
        np.testing.assert_allclose(got[name], want[name], atol=1e-5 * scale, err_msg=name)
    if case != "none dispatched":
        assert np.abs(want["gates"]).max() > 0.1


@partial(jax.jit, static_argnames=("kernel", "precision"))
def gradients_of_masters(
    values: dict, kernel: str, experts: np.ndarray, direction: np.ndarray, precision: Precision
) -> dict:
    def loss(values: dict) -> jax.Array:
        stored = {name: at_rest(values[name], None, precision) for name in ("gate", "up", "down")}
        y = EVERYWHERE[kernel](values["x"], experts, values["gates"], ExpertWeights(**stored), precision)
        return jnp.sum(y * direction)

    return jax.grad(loss)(values)


@partial(jax.jit, static_argnames="precision")
def straight_through_by_hand(values: dict, experts: np.ndarray, direction: np.ndarray, precision: Precision) -> dict:
    """All experts on all tokens, where each rounding is written as x + stop_gradient(Q(x) - x)."""

    def as_identity(x: jax.Array, rounded: jax.Array) -> jax.Array:
        return x + jax.lax.stop_gradient(rounded - x)

    def activation(x: jax.Array) -> jax.Array:
        return as_identity(x, store_activations(jax.lax.stop_gradient(x), precision).load(block=precision.block))

    def loss(values: dict) -> jax.Array:
        gate, up, down = (
            as_identity(values[name], store_weight(values[name], precision).load(block=precision.block))
            for name in ("gate", "up", "down")
        )
        product = partial(jnp.einsum, precision="highest")
        x = activation(values["x"])
        hidden = jax.nn.silu(product("td,edf->etf", x, gate)) * product("td,edf->etf", x, up)
        y = product("etf,efd->etd", activation(hidden), down)
        combine = product("tk,tke->et", values["gates"], jax.nn.one_hot(experts, len(gate)))
        return jnp.sum(product("et,etd->td", combine, y) * direction)

    return jax.grad(loss)(values)


QUANTISED = {
    "e4m3": fp8(),
    "e4m3 weights": fp8(activations="none"),
    "e4m3 activations": fp8(weights="none"),
    "int8 by block": quantised("int8", scales="block", block=4),
    "e4m3, native": fp8(products="native"),
}


@pytest.mark.parametrize("kernel", EVERYWHERE)
@pytest.mark.parametrize("name", QUANTISED)
def test_gradients_go_straight_through_quantisation(kernel: str, name: str) -> None:
    """To the masters, to the tokens and to the gates; a sum on the border between two stored values moves one token."""
    values, experts, _ = arrays("some dispatched")
    direction = np.random.default_rng(2).standard_normal(values["x"].shape).astype(np.float32)
    precision = QUANTISED[name]
    got = gradients_of_masters(values, kernel, experts, direction, precision)
    want = straight_through_by_hand(values, experts, direction, precision)
    for part in values:
        error = np.abs(np.asarray(got[part]) - want[part])
        assert np.abs(want[part]).max() > 0.1
        share = 0.05 if precision.activations != "none" else 0.0
        assert (error > 1e-5 * max(1.0, np.abs(want[part]).max())).mean() <= share, part


def test_gradients_pass_prepared_weights() -> None:
    """On their way to the tokens. What a sampler stores takes none."""
    values, experts, _ = jax.tree.map(jnp.asarray, arrays("random"))
    stored = {name: store_weight(values[name], fp8()) for name in ("gate", "up", "down")}
    assert not jax.tree.leaves(gradient_of(stored["up"], values["up"]))
    assert gradient_of(at_rest(values["up"], None, fp8()), values["up"]).master is values["up"]
    for kernel in EVERYWHERE:
        apply = partial(EVERYWHERE[kernel], weights=ExpertWeights(**stored), precision=fp8())
        through = jax.jit(jax.grad(lambda x, apply=apply: apply(x, experts, values["gates"]).sum()))(values["x"])
        assert np.abs(through).max() > 0.1, kernel


@pytest.mark.parametrize("kernel", EVERYWHERE)
def test_what_is_not_dispatched_is_never_read(kernel: str) -> None:
    """NaN in padding, or in an expert that nobody chose, reaches neither values nor gradients of the others.

    The second holds for tiles alone: the reference, and ragged_dot on CPU, multiply every token with every expert.
    """
    values, experts, num_experts = arrays("some dispatched")
    out = (experts == num_experts).all(1)
    experts = np.where(experts == 2, num_experts, experts).astype(np.int32)  # nobody chooses expert 2
    poisoned = {name: value.copy() for name, value in values.items()}
    poisoned["x"][out] = np.nan
    if kernel == "tiles":
        poisoned["down"][2] = np.nan
    direction = np.where(out[:, None], 0, np.random.default_rng(2).standard_normal(values["x"].shape))
    y_clean, g_clean = gradients(values, kernel, experts, direction.astype(np.float32))
    y_dirty, g_dirty = gradients(poisoned, kernel, experts, direction.astype(np.float32))
    np.testing.assert_array_equal(y_dirty, y_clean)
    assert (np.asarray(y_dirty)[out] == 0).all()
    if kernel != "dense":
        for name in ("gate", "up"):
            np.testing.assert_array_equal(g_dirty[name], g_clean[name], err_msg=name)
        np.testing.assert_array_equal(np.asarray(g_dirty["x"])[~out], np.asarray(g_clean["x"])[~out])


def test_stored_weights_are_used_as_they_are() -> None:
    """A scale is applied by output channel: doubling one channel's scale of `down` doubles that channel."""
    values, experts, _ = arrays("random")
    values = jax.tree.map(jnp.asarray, values)
    precision = fp8(activations="none")
    stored = {name: store(values[name], precision.weights, -2) for name in ("gate", "up", "down")}
    doubled = Stored(stored["down"].values, stored["down"].scale.at[:, :, 3].multiply(2))
    for name, kernel in EVERYWHERE.items():
        apply = jax.jit(kernel, static_argnums=4)
        inputs = values["x"], experts, values["gates"]
        first = apply(*inputs, ExpertWeights(**stored), precision)
        second = apply(*inputs, ExpertWeights(**stored | {"down": doubled}), precision)
        np.testing.assert_allclose(second[:, 3], 2 * first[:, 3], rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(np.delete(second, 3, 1), np.delete(first, 3, 1))


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("tokens", "k", "experts"), [(32, 2, 16), (64, 8, 128), (128, 8, 128), (512, 8, 128), (4096, 8, 128)]
)
def test_groups_hold_what_even_routers_choose(tokens: int, k: int, experts: int) -> None:
    """Each size is more than the mean share, and the largest holds any expert's in 98 of 100 batches."""
    sizes, generator = group_sizes(tokens, k, experts), np.random.default_rng(0)
    assert list(sizes) == sorted(sizes)
    assert tokens * k / experts <= sizes[0] <= sizes[-1] <= tokens
    largest = generator.multinomial(tokens * k, [1 / experts] * experts, size=1000).max(1)
    assert (largest > sizes[-1]).mean() <= 0.02


def test_choosing_experts_sorts_nothing():
    """On CPU a sort of all experts takes several times as long as the compiler's own top-k, which it uses only where
    the results are taken as they are: the router needs k choices, and the margin to the one behind them."""

    def chosen(scores):
        return route(scores, 2, None, renormalise=True, layout=Layout())

    scores = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (40, 8)))
    program = jax.jit(chosen).lower(scores).compile()
    assert "TopK" in program.as_text()
    assert " sort(" not in program.as_text()
    used, _, _, margin = program(scores)
    order = np.argsort(-np.asarray(scores), axis=1)
    np.testing.assert_array_equal(used, order[:, :2])
    second, third = np.take_along_axis(np.exp(scores), order[:, 1:3], axis=1).T
    np.testing.assert_allclose(margin, second - third, atol=1e-6)
