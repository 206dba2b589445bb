"""Number formats of an engine, and the one matrix product that honours them.

Quantised tensors are *stored*: values in a narrow format and float32 scales, `amax * (1 / largest finite value)` over
the contracted axis (weights: one scale per output channel; activations: one per token). A product multiplies stored
values in float32, which is exact, accumulates in float32 and applies both scales, so that hardware without the type
computes what hardware with it would, up to the order of the sum.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

Format = Literal["none", "float8_e4m3fn", "float8_e5m2"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of one engine. Router, softmax, logsumexp and the LM head's output are float32 in each of them."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Activations, KV cache and weights that are not quantised."""
    weights: Format = "none"
    """Stored weights of linear layers and experts, scaled by output channel."""
    activations: Format = "none"
    """Inputs of linear layers and experts, scaled by token."""
    kv_cache: Format = "none"
    """Keys and values, scaled by token and head."""
    quantise_router: bool = True
    """Whether the router's weights and inputs are quantised as well."""
    quantise_lm_head: bool = True
    """Whether the LM head's weights and inputs are quantised as well."""

    def exempt(self) -> "Precision":
        """The precision of a layer that is exempt from quantisation."""
        return dataclasses.replace(self, weights="none", activations="none")


def fp8(format: Format = "float8_e4m3fn", **overrides: object) -> Precision:
    """Weights, activations and KV cache in one fp8 format; keyword arguments override fields of `Precision`."""
    values: dict = {"weights": format, "activations": format, "kv_cache": format} | overrides
    return Precision(**values)


@struct.dataclass
class Stored:
    """A tensor at rest: ``values`` and, if quantised, float32 ``scale`` broadcastable to them."""

    values: Array
    scale: Float[Array, "..."] | None = None

    def load(self, dtype: jnp.dtype | str = jnp.float32) -> Array:
        """The numbers that the stored values stand for, in ``dtype``."""
        if self.scale is None:
            return self.values.astype(dtype)
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def store(x: Float[Array, "..."], format: Format, axis: int = -1) -> Stored:
    """Quantises with one scale per slice along ``axis``. The cast saturates: fp8 casts of JAX overflow to NaN."""
    if format == "none":
        return Stored(x)
    largest = np.float32(jnp.finfo(format).max)
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    # A product, since compilers turn the division by a constant into one, or not: the scale would depend on them.
    scale = jnp.where(amax > 0, amax * (1 / largest), 1.0)
    return Stored(jnp.clip(x / scale, -largest, largest).astype(format), scale)


def matmul(x: Float[Array, "*batch rows in"], weight: Stored, precision: Precision, out: str) -> Array:
    """``x @ weight`` in an engine's precision, in dtype ``out``. Leading axes are batch axes of both.

    Rows are tokens; ``weight.scale`` is [..., 1, out] or None.
    """
    if precision.activations == "none" and weight.scale is None:
        # float32 means float32: accelerators would otherwise round the operands of a product to bf16 or tf32.
        exact = jax.lax.Precision.HIGHEST if precision.dtype == "float32" else None
        values = weight.values.astype(precision.dtype)
        return jnp.matmul(x.astype(precision.dtype), values, precision=exact, preferred_element_type=jnp.dtype(out))
    stored = store(x, precision.activations)
    product = jnp.matmul(
        stored.values.astype(jnp.float32),
        weight.values.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    for scale in (stored.scale, weight.scale):
        product = product if scale is None else product * scale
    return product.astype(out)
