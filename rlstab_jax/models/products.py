"""The matrix product of an engine, which honours its number formats, and the gradient through it.

A product multiplies stored values exactly, accumulates in float32 (int8: in int32, so the sum is exact too) and applies
both scales, so that hardware without the type computes what hardware with it would, up to the order of the sum.

Gradients go straight through (Bengio et al., arXiv 1308.3432): rounding has the gradient of the identity. With Q(a) the
numbers that the stored values of a stand for,

    y = Q(x) Q(w)        dx = dy Q(w)^T        dw = Q(x)^T dy

where only the forward product is of stored values: the gradients' operands are in the engine's dtype (the LM head's in
float32, but for bfloat16), and dy is not quantised.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlstab_jax.models.precision import Precision, Stored, saturate, spread, store_activations, store_weight


def at_rest(
    values: Float[Array, "..."], scale: Float[Array, "..."] | None, precision: Precision, transposed: bool = False
) -> Stored:
    """A weight [.., in, out], or [.., out, in] if ``transposed``, as an engine stores it.

    A sampler's was quantised before (`inference.prepare`) and comes with its ``scale``. The training engine's is the
    master weight: it is quantised here, in each pass anew, to the same values.
    """
    if scale is not None or precision.weights == "none":
        return Stored(values, scale)
    return replace(store_weight(jax.lax.stop_gradient(values), precision, transposed), master=values)


@jax.custom_vjp
def straight(rounded: Array, exact: Array) -> Array:
    """``rounded``, with the gradient of ``exact``."""
    return rounded


straight.defvjp(lambda rounded, exact: (rounded, None), lambda _, gradient: (jnp.zeros_like(gradient), gradient))


def gradients(
    product: Callable[..., Array],
    x: Float[Array, "*batch rows in"],
    weight: Stored,
    precision: Precision,
    out: str,
    d_y: Float[Array, "*batch rows out"],
    *operands: Any,
) -> tuple[Float[Array, "*batch rows in"], Float[Array, "*batch in out"]]:
    """Of ``x`` and of the weight, straight through quantisation, where ``d_y`` is the gradient of ``product(x, weight,
    precision, out, *operands)``."""
    plain = precision.exempt()
    of_numbers = (
        store_activations(x, precision, weight.across).load(precision.dtype, precision.block),
        weight.load(precision.dtype, precision.block),
    )
    pull = jax.vjp(lambda x, weight: product(x, Stored(weight), plain, out, *operands), *of_numbers)[1]
    d_x, d_weight = pull(d_y)
    return d_x.astype(x.dtype), d_weight


def gradient_of(weight: Stored, d_weight: Float[Array, "..."]) -> Stored:
    """The cotangent of a weight: its master's, or that of values that are not quantised. Prepared ones have none."""
    none: Any = None  # of an array: JAX takes it for zeros
    if weight.master is not None:
        return Stored(none, None, d_weight.astype(weight.master.dtype), weight.across)
    values = none if weight.scale is not None else d_weight.astype(weight.values.dtype)
    return Stored(values, None, None, weight.across)


def without_master(weight: Stored) -> Stored:
    """To be kept for a backward pass, which asks only whether there was one."""
    return weight if weight.master is None else replace(weight, master=jnp.zeros(0, weight.master.dtype))


def straight_through(product: Callable[..., Array]) -> Callable[..., Array]:
    """``product(x, weight, precision, out, *operands)`` with `gradients` in the place of those of its roundings.

    ``operands`` are arrays without a gradient.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def quantised(x: Array, weight: Stored, precision: Precision, out: str, *operands: Any) -> Array:
        return product(x, weight, precision, out, *operands)

    def forward(x, weight, precision, out, *operands):
        return product(x, weight, precision, out, *operands), (x, without_master(weight), operands)

    def backward(precision, out, saved, d_y):
        x, weight, operands = saved
        d_x, d_weight = gradients(product, x, weight, precision, out, d_y, *operands)
        return d_x, gradient_of(weight, d_weight), *(None for _ in operands)

    quantised.defvjp(forward, backward)

    @wraps(product)
    def either(x: Array, weight: Stored, precision: Precision, out: str, *operands: Any) -> Array:
        plain = precision.activations == "none" and weight.scale is None
        return (product if plain else quantised)(x, weight, precision, out, *operands)

    return either


def take(weight: Stored, rows: Int[Array, "*batch"], precision: Precision) -> Float[Array, "*batch columns"]:
    """Rows of a stored matrix, in the engine's dtype; differentiable in its master."""
    scale = weight.scale
    if scale is not None:
        blocked = scale.shape[-2] != weight.values.shape[-2]
        scale = scale[rows // precision.block if blocked else rows]
    taken = Stored(weight.values[rows], scale).load(precision.dtype, precision.block)
    if weight.master is None:
        return taken
    return straight(taken, weight.master[rows].astype(precision.dtype))


@straight_through
def matmul(x: Float[Array, "*batch rows in"], weight: Stored, precision: Precision, out: str) -> Array:
    """``x @ weight`` in an engine's precision, in dtype ``out``. Leading axes are batch axes of both.

    Rows are tokens; ``weight.scale`` is [..., 1 or blocks of in, out or blocks of out] or None.
    """
    scale = None if weight.scale is None else jnp.moveaxis(weight.scale, -2, 0)[..., None, :]
    return scaled_product(x, weight.values, scale, precision, out, jnp.matmul, weight.across)


def scaled_product(
    x: Float[Array, "*batch rows in"],
    weight: Array,
    scale: Float[Array, "blocks ..."] | None,
    precision: Precision,
    out: str,
    dot: Callable[..., Array],
    across: str | None = None,
) -> Array:
    """``dot(x, weight)`` in an engine's precision, in dtype ``out``.

    Args:
      x: tokens, which are stored first if the engine quantises activations.
      weight: stored values [..., in, out].
      scale: their scales, the blocks of ``in`` in front (1 by channel), which broadcast to the result once they are
        spread over its columns.
      dot: `jnp.matmul` or one with its keywords ``precision`` and ``preferred_element_type``.
      across: of the weight, as in `Stored`.
    """
    if precision.activations == "none" and scale is None:
        # float32 means float32: accelerators would otherwise round the operands of a product to bf16 or tf32.
        exact = jax.lax.Precision.HIGHEST if precision.dtype == "float32" else None
        # A sum is rounded to its type by the product itself, which does not saturate.
        sums = "float32" if out == "float16" else out
        x, weight = saturate(x, precision.dtype), saturate(weight, precision.dtype)
        return saturate(dot(x, weight, precision=exact, preferred_element_type=jnp.dtype(sums)), out)
    if scale is None:  # as a sampler stores it
        weight = saturate(weight, precision.dtype)
    stored = store_activations(x, precision, across)
    size, columns = weight.shape[-2:]
    width = precision.block if precision.scales == "block" else size

    def part(number: Int[Array, ""] | int, width: int) -> Float[Array, "*batch rows out"]:
        """The product of one block of the contracted axis, scaled."""
        start = number * precision.block
        left = jax.lax.dynamic_slice_in_dim(stored.values, start, width, -1)
        right = jax.lax.dynamic_slice_in_dim(weight, start, width, -2)
        total = _narrow_dot(left, right, precision, dot)
        if stored.scale is not None:
            total = total * jax.lax.dynamic_slice_in_dim(stored.scale, number, 1, -1)
        if scale is not None:
            columnwise = jax.lax.dynamic_index_in_dim(scale, number, 0, keepdims=False)
            total = total * spread(columnwise, (*columnwise.shape[:-1], columns), precision.block)
        return total

    whole, rest = divmod(size, width)
    total = part(0, width if whole else rest)
    if whole > 1:
        # A loop of many blocks keeps the program, and what it holds at once, as small as one of them.
        total = jax.lax.fori_loop(1, whole, lambda number, sum: sum + part(number, width), total, unroll=whole <= 8)
    if whole and rest:
        total = total + part(whole, rest)
    return saturate(total, out)


def _narrow_dot(x: Array, weight: Array, precision: Precision, dot: Callable[..., Array]) -> Float[Array, "..."]:
    """The product of stored values in float32."""
    if x.dtype == weight.dtype == jnp.int8:
        return dot(x, weight, preferred_element_type=jnp.int32).astype(jnp.float32)
    if precision.products == "native":
        x, weight = (a.astype(jnp.float8_e4m3fn) if a.dtype == jnp.float4_e2m1fn else a for a in (x, weight))
        return dot(x, weight, preferred_element_type=jnp.float32)
    # Compilers know the pattern of a product of converted fp8 numbers and may put a native one in its place.
    x, weight = jax.lax.optimization_barrier((x.astype(jnp.float32), weight.astype(jnp.float32)))
    return dot(x, weight, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
