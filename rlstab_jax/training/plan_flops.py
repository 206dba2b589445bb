"""Floating-point operations of a function's matrix products, counted from its jaxpr: bodies of scans as often as run.

Compilers' own counts take a loop's body once. These are of the whole function, over all devices; they include what is
computed again in the backward pass, and leave out what is no product (norms, softmax, top-k), which units of another
kind compute.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rlstab_jax.models.spread import cost_in

Rates = dict[str, float]
"""Operations by the rate of `Chip` at which they run: bfloat16, narrow_float, int8, float32."""


def products(jaxpr: Any, silent: bool = True, used: float = 1.0) -> Rates:
    """Operations (a multiplication and an addition are two) of all products of ``jaxpr``.

    A loop whose length is not known before it runs counts as one round, and of branches the costliest, unless their
    name says what they cost where tokens choose experts evenly (`models.spread`). What nothing uses does not count.

    Args:
      jaxpr: as `jax.jit(f).trace(...).jaxpr` gives it.
      silent: with the products of Pallas kernels that do not state them, which a compiler cannot know.
      used: the part of the rows of a grouped product that hold tokens, on average: a buffer has room for the worst
        case, and kernels pass over what is empty.
    """
    total: Rates = {}
    for eqn in _alive(getattr(jaxpr, "jaxpr", jaxpr)):
        name = eqn.primitive.name
        known = cost_in(str(eqn.source_info.name_stack))
        rounds, held = known or (1.0, 1.0)
        if name == "dot_general":
            found = {_rate(eqn): _dot(eqn)}
        elif name.startswith("ragged_dot"):
            found = {_rate(eqn): _ragged_dot(eqn) * used}
        elif name == "pallas_call":
            found = _kernel(eqn, silent, used)
        elif (count := _of_a_library(eqn, used)) is not None:
            found = {"bfloat16": count} if silent else {}
        elif name == "cond":
            branches = [products(branch, silent, used) for branch in eqn.params["branches"]]
            found = branches[0] if known else max(branches, key=lambda branch: sum(branch.values()))
        else:
            times = rounds if name == "while" else _times(eqn)
            found = {}
            for inner in _bodies(eqn):
                found = added(found, scaled(products(inner, silent, used), times))
        total = added(total, scaled(found, held))
    return total


def _alive(jaxpr: Any) -> list[Any]:
    """The equations that results depend on: a compiler drops the others."""
    needed, found = {id(var) for var in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(var) in needed for var in eqn.outvars):
            needed.update(id(var) for var in eqn.invars)
            found.append(eqn)
    return found


def added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The sums of numbers with equal names."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}


def scaled(count: Mapping[str, float], factor: float) -> dict[str, float]:
    """Each number times ``factor``."""
    return {name: value * factor for name, value in count.items()}


def _times(eqn: Any) -> float:
    """How often the bodies of an equation run: a scan's length; devices of a `shard_map`, whose body is one's share."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params.get("manual_axes", mesh.axis_names))
    return 1


def _bodies(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs; of a custom derivative the function itself, since its rules run elsewhere."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield inner


def _rate(eqn: Any) -> str:
    """The rate of a product: that of its widest operand; float32 in full precision where that was asked for."""
    x, y = (np.dtype(var.aval.dtype) for var in eqn.invars[:2])
    widest = max(x, y, key=lambda dtype: dtype.itemsize)
    if widest == np.int8:
        return "int8"
    if widest.itemsize == 1:
        return "narrow_float"
    precision = eqn.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    return "float32" if widest == jnp.float32 and str(precision).endswith(("HIGHEST", "F32")) else "bfloat16"


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Each row of the grouped operand meets one group's columns."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    left, right = (var.aval.shape for var in eqn.invars[:2])
    return 2.0 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in shared)


def _kernel(eqn: Any, silent: bool, used: float) -> Rates:
    """A Pallas kernel: what its author states, else its body at each point of its grid."""
    stated = eqn.params["cost_estimate"]
    if stated is not None:
        # Of the kernels in use here, grouped products state them; int32 operands say which rows are whose.
        operands = [np.dtype(var.aval.dtype) for var in eqn.invars if var.aval.dtype != jnp.int32]
        widest = max(operands, key=lambda dtype: dtype.itemsize)
        rate = "int8" if widest == np.int8 else "bfloat16" if widest.itemsize == 2 else "float32"
        return {rate: stated.flops * used}
    if not silent:
        return {}
    grid = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return scaled(products(eqn.params["jaxpr"]), grid * _unmasked(eqn))


def _of_a_library(eqn: Any, used: float) -> float | None:
    """Operations of a kernel of tokamax or cuDNN, which has no product that could be seen; None of anything else."""
    shapes = [var.aval.shape for var in eqn.invars if var.aval.dtype in (jnp.bfloat16, jnp.float16)]
    if re.fullmatch(r"ragged_(contracting_dim_)?dot_sm\d+", str(eqn.params.get("name"))):
        # Each row meets one expert's columns; in the gradient of the weights, rows are summed into one expert's.
        return 2.0 * math.prod(shapes[0]) * shapes[1][-1] * used
    if eqn.primitive.name.startswith("dot_product_attention"):
        # Scores and values, or in the backward pass scores once more and four gradients, up to the diagonal.
        rows, time, heads, width = shapes[0]
        return (5 if "bwd" in eqn.primitive.name else 2) * rows * heads * width * time * (time + 1.0)
    return None


def _unmasked(eqn: Any) -> float:
    """The part of the blocks that a splash kernel computes: it skips those above the diagonal of a causal mask.

    Its first operands say which blocks to compute, [1, blocks, blocks]; without a mask there are none.
    """
    if "splash" not in str(eqn.params["name"]) or eqn.invars[0].aval.dtype != jnp.int8:
        return 1.0
    blocks = eqn.invars[0].aval.shape[-1]
    return (blocks + 1) / (2 * blocks)
