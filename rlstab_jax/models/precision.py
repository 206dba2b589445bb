"""Number formats of an engine, and how tensors are stored in them; `products` multiplies these.

Quantised tensors are *stored*: values in a narrow format and float32 scales, `amax * (1 / largest finite value)` over
what shares the scale. By channel that is the contracted axis (one scale per output channel of a weight, one per token
of an activation); by block it is a square of a weight, and as many contracted numbers of one token.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from rlstab_jax.models.config import ModelConfig
from rlstab_jax.types import UserError

Format = Literal["none", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
# The largest number of each format that is stored; int8 is symmetric, and e5m2's infinity is never used.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float4_e2m1fn": 6.0}
# Some processors take smaller float32 numbers for 0, others do not: here they are 0 on all.
TINY = np.finfo(np.float32).tiny
# An int32 holds the sum of so many products of two int8 numbers.
INT8_TERMS = (2**31 - 1) // 127**2


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of one engine. Router, softmax, logsumexp and the LM head's output are float32 in each of them."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Activations, KV cache and weights that are not quantised. float16 saturates at 65504."""
    weights: Format = "none"
    """Stored weights of linear layers and experts."""
    activations: Format = "none"
    """Inputs of linear layers and experts."""
    kv_cache: Format = "none"
    """Keys and values, scaled by token and head."""
    scales: Literal["channel", "block"] = "channel"
    """What shares a scale. channel: an output channel of a weight, a token; block: block x block numbers of a weight,
    block numbers of a token."""
    block: int = 128
    """Side of a block; the last block of a size that it does not divide is shorter. Only scales = block uses it."""
    products: Literal["emulated", "native"] = "emulated"
    """emulated: narrow floats are multiplied in float32; native: handed to the hardware's matrix units as they are,
    4-bit ones as float8_e4m3fn, which holds them exactly. int8 is multiplied natively in both."""
    quantise_router: bool = True
    """Whether the router's weights and inputs are quantised as well."""
    quantise_lm_head: bool = True
    """Whether the LM head's weights and inputs are quantised as well."""
    float32_lm_head: bool = False
    """Whether an LM head that is not quantised is float32, as such a router is: its stored weights and both operands of
    its products. A tied embedding is stored so too, and looked up in ``dtype``."""

    @property
    def router(self) -> "Precision":
        """The router's: float32 in every precision, unless its stored values are quantised by choice."""
        wide = dataclasses.replace(self, dtype="float32")
        return wide if self.quantise_router else wide.exempt()

    @property
    def lm_head(self) -> "Precision":
        """The LM head's."""
        head = dataclasses.replace(self, dtype="float32") if self.float32_lm_head else self
        return head if self.quantise_lm_head else head.exempt()

    def exempt(self) -> "Precision":
        """The precision of a layer that is exempt from quantisation."""
        return dataclasses.replace(self, weights="none", activations="none")

    def validate(self, model: ModelConfig, name: str = "precision") -> None:
        """Raises UserError where the formats contradict each other or the model's sizes; ``name`` is the field's."""
        quantised = {self.weights, self.activations} - {"none"}
        if self.block < 1:
            raise UserError(f"{name}.block = {self.block}: expected at least 1; 128 is usual")
        if self.scales == "block" and not quantised:
            raise UserError(
                f"{name}.scales = 'block', but neither weights nor activations are quantised: choose a format for one "
                "of them, or scales = 'channel'"
            )
        if self.float32_lm_head and self.quantise_lm_head and quantised:
            raise UserError(
                f"{name}.float32_lm_head and {name}.quantise_lm_head with weights in {self.weights} and activations in "
                f"{self.activations}: the LM head is float32 or quantised; set one of the two to False"
            )
        if self.products == "native" and not _multipliable(self.weights, self.activations):
            raise UserError(
                f"{name}.products = 'native' with weights in {self.weights} and activations in {self.activations}: "
                "matrix units multiply int8 with int8, or two narrow floats; choose such formats, or 'emulated'"
            )
        sizes = _contracted(model)
        field = max(sizes, key=lambda name: sizes[name])
        terms = min(sizes[field], self.block) if self.scales == "block" else sizes[field]
        if self.weights == self.activations == "int8" and terms > INT8_TERMS:
            raise UserError(
                f"model.{field} = {sizes[field]}: an int32 holds the sum of {INT8_TERMS} products of int8 numbers; use "
                f"{name}.scales = 'block' with {name}.block at most that, or another format"
            )


def _contracted(model: ModelConfig) -> dict[str, int]:
    """The sizes that products sum over, by the field that sets them."""
    sizes = {"embed_dim": model.embed_dim, "num_heads * head_dim": model.num_heads * model.head_dim}
    if any(model.kinds):
        sizes["expert_dim"] = model.expert_dim
    if not all(model.kinds):
        sizes["mlp_dim"] = model.mlp_dim
    return sizes


def _multipliable(weights: str, activations: str) -> bool:
    """Whether matrix units exist that multiply the two formats."""
    pair = {weights, activations}
    return pair == {"int8"} or not pair & {"none", "int8"}


def quantised(format: Format, **overrides: object) -> Precision:
    """Weights, activations and KV cache in one format; keyword arguments override fields of `Precision`."""
    values: dict = {"weights": format, "activations": format, "kv_cache": format} | overrides
    return Precision(**values)


def fp8(format: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn", **overrides: object) -> Precision:
    """`quantised` in an fp8 format."""
    return quantised(format, **overrides)


def saturate(x: Float[Array, "*shape"], dtype: jnp.dtype | str) -> Float[Array, "*shape"]:
    """``x`` in a float ``dtype``. Finite numbers stay finite, infinity and NaN show: in float16 what is above 65504 is
    65504. bfloat16 has the range of float32."""
    if jnp.finfo(x.dtype).maxexp > jnp.finfo(dtype).maxexp:
        largest = float(jnp.finfo(dtype).max)
        wide = x.astype(jnp.float32)  # bfloat16 would round the bound up
        x = jnp.where(jnp.isinf(wide), wide, jnp.clip(wide, -largest, largest))
    return x.astype(dtype)


def saturating(op: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """``op(x, y)`` of two arrays of one dtype; float16 saturates where it would overflow."""
    if x.dtype != jnp.float16:
        return op(x, y)
    return saturate(op(x.astype(jnp.float32), y.astype(jnp.float32)), x.dtype)


@struct.dataclass
class Stored:
    """A tensor at rest: ``values`` and, if quantised, a float32 ``scale`` of equal rank.

    In each axis there are as many scales as values, or one for all of them, or one for each block of them. Inside
    `jax.shard_map`, ``across`` is the mesh axis that splits the contracted dimension of a weight within what shares a
    scale: the activations that it is multiplied with share theirs over that axis too.

    ``master`` is what a training engine quantised. No product reads it; the weight's gradient goes to it.
    """

    values: Array
    scale: Float[Array, "..."] | None = None
    master: Float[Array, "..."] | None = None
    across: str | None = struct.field(pytree_node=False, default=None)

    def load(self, dtype: jnp.dtype | str = jnp.float32, block: int = 1) -> Array:
        """The numbers that the stored values stand for, in ``dtype``. ``block`` is the side of a block, if any."""
        if self.scale is None:
            return saturate(self.values, dtype)
        return saturate(self.values.astype(jnp.float32) * spread(self.scale, self.values.shape, block), dtype)

    @property
    def transposed(self) -> "Stored":
        """A matrix whose axes change places."""
        return jax.tree.map(jnp.transpose, self)


def is_narrow_float(dtype: jnp.dtype) -> bool:
    """Whether it is a float type of one byte."""
    return dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating)


def as_bytes(stored: Stored) -> Stored:
    """Narrow floats as their codes, one to a byte: to move them about, as a cache does, compilers for processors
    without the type would widen all of them and narrow them again."""
    values = stored.values
    if values.dtype == jnp.float4_e2m1fn:
        values = jax.lax.bitcast_convert_type(values, jnp.uint4).astype(jnp.uint8)
    elif is_narrow_float(values.dtype):
        values = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return Stored(values, stored.scale)


def from_bytes(stored: Stored, format: Format) -> Stored:
    """What `as_bytes` was given."""
    values = stored.values
    if values.dtype == jnp.uint8:
        values = values.astype(jnp.uint4) if format == "float4_e2m1fn" else values
        values = jax.lax.bitcast_convert_type(values, format)
    return Stored(values, stored.scale)


def spread(scale: Float[Array, "..."], shape: tuple[int, ...], block: int) -> Float[Array, "..."]:
    """``scale`` with the scales of blocks repeated over their block, so that it broadcasts to ``shape``."""
    for axis, (scales, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if scales not in (1, size):
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, block, axis), 0, size, axis=axis)
    return scale


def store(x: Float[Array, "..."], format: Format, axis: int = -1, across: str | None = None) -> Stored:
    """Quantises with one scale per slice along ``axis``; the mesh axis ``across`` continues it on other devices."""
    if format == "none":
        return Stored(x)
    x = _normal(x)
    scale = _scale(_over(jnp.max(jnp.abs(x), axis=axis, keepdims=True), across), format)
    return Stored(_narrow(x / scale, format), scale)


def store_blocks(
    x: Float[Array, "*batch rows columns"], format: Format, height: int, width: int, across: str | None = None
) -> Stored:
    """Quantises with one scale per block of ``height`` x ``width`` numbers; blocks at the end may be smaller."""
    if format == "none":
        return Stored(x)
    x = _normal(x)
    *batch, rows, columns = x.shape
    high, wide = -(-rows // height), -(-columns // width)
    padding = [(0, 0)] * len(batch) + [(0, high * height - rows), (0, wide * width - columns)]
    blocks = jnp.pad(jnp.abs(x), padding).reshape(*batch, high, height, wide, width)
    scale = _scale(_over(blocks.max((-3, -1)), across), format)
    tall = jnp.repeat(scale, height, -2)[..., :rows, :]
    return Stored(_narrow(x / jnp.repeat(tall, width, -1)[..., :columns], format), scale)


def store_weight(weight: Float[Array, "..."], precision: Precision, transposed: bool = False) -> Stored:
    """A weight [.., in, out], or [.., out, in] if ``transposed``, as an engine stores it."""
    if precision.scales == "block":
        return store_blocks(weight, precision.weights, precision.block, precision.block)
    return store(weight, precision.weights, axis=-1 if transposed else -2)


def store_activations(x: Float[Array, "*batch tokens in"], precision: Precision, across: str | None = None) -> Stored:
    """The inputs of a product as an engine stores them; ``across`` as in `Stored`."""
    if precision.scales == "block":
        return store_blocks(x, precision.activations, 1, precision.block, across)
    return store(x, precision.activations, across=across)


def _normal(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` in float32, without numbers that some processors would take for 0."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < TINY, 0.0, x)


def _over(amax: Float[Array, "..."], across: str | None) -> Float[Array, "..."]:
    """The largest of the devices along a mesh axis."""
    return amax if across is None else jax.lax.pmax(amax, across)


def _scale(amax: Float[Array, "..."], format: Format) -> Float[Array, "..."]:
    """Largest absolute values to scales. NaN and infinity stay: not every format could show them."""
    # A product, since compilers turn the division by a constant into one, or not: the scale would depend on them.
    return jnp.where(amax == 0, 1.0, jnp.maximum(amax * (1 / np.float32(LARGEST[format])), TINY))


def _narrow(x: Float[Array, "..."], format: Format) -> Array:
    """Rounds to nearest, ties to even, and saturates: x / scale can round up past the largest value."""
    largest = LARGEST[format]
    x = jnp.clip(x, -largest, largest)
    return (jnp.round(x) if format == "int8" else x).astype(format)
