"""What it takes to call Pallas kernels of libraries."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax


def exact(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of arrays, with products of float32 numbers in float32, in its values and in its gradient.

    The kernels leave the precision of their products to the context in which they are traced, which on TPU rounds the
    operands to bfloat16 by default; their backward kernels are traced later, outside of any context around the call.
    Only for float32 operands: products of bfloat16 have no such precision.
    """

    @wraps(f)
    def forward(*args: Any) -> tuple[Any, Any]:
        with jax.default_matmul_precision("highest"):
            return jax.vjp(f, *args)

    def backward(vjp: Callable[..., Any], gradient: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return vjp(gradient)

    def value(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return f(*args)

    kernel = jax.custom_vjp(value)
    kernel.defvjp(forward, backward)
    return kernel
