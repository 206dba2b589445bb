"""Expert weights, the SwiGLU layer through them and its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlstab_jax.models.precision import Precision, Stored, saturating
from rlstab_jax.models.products import gradients, matmul

Tokens = Float[Array, "tokens d"]
Experts = Int[Array, "tokens k"]
Gates = Float[Array, "tokens k"]
Sums = Float[Array, "tokens d"]


@struct.dataclass
class ExpertWeights:
    """Stacked weights of experts: ``gate`` and ``up`` [E, d, f], ``down`` [E, f, d].

    Where ``devices`` share a layer's experts, these are the E of one of them, and the others' are "not dispatched".
    """

    gate: Stored
    up: Stored
    down: Stored
    devices: int = struct.field(pytree_node=False, default=1)

    @property
    def num_experts(self) -> int:
        return self.gate.values.shape[0]

    @property
    def in_layer(self) -> int:
        """The experts that the tokens are spread over."""
        return self.num_experts * self.devices

    def each(self, f: Callable[..., Stored], *others: Sequence[Any]) -> "ExpertWeights":
        """``f`` of each matrix and of what belongs to it in ``others``, in the order gate, up, down."""
        gate, up, down = (f(*of) for of in zip((self.gate, self.up, self.down), *others, strict=True))
        return replace(self, gate=gate, up=up, down=down)


def swiglu(x: Array, weights: ExpertWeights, precision: Precision) -> Array:
    """down(silu(gate x) * up x)"""
    return swiglu_and_parts(x, weights, precision)[-1]


def swiglu_and_parts(x: Array, weights: ExpertWeights, precision: Precision) -> tuple[Array, Array, Array]:
    """gate x and up x, which the gradient wants, and `swiglu`."""
    gate, up = (matmul(x, weight, precision, precision.dtype) for weight in (weights.gate, weights.up))
    return gate, up, matmul(gated(gate, up), weights.down, precision, precision.dtype)


def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up"""
    return saturating(jnp.multiply, jax.nn.silu(gate), up)


def swiglu_gradient(
    x: Array, gate: Array, up: Array, weights: ExpertWeights, precision: Precision, d_y: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Of ``x`` and of the matrices gate, up and down, from the parts of `swiglu_and_parts` and the gradient of y."""

    def through(x: Array, weight: Stored, d_y: Array) -> tuple[Array, Array]:
        return gradients(matmul, x, weight, precision, precision.dtype, d_y)

    hidden, through_gate = jax.vjp(gated, gate, up)
    d_hidden, d_down = through(hidden, weights.down, d_y)
    d_gate, d_up = through_gate(d_hidden)
    d_x, d_gate = through(x, weights.gate, d_gate)
    d_x_too, d_up = through(x, weights.up, d_up)
    return d_x + d_x_too, (d_gate, d_up, d_down)


def weighted(gates: Gates, y: Float[Array, "tokens k d"]) -> Sums:
    """sum_k gates[t, k] * y[t, k], in float32."""
    # float32 whatever the engine's dtype: accelerators would otherwise round gates and outputs to bfloat16.
    return jnp.einsum("tk,tkd->td", gates, y, precision=jax.lax.Precision.HIGHEST)
