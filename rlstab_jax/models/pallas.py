"""What it takes to call Pallas kernels."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jaxtyping import Array

from rlstab_jax.types import UserError


def check_addressable(values: Array, what: str, remedy: str) -> None:
    """Raises UserError for an array that Pallas's Triton kernels cannot address: they take signed numbers of 32 bits
    for arrays of up to 4 GiB, which do not reach as many bytes."""
    if values.dtype.itemsize == 1 and 2**31 < values.size <= 2**32:
        raise UserError(
            f"{what} have {values.size} numbers of a byte, and between 2**31 and 2**32 they cannot be addressed: "
            f"{remedy}"
        )


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
