"""Products of rows that are sorted by expert with their expert's matrix, in the place of `jax.lax.ragged_dot`.

Rows past the last expert's have no meaning, in what is given and in what is returned.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlstab_jax.models.pallas import check_addressable, exact
from rlstab_jax.models.precision import is_narrow_float
from rlstab_jax.types import UserError

Rows = Float[Array, "rows in"]
Stack = Float[Array, "E in out"]
Sizes = Int[Array, "E"]
LANES, SUBLANES = 128, 32
"""A TPU register's columns, and its rows of one-byte numbers."""
TRITON_SIDE = 64
"""Columns of a block, and what is summed over at once."""
TOKAMAX_TILE = 64
"""What tokamax's Hopper kernels copy at once of rows, where they sum over these for a gradient, and of columns."""


def megablox(
    x: Rows,
    weight: Stack,
    sizes: Sizes,
    precision: jax.lax.Precision | None = None,
    preferred_element_type: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """By JAX's Pallas kernels for TPUs, whose gradient costs what it must with any libtpu.

    ``interpret`` runs them as JAX operations, on any platform; for tests. Raises UserError on operands that are neither
    bfloat16 nor float32.
    """
    _check_operands("megablox", x, jnp.bfloat16, jnp.float32)
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

    rows = x.shape[0]
    tile = int(np.clip(_share(rows, weight), 128, 512)) if rows > 128 else -(-rows // 16) * 16
    tiling = (tile, *(min(512, -(-size // 128) * 128) for size in weight.shape[1:]))

    def product(x: Rows, weight: Stack, sizes: Sizes) -> Array:
        return gmm(x, weight, sizes, preferred_element_type, tiling, None, None, False, interpret)

    padded = jnp.pad(x, ((0, -rows % tile), (0, 0)))
    return (exact(product) if precision == jax.lax.Precision.HIGHEST else product)(padded, weight, sizes)[:rows]


def narrow(
    x: Rows,
    weight: Stack,
    sizes: Sizes,
    precision: jax.lax.Precision | None = None,
    preferred_element_type: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """By a Pallas kernel for TPUs that reads weights as they are stored. No gradient.

    fp8 numbers are widened to bfloat16, which holds them exactly, on the chip: a matrix is read once, and only if its
    expert has rows. Without it, where the matrix units know no fp8, all experts' weights are widened in the large
    memory first. Products are summed in float32, those of int8 in int32. For an engine whose products are "native" and
    whose scales are by channel: what is emulated, or in 4 bits, is widened before it comes here, and blocks are copied.

    Args:
      interpret: runs the kernel as JAX operations, on any platform; for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, size), (experts, _, columns) = x.shape, weight.shape
    x = x.astype(jnp.bfloat16) if is_narrow_float(x.dtype) else x
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    weight = jnp.pad(weight, ((0, 0), (0, 0), (0, -columns % LANES)))
    width = _width(size, weight)
    tile = int(np.clip(_share(rows, weight), SUBLANES, LANES))
    # At most 2 MiB of rows and 2 MiB of results: with weights, and a second buffer for each, they fit a v5e's 16 MiB.
    most = 2**21 // max(size * x.dtype.itemsize, width * 4)
    block = tile * int(np.clip(most // tile, 1, -(-rows // tile)))
    x = jnp.pad(x, ((0, -rows % block), (0, 0)))
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), sums)

    # The rows of each block that are each expert's, and the matrix to have at hand: its own, or else the one before.
    end = jnp.cumsum(sizes)
    low = jnp.arange(0, x.shape[0], block)[:, None]
    first, last = (jnp.clip(at - low, 0, block).astype(jnp.int32) for at in (end - sizes, end))
    used = last > first
    held = jax.lax.cummax(jnp.where(used, jnp.arange(experts), -1), axis=1)
    held = jnp.where(held < 0, jnp.argmax(used, axis=1, keepdims=True), held).astype(jnp.int32)

    y = pl.pallas_call(
        functools.partial(_narrow_kernel, tile=tile, precision=precision),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(out.shape[1] // width, len(low), experts),
            in_specs=[
                pl.BlockSpec((block, size), lambda column, row, expert, held, first, last: (row, 0)),
                pl.BlockSpec(
                    (1, size, width), lambda column, row, expert, held, first, last: (held[row, expert], 0, column)
                ),
            ],
            out_specs=pl.BlockSpec((block, width), lambda column, row, expert, held, first, last: (row, column)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(x, weight, sums),
        interpret=interpret,
        name="narrow_experts",
    )(held, first, last, x, weight)
    return y[:rows, :columns].astype(preferred_element_type)


def _narrow_kernel(
    held: Any, first: Any, last: Any, x: Any, weight: Any, y: Any, *, tile: int, precision: jax.lax.Precision | None
) -> None:
    """Adds one expert's part of a block of rows."""
    from jax.experimental import pallas as pl

    row, expert = pl.program_id(1), pl.program_id(2)
    begin, end = first[row, expert], last[row, expert]
    size = x.shape[1]
    chunk = next((chunk for chunk in (512, 384, 256, LANES) if size % chunk == 0), size)

    @pl.when(expert == 0)
    def _() -> None:
        y[...] = jnp.zeros_like(y)

    def add(number: Array, _: None) -> None:
        """One chunk of the contracted axis: widened once, and multiplied with each tile that has rows of the expert."""
        part = pl.ds(pl.multiple_of(number * chunk, chunk), chunk)
        matrix = weight[0, part].astype(x.dtype)

        def add_tile(number: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(number * tile, tile), tile)
            product = jnp.dot(x[at, part], matrix, precision=precision, preferred_element_type=y.dtype)
            position = number * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
            y[at] += jnp.where((position >= begin) & (position < end), product, 0)

        jax.lax.fori_loop(jax.lax.div(begin, tile), jax.lax.div(end + tile - 1, tile), add_tile, None)

    @pl.when(end > begin)
    def _() -> None:
        jax.lax.fori_loop(0, size // chunk, add, None)


def _width(size: int, weight: Array) -> int:
    """The largest block of columns that divides all of them, with at most 1 MiB of weights."""
    columns = weight.shape[-1]
    fitting = [
        width
        for width in range(LANES, columns + 1, LANES)
        if columns % width == 0 and size * width * weight.dtype.itemsize <= 2**20
    ]
    return max(fitting, default=LANES)


def tokamax(
    x: Rows,
    weight: Stack,
    sizes: Sizes,
    precision: jax.lax.Precision | None = None,
    preferred_element_type: jnp.dtype = jnp.float32,
    implementation: Literal["mosaic", "xla"] = "mosaic",
) -> Float[Array, "rows out"]:
    """By the kernels of the package tokamax for NVIDIA GPUs, in bfloat16.

    Its version 0.0.17 has kernels from Ampere (A100) on, but that of the weights' gradient for Hopper (H100, H200)
    only; where it lacks one, it raises NotImplementedError. ``implementation`` "xla" runs anywhere; for tests. Raises
    UserError on other operands, and on sides of matrices that the Hopper kernels do not copy.
    """
    _check_operands("tokamax", x, jnp.bfloat16)
    _check_widths(weight)
    import tokamax

    rows = x.shape[0]
    return tokamax.ragged_dot(
        jnp.pad(x, ((0, -rows % TOKAMAX_TILE), (0, 0))),
        weight,
        sizes,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )[:rows]


def triton(
    x: Rows,
    weight: Stack,
    sizes: Sizes,
    precision: jax.lax.Precision | None = None,
    preferred_element_type: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """As `narrow`, by a Pallas kernel for NVIDIA GPUs (Triton). No gradient.

    XLA would transpose weights of fp8 for the matrix units, of which a loop of steps holds a second copy, or widen
    them. Here they are multiplied as bfloat16. It copies nothing if the sides of matrices are multiples of 64.

    Args:
      interpret: runs the kernel as JAX operations, on any platform; for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as backend

    what, remedy = "kernels.decode_experts = 'triton': on one device a layer's experts", "split them (mesh.expert)"
    check_addressable(weight, what, remedy)
    (rows, size), (experts, _, columns) = x.shape, weight.shape
    x = x.astype(jnp.bfloat16) if is_narrow_float(x.dtype) else x
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    side, tile = TRITON_SIDE, int(np.clip(_share(rows, weight), 16, 64))
    weight = jnp.pad(weight, ((0, 0), (0, -size % side), (0, -columns % side)))
    x = jnp.pad(x, ((0, tile), (0, -size % side)))  # the last tile begins in front of the last row
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    y = pl.pallas_call(
        functools.partial(_triton_kernel, tile=tile, precision=precision, sums=sums),
        out_shape=jax.ShapeDtypeStruct((len(x), weight.shape[2]), sums),
        grid=(experts, weight.shape[2] // side),
        in_specs=[
            pl.BlockSpec((None, 2), lambda expert, column: (expert, 0)),
            pl.BlockSpec(x.shape, lambda expert, column: (0, 0)),
            pl.BlockSpec((None, weight.shape[1], side), lambda expert, column: (expert, 0, column)),
        ],
        out_specs=pl.BlockSpec((len(x), side), lambda expert, column: (0, column)),
        compiler_params=backend.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=_cost(x, weight, sums),
        interpret=interpret,
        name="triton_experts",
    )(jnp.stack([ends - sizes, ends], axis=1).astype(jnp.int32), x, weight)
    return y[:rows, :columns].astype(preferred_element_type)


def _triton_kernel(
    ends: Any, x: Any, weight: Any, y: Any, *, tile: int, precision: jax.lax.Precision | None, sums: Any
) -> None:
    """A block of columns of one expert's rows, one tile after another. Its last rows may be the next expert's: those
    are not written."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as backend

    begin, end = ends[0], ends[1]
    chunk = TRITON_SIDE

    def one(number: Array, _: None) -> None:
        start = begin + number * tile
        at = pl.ds(start, tile)

        def add(number: Array, total: Array) -> Array:
            part = pl.ds(number * chunk, chunk)
            matrix = weight[part, :].astype(x.dtype)
            return total + jnp.dot(x[at, part], matrix, precision=precision, preferred_element_type=sums)

        total = jax.lax.fori_loop(0, weight.shape[0] // chunk, add, jnp.zeros((tile, chunk), sums))
        own = start + jnp.arange(tile)[:, None] < end
        backend.store(y.at[at, :], total, mask=jnp.broadcast_to(own, total.shape))

    jax.lax.fori_loop(0, jax.lax.div(end - begin + tile - 1, tile), one, None)


def _cost(x: Rows, weight: Stack, sums: Any) -> Any:
    """Of a kernel that multiplies each row with one matrix, and reads all."""
    from jax.experimental import pallas as pl

    out = x.shape[0] * weight.shape[2]
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (x, weight)) + out * jnp.dtype(sums).itemsize
    return pl.CostEstimate(flops=2 * x.shape[1] * out, transcendentals=0, bytes_accessed=moved)


def _share(rows: int, weight: Stack) -> int:
    """An expert's mean share of the rows, rounded down to a power of two."""
    return 2 ** math.floor(math.log2(max(rows / weight.shape[0], 1)))


def _check_widths(weight: Stack) -> None:
    for width in weight.shape[1:]:
        if width % (8 if width < TOKAMAX_TILE else TOKAMAX_TILE):
            raise UserError(
                f"the expert kernel 'tokamax' multiplies matrices whose sides are multiples of {TOKAMAX_TILE}, or of 8 "
                f"below {TOKAMAX_TILE}, but on one device an expert's are {weight.shape[1]} and {weight.shape[2]} "
                "(model.embed_dim, and model.expert_dim over mesh.tensor): change these, or use 'auto' in "
                "kernels.experts and kernels.decode_experts"
            )


def _check_operands(kernel: str, x: Array, *supported: Any) -> None:
    if x.dtype not in supported:
        names = " and ".join(str(jnp.dtype(dtype)) for dtype in supported)
        raise UserError(
            f"the expert kernel {kernel!r} multiplies {names}, but this precision multiplies {x.dtype}: use "
            "'auto' in kernels.experts and kernels.decode_experts, or another precision"
        )
