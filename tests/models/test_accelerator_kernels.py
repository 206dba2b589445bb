"""Kernels for accelerators, interpreted, against the references; test_ahead_of_time.py compiles them."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.learner.head import head_log_probs
from rlstab_jax.models import ModelConfig, Transformer
from rlstab_jax.models.attention import DECODE_ATTENTION, by_lengths, chunked, cudnn, reference
from rlstab_jax.models.attention_gpu import decode_triton
from rlstab_jax.models.attention_parts import widened
from rlstab_jax.models.attention_tpu import decode_flash, decode_splash, splash
from rlstab_jax.models.config import has_tokamax
from rlstab_jax.models.experts import KERNELS as EXPERTS
from rlstab_jax.models.experts import ExpertWeights, dense, ragged
from rlstab_jax.models.grouped_dots import megablox, narrow, tokamax, triton
from rlstab_jax.models.precision import Format, Precision, Stored, as_bytes, fp8, quantised, store, store_weight
from rlstab_jax.types import UserError

HEADS, KV_HEADS, C = 4, 2, 16
KERNELS = {"splash": partial(splash, interpret=True), "by lengths": partial(by_lengths, implementation="xla")}


def sequences(time: int, dtype: Any = jnp.float32) -> tuple[list[jax.Array], jax.Array]:
    """Queries, keys and values, and what is fed: all, the middle, the first token, the last ones."""
    generator = np.random.default_rng(0)
    shapes = [(4, HEADS, time, C), (4, KV_HEADS, time, C), (4, KV_HEADS, time, C)]
    column = np.arange(time)
    first, end = np.array([[0], [time // 3], [0], [time // 2]]), np.array([[time], [time - 3], [1], [time]])
    fed = (column >= first) & (column < end)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes], jnp.asarray(fed)


@partial(jax.jit, static_argnums=0)
def with_gradient(kernel: Any, arrays: list[jax.Array], fed: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Output at fed tokens, and the gradient of the sum of its sines. ``fed`` may number several sequences."""

    def loss(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = jnp.where(fed[:, None, :, None] != 0, kernel(*arrays, fed), 0)
        return jnp.sin(y).sum(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
    return y, gradient


@pytest.mark.parametrize("kernel", KERNELS)
def test_whole_sequences_equal_the_reference(kernel: str) -> None:
    """131 is no multiple of anything: splash pads it to two blocks, cuDNN to an even number."""
    arrays, fed = sequences(131)
    wanted, got = (with_gradient(k, arrays, fed) for k in (reference, KERNELS[kernel]))
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)
    for of_kernel, of_reference in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(of_kernel, of_reference, atol=2e-5)


def test_splash_of_several_sequences_a_row_equals_the_reference() -> None:
    """Three sequences and gaps between them, across the borders of blocks."""
    arrays, _ = sequences(131)
    column = np.arange(131)
    segments = (
        np.where((column > 4) & (column < 60), 1, 0) + np.where(column >= 60, 2, 0) + np.where(column > 127, 3, 0)
    )
    segments = jnp.asarray(np.stack([segments, segments[::-1], np.ones(131), np.where(column == 130, 7, 0)]), jnp.int32)
    wanted, got = (with_gradient(k, arrays, segments) for k in (reference, KERNELS["splash"]))
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)
    for of_kernel, of_reference in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(of_kernel, of_reference, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_fed_is_not_read(kernel: str) -> None:
    arrays, fed = sequences(12)
    other = [jnp.where(fed[:, None, :, None], a, 100.0) for a in arrays]
    first, second = (with_gradient(KERNELS[kernel], a, fed)[0] for a in (arrays, other))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


ROWS, PROMPTS, PROMPT_LENGTH, WINDOW = 6, 2, 40, 300
# Lengths that are no multiples of 128; one response has nothing yet. Column 270 is the newest of a window of 3 blocks.
AGE = 270 - np.arange(WINDOW)
MASKS = (
    np.arange(PROMPT_LENGTH) >= np.array([[7], [39]]),
    (AGE >= 0) & (np.array([[1], [5], [271], [0], [10], [100]]) > AGE),
)
DECODE = {
    "splash": widened(partial(decode_splash, interpret=True)),
    "flash": partial(decode_flash, interpret=True),
    "triton": partial(decode_triton, interpret=True),
}


def a_decode_step(dtype: Any, format: Format) -> list:
    """Two prompts of three samples, with a cache in ``format``."""
    generator = np.random.default_rng(1)

    def cache(batch: int, time: int) -> tuple[Stored, Stored]:
        keys, values = (
            as_bytes(store(jnp.asarray(generator.standard_normal((batch, KV_HEADS, time, C)), dtype), format))
            for _ in range(2)
        )
        return jax.tree.map(lambda a: a.swapaxes(2, 3), keys), values

    q = jnp.asarray(generator.standard_normal((ROWS, HEADS, 1, C)), dtype)
    return [q, cache(PROMPTS, PROMPT_LENGTH), cache(ROWS, WINDOW), *MASKS]


@pytest.mark.parametrize(
    ("kernel", "dtype", "format"),
    [
        ("splash", jnp.float32, "none"),
        ("splash", jnp.bfloat16, "none"),
        ("flash", jnp.float32, "none"),
        ("flash", jnp.bfloat16, "none"),
        ("flash", jnp.float32, "int8"),
        ("flash", jnp.float32, "float8_e4m3fn"),
        ("flash", jnp.bfloat16, "float8_e5m2"),
        ("flash", jnp.float32, "float4_e2m1fn"),
        ("triton", jnp.float32, "none"),
        ("triton", jnp.bfloat16, "none"),
        ("triton", jnp.float32, "int8"),
        ("triton", jnp.bfloat16, "float8_e4m3fn"),
        ("triton", jnp.float32, "float4_e2m1fn"),
    ],
)
def test_a_decode_step_equals_the_reference(kernel: str, dtype: Any, format: Format) -> None:
    step, arguments = jax.jit(partial(DECODE[kernel], format=format)), a_decode_step(dtype, format)
    got, wanted = step(*arguments), DECODE_ATTENTION["reference"](*arguments, format=format)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, wanted)), atol=tolerance)
    nothing = step(*arguments[:3], *(np.zeros_like(mask) for mask in MASKS))
    assert np.isfinite(np.asarray(nothing, np.float32)).all()


@pytest.mark.parametrize("kernel", ["flash", "triton"])
def test_no_block_is_read_that_nobody_attends_to(kernel: str) -> None:
    """Row 4 attends to the last block of its window, row 5 to the last two: what is before may be NaN."""
    attend = DECODE[kernel]
    q, prompt, (k, v), *masks = a_decode_step(jnp.float32, "none")
    wanted = attend(q, prompt, (k, v), *masks)
    values = v.values.at[4, :, :256].set(jnp.nan).at[5, :, :128].set(jnp.nan)  # in blocks of 64 or 128
    np.testing.assert_allclose(attend(q, prompt, (k, Stored(values)), *masks)[4:], wanted[4:], atol=1e-6)
    values = values.at[5, :, 171 if kernel == "triton" else 128].set(jnp.nan)  # one is in the block of the oldest key
    assert np.isnan(attend(q, prompt, (k, Stored(values)), *masks)[5]).all()


def test_triton_refuses_heads_that_it_cannot_load() -> None:
    q, prompt, response, *masks = jax.tree.map(jnp.asarray, a_decode_step(jnp.float32, "none"))
    with pytest.raises(UserError, match=r"model.head_dim a power of two from 16 on, but got 12: .* use 'reference'"):
        DECODE["triton"](q[..., :12], prompt, response, *masks)


def test_triton_refuses_what_it_cannot_address() -> None:
    """Of 2**31 to 2**32 bytes; those of more are addressed by 64 bits, and those of two bytes a number by what is
    in range."""
    rows, kv_heads, c, window = 1024, 8, 128, 2304
    q = jax.ShapeDtypeStruct((rows, kv_heads, 1, c), jnp.bfloat16)
    masks = jax.ShapeDtypeStruct((rows, 64), jnp.bool_), jax.ShapeDtypeStruct((rows, window), jnp.bool_)

    def attended(dtype: Any, times: int = 1) -> Any:
        def part(length: int) -> tuple[Stored, Stored]:
            shapes = (rows, kv_heads, c, length), (rows, kv_heads, length, c)
            k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
            return Stored(k), Stored(v)

        wide = masks[0], jax.ShapeDtypeStruct((rows, times * window), jnp.bool_)
        return jax.eval_shape(decode_triton, q, part(64), part(times * window), *wide)

    with pytest.raises(UserError, match=r"keys have 2415919104 numbers of a byte, .* cannot be addressed"):
        attended(jnp.float8_e4m3fn)
    for sizes in ((jnp.bfloat16, 1), (jnp.float8_e4m3fn, 2)):
        assert attended(*sizes).shape == q.shape
    of_experts = (16, 7168), (256, 7168, 2048)
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in of_experts)
    with pytest.raises(UserError, match=r"experts have 3758096384 numbers of a byte, .* split them \(mesh.expert\)"):
        jax.eval_shape(triton, x, weight, jax.ShapeDtypeStruct((256,), jnp.int32))


def experts_case() -> tuple[dict[str, jax.Array], jax.Array]:
    """150 tokens, of which every third is not dispatched, and an expert without tokens."""
    generator = np.random.default_rng(2)
    num_experts, d, f = 5, 24, 40
    experts = np.stack([generator.permutation(num_experts - 1)[:2] for _ in range(150)])
    experts[::3] = num_experts
    shapes = {"x": (150, d), "gate": (num_experts, d, f), "up": (num_experts, d, f), "down": (num_experts, f, d)}
    values = {name: jnp.asarray(generator.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    gates = np.where(experts < num_experts, generator.random(experts.shape), 0)
    return values | {"gates": jnp.asarray(gates, jnp.float32)}, jnp.asarray(experts, jnp.int32)


@partial(jax.jit, static_argnums=(0, 3))
def run_experts(kernel: Any, values: dict, experts: jax.Array, precision: Precision) -> tuple[jax.Array, dict]:
    def loss(values: dict) -> tuple[jax.Array, jax.Array]:
        weights = ExpertWeights(*(store_weight(values[name], precision) for name in ("gate", "up", "down")))
        y = kernel(values["x"], experts, values["gates"], weights, precision)
        return jnp.sin(0.01 * y).sum(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(values)
    return y, gradient


@jax.custom_vjp
def poisoned(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot` as on TPU: what lies past sum(sizes) is NaN here, in the result and in the gradient."""
    past = jnp.arange(x.shape[0])[:, None] >= sizes.sum()
    return jnp.where(past, jnp.nan, jax.lax.ragged_dot(x, weight, sizes))


def _poisoned_backward(saved: tuple, gradient: jax.Array) -> tuple:
    x, weight, sizes = saved
    past = jnp.arange(x.shape[0])[:, None] >= sizes.sum()
    dx, dw = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, weight)[1](gradient)
    return jnp.where(past, jnp.nan, dx), dw, None


poisoned.defvjp(lambda *saved: (poisoned(*saved), saved), _poisoned_backward)

GROUPED_DOTS = {
    "megablox": partial(megablox, interpret=True),
    "uninitialised": lambda x, weight, sizes, **how: poisoned(x, weight, sizes),
}


@pytest.mark.parametrize("name", GROUPED_DOTS)
def test_grouped_products_equal_the_dense_experts(name: str) -> None:
    values, experts = experts_case()
    wanted = run_experts(dense, values, experts, Precision())
    got = run_experts(partial(ragged, grouped_dot=GROUPED_DOTS[name]), values, experts, Precision())
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-6)


@pytest.mark.parametrize(
    "precision",
    [
        Precision(),
        fp8(products="native"),
        fp8("float8_e5m2", products="native", scales="block", block=8),
        quantised("int8"),
        quantised("float4_e2m1fn", products="native"),
        Precision("bfloat16", weights="float8_e4m3fn"),
    ],
    ids=lambda precision: f"{precision.dtype}-{precision.weights}",
)
@pytest.mark.parametrize("product", [narrow, triton])
def test_products_of_stored_weights_equal_the_dense_experts(product: Any, precision: Precision) -> None:
    values, experts = experts_case()

    @partial(jax.jit, static_argnums=0)
    def run(kernel: Any, values: dict) -> jax.Array:
        weights = ExpertWeights(*(store_weight(values[name], precision) for name in ("gate", "up", "down")))
        return kernel(values["x"], experts, values["gates"], weights, precision)

    wanted, got = (run(k, values) for k in (dense, partial(ragged, grouped_dot=partial(product, interpret=True))))
    scale = np.abs(wanted).max()
    # A hidden unit on the border between two stored values moves with the last bit of its sum; bfloat16 has 8 bits.
    tolerance = 1e-2 if precision.dtype == "bfloat16" or "float8" in precision.activations else 2e-6
    np.testing.assert_allclose(got / scale, wanted / scale, atol=tolerance)
    if precision.dtype == "float32":
        assert np.mean(np.abs(got - wanted) > 2e-6 * scale) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("product", [narrow, triton])
def test_stored_weights_over_several_blocks_of_rows_and_columns(product: Any, dtype: Any) -> None:
    """Blocks of 32 to 256 rows, of 64 or 128 columns; experts begin and end within them, and two have no rows."""
    generator = np.random.default_rng(4)
    sizes = jnp.array([70, 0, 3, 200, 0, 18], jnp.int32)
    x, weight = (jnp.asarray(generator.integers(-4, 5, shape), dtype) for shape in ((300, 8192), (6, 8192, 256)))
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32
    got = jax.jit(partial(product, preferred_element_type=sums, interpret=True))(x, weight, sizes)
    assert got.dtype == sums
    wanted = jax.lax.ragged_dot(x.astype(jnp.float32), weight.astype(jnp.float32), sizes)
    np.testing.assert_array_equal(got[:291], wanted[:291])  # small integers: the sums are exact


@pytest.mark.skipif(not has_tokamax(), reason="the optional package tokamax (Python 3.12 or newer) is not installed")
def test_tokamax_equals_ragged_dot() -> None:
    """Through its XLA implementation: its GPU kernels are refused elsewhere."""
    values, experts = experts_case()
    kernels = [jax.lax.ragged_dot, partial(tokamax, implementation="xla")]
    wanted, got = (
        run_experts(partial(ragged, grouped_dot=kernel), values, experts, Precision("bfloat16")) for kernel in kernels
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
        np.testing.assert_allclose(ours / np.abs(theirs).max(), theirs / np.abs(theirs).max(), atol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "precision", "dtype"),
    [
        (megablox, quantised("int8"), "int8"),
        (megablox, fp8(products="native"), "float8_e4m3fn"),
        (megablox, Precision("float16"), "float16"),
        (tokamax, quantised("int8"), "int8"),
        (tokamax, Precision(), "float32"),
        (tokamax, fp8(), "float32"),  # emulated
    ],
)
def test_operands_that_a_kernel_lacks_are_refused(kernel: Any, precision: Precision, dtype: str) -> None:
    values, experts = experts_case()
    message = f"the expert kernel {kernel.__name__!r} multiplies .*, but this precision multiplies {dtype}: use 'auto'"
    with pytest.raises(UserError, match=message):
        run_experts(partial(ragged, grouped_dot=kernel), values, experts, precision)


@pytest.mark.parametrize("width", [96, 20])
def test_widths_that_tokamax_does_not_copy_are_refused(width: int) -> None:
    x, weight = jnp.zeros((64, 64), jnp.bfloat16), jnp.zeros((4, 64, width), jnp.bfloat16)
    with pytest.raises(UserError, match=f"multiples of 64, or of 8 below 64, .* are 64 and {width} .* use 'auto'"):
        tokamax(x, weight, jnp.full(4, 16))


def precisions(jaxpr: Any) -> list:
    """The precision of every matrix product, within kernels too."""
    found = [e.params["precision"] for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += precisions(inner)
    return found


WHOLE = {"splash": splash, "reference": reference, "chunked": chunked}


@pytest.mark.parametrize(
    "kernel",
    [*WHOLE, "decode_splash", "decode_flash", "decode_reference", "tiles", "megablox", "narrow", "head", "tied head"],
)
def test_float32_means_float32_within_the_kernels(kernel: str) -> None:
    """Forward and backward: TPUs would round the operands to bfloat16 by default."""

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    if kernel in WHOLE:
        fed = shape(4, 131, dtype=bool)
        jaxpr = jax.make_jaxpr(partial(with_gradient, WHOLE[kernel]))([*sequences(131)[0]], fed)
    elif kernel.endswith("head"):
        config = ModelConfig(vocab_size=40, num_layers=1, embed_dim=16, tie_embeddings=kernel == "tied head")
        weight = {"embedding": shape(40, 16)} if config.tie_embeddings else {"lm_head": {"kernel": shape(16, 40)}}

        def log_probs(params: dict, hidden: jax.Array, targets: jax.Array, temperature: jax.Array) -> jax.Array:
            model = Transformer(config)
            log_prob, _ = head_log_probs(model, {"params": params}, hidden, targets, temperature, None, 100)
            return log_prob.sum()

        arguments = weight, shape(8, 16), shape(8, dtype=jnp.int32), shape(8)
        jaxpr = jax.make_jaxpr(jax.grad(log_probs, argnums=(0, 1)))(*arguments)
    elif kernel.startswith("decode"):
        decode = DECODE_ATTENTION[kernel.removeprefix("decode_")]
        cache = Stored(shape(2, KV_HEADS, C, 128)), Stored(shape(2, KV_HEADS, 128, C))
        mask = shape(2, 128, dtype=bool)
        jaxpr = jax.make_jaxpr(decode)(shape(2, HEADS, 1, C), cache, cache, mask, mask)
    else:
        weights = ExpertWeights(*(Stored(shape(4, *sizes)) for sizes in ((32, 64), (32, 64), (64, 32))))

        def sines(x: jax.Array, gates: jax.Array, weights: ExpertWeights, chosen: jax.Array) -> jax.Array:
            return jnp.sin(EXPERTS[kernel](x, chosen, gates, weights, Precision())).sum()

        f = sines if kernel == "narrow" else jax.grad(sines, argnums=(0, 1, 2))
        jaxpr = jax.make_jaxpr(f)(shape(128, 32), shape(128, 2), weights, shape(128, 2, dtype=jnp.int32))
    found = precisions(jaxpr.jaxpr)
    assert len(found) >= 3
    assert set(found) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}


def test_cudnn_is_lowered_to_its_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """For CUDA without a GPU: only the question which cuDNN is installed is answered in its place."""
    library = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91000))
    arrays, fed = sequences(131, jnp.bfloat16)
    program = jax.jit(partial(with_gradient, cudnn)).trace(arrays, fed).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in program
    assert "__cudnn$fmhaSoftmaxBackward(" in program
    assert "4x131x131" not in program  # no mask of [batch, time, time]
    assert "4x132x132" not in program


@pytest.mark.parametrize(("dtype", "c"), [(jnp.float32, 16), (jnp.bfloat16, 12)])
def test_cudnn_refuses(dtype: Any, c: int) -> None:
    arrays, fed = sequences(8, dtype)
    with pytest.raises(
        UserError,
        match=r"kernels\.attention = 'cudnn' needs bfloat16 or float16 in both engines",
    ):
        cudnn(*(a[..., :c] for a in arrays), fed)


def test_cudnn_refuses_several_sequences_a_row() -> None:
    arrays, fed = sequences(8, jnp.bfloat16)
    with pytest.raises(UserError, match="takes one sequence a row, but the rows are packed"):
        cudnn(*arrays, fed.astype(jnp.int32))
