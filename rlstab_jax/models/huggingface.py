"""Hugging Face checkpoints, in and out: safetensors <-> the parameters of `Transformer`, tensor by tensor.

A checkpoint has one tensor for each projection of each expert of each layer; here, like layers and the experts of a
layer are stacked. `slots` says which tensor is which entry of which stack. An import writes each tensor, as it is read,
into buffers that lie on the devices already: on the host there is never more than a piece of one tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from rlstab_jax.models.config import Kernels, ModelConfig
from rlstab_jax.models.hf_config import Architecture, architecture_for, read_json, read_model_config
from rlstab_jax.models.safetensors_io import Source, Tensor, read_checkpoint, write_checkpoint
from rlstab_jax.models.sharding import logical_axes
from rlstab_jax.models.transformer import Transformer
from rlstab_jax.parallel.sharding import TRAINING, Rules, check_divides, shardings
from rlstab_jax.types import UserError

DType = Literal["float32", "bfloat16", "float16"]
PIECE = 2**23  # bytes of a tensor that are on the host at a time
SHARD_BYTES = 5 * 10**9  # of an exported file


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor of a checkpoint lies: entry ``index`` of the parameter ``leaf``, transposed or not.

    A checkpoint has the matrix of a product as [out, in], we as [in, out].
    """

    leaf: tuple[str, ...]
    index: tuple[int, ...]  # (repetition of the segment), (repetition, expert), or () for what is not stacked
    transpose: bool

    def shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in a checkpoint."""
        shape = tuple(leaf_shape[len(self.index) :])
        return shape[::-1] if self.transpose else shape


def slots(config: ModelConfig) -> dict[str, Slot]:
    """The slot of each tensor, by its name in a checkpoint, in the order of the layers.

    Raises UserError where no supported architecture computes ``config``.
    """
    architecture = architecture_for(config)
    found = {"model.embed_tokens.weight": Slot(("embedding",), (), False)}
    layer = 0
    for s, (kinds, repeats) in enumerate(config.segments):
        for repetition in range(repeats):
            for b, moe in enumerate(kinds):
                for name, slot in _layer_slots(config, architecture, moe):
                    leaf, index = (f"segment_{s}", f"block_{b}", *slot.leaf), (repetition, *slot.index)
                    found[f"model.layers.{layer}.{name}.weight"] = Slot(leaf, index, slot.transpose)
                layer += 1
    found["model.norm.weight"] = Slot(("final_norm", "gain"), (), False)
    if not config.tie_embeddings:
        found["lm_head.weight"] = Slot(("lm_head", "kernel"), (), True)
    return found


def _layer_slots(config: ModelConfig, architecture: Architecture, moe: bool) -> Iterator[tuple[str, Slot]]:
    yield "input_layernorm", Slot(("attention_norm", "gain"), (), False)
    yield "post_attention_layernorm", Slot(("mlp_norm", "gain"), (), False)
    for name in "qkvo":
        yield f"self_attn.{name}_proj", Slot(("attention", name, "kernel"), (), True)
    for name in "qk" if config.qk_norm != "none" else "":
        yield f"self_attn.{name}_norm", Slot(("attention", f"{name}_norm", "gain"), (), False)
    if not moe:
        for name in ("gate", "up", "down"):
            yield f"mlp.{name}_proj", Slot(("mlp", name, "kernel"), (), True)
        return
    yield f"{architecture.moe}.gate", Slot(("moe", "router", "kernel"), (), True)
    for expert in range(config.num_experts):
        for name, ours in zip(architecture.projections, ("gate", "up", "down"), strict=True):
            yield f"{architecture.moe}.experts.{expert}.{name}", Slot(("moe", ours), (expert,), True)


def parameter_shapes(config: ModelConfig) -> dict:
    """The tree of parameters of `Transformer` as float32 ``ShapeDtypeStruct``."""
    model = Transformer(config, kernels=Kernels("reference", "dense"))

    def make() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"]

    return jax.eval_shape(make)


def leaf_of(tree: dict, path: Sequence[str]) -> jax.Array:
    """The leaf of nested dicts at ``path``."""
    for key in path:
        tree = tree[key]
    return tree  # type: ignore[return-value]


def import_model(
    directory: Path,
    mesh: Mesh,
    *,
    dtype: DType = "float32",
    rules: Rules = TRAINING,
    begin: Callable[[], None] = lambda: None,
) -> tuple[ModelConfig, dict, DType]:
    """Reads a checkpoint onto ``mesh``.

    Beyond the parameters, the host holds a piece of `PIECE` bytes of one tensor, as read, as cast and as sent.

    Args:
      directory: with config.json and safetensors, in one file or several with their index. Experts may be one by one,
        as checkpoints are published, or stacked.
      dtype: of the result.
      rules: the table by which parameters are split.
      begin: is called when the headers of all files have been checked, before the first tensor is read.

    Returns:
      The model's sizes, its parameters, and the dtype of the checkpoint (float32 if it has several).

    Raises:
      UserError: anything about the checkpoint that is missing, not supported, misshapen or truncated, or a mesh that
        does not divide it; it names file and tensor, and nothing has been read by then but headers.
    """
    where = directory / "config.json"
    config = read_model_config(read_json(where), where)
    shapes = parameter_shapes(config)
    tensors = _fitting(read_checkpoint(directory), config, shapes, directory)
    names = logical_axes(shapes)
    check_divides(mesh, shapes, names, rules)
    begin()
    by_leaf: dict[tuple[str, ...], list[tuple[Tensor, Slot]]] = {}
    for name, slot in slots(config).items():
        by_leaf.setdefault(slot.leaf, []).append((tensors[name], slot))

    def read(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return _fill(leaf.shape, sharding, jnp.dtype(dtype), by_leaf[tuple(entry.key for entry in path)])

    params = jax.tree_util.tree_map_with_path(read, shapes, shardings(mesh, names, rules))
    kinds = {str(tensor.dtype) for tensor in tensors.values()}
    return config, params, kinds.pop() if len(kinds) == 1 else "float32"  # type: ignore[return-value]


def _fitting(found: dict[str, Tensor], config: ModelConfig, shapes: dict, directory: Path) -> dict[str, Tensor]:
    """The tensors by the names of `slots`; raises UserError for the first that is missing, extra or misshapen."""
    tensors = dict(_one_by_one(found, config))
    wanted = slots(config)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a constant that old versions saved
    if config.tie_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight"))
    missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing:
        name = next(name for name in wanted if name in missing)
        raise UserError(
            f"{directory}: tensor {name} is missing{_more(missing)}: config.json asks for it, but no file has it"
        )
    if extra:
        tensor = next(tensors[name] for name in tensors if name in extra)
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has no place in the model of config.json{_more(extra)}: "
            "this is another model"
        )
    for name, slot in wanted.items():
        _check_shape(tensors[name], slot.shape(leaf_of(shapes, slot.leaf).shape))
    return tensors


def _more(names: set[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has the shape {list(tensor.shape)}, but config.json makes it "
            f"{list(shape)}"
        )


def _check_tied(head: Tensor, embedding: Tensor | None) -> None:
    """A tied head that was saved all the same is dropped, but only if it says the same."""
    if embedding is None:
        return  # reported as missing
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    for first, last in _pieces(head) if same else ():
        same = same and head.read(first, last).tobytes() == embedding.read(first, last).tobytes()
    if not same:
        raise UserError(
            f"{head.file}: tensor {head.name} differs from {embedding.name}, but config.json ties them "
            "(tie_word_embeddings): correct it"
        )


def _one_by_one(found: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Experts one by one where they are stacked: gate_up_proj [expert, 2 f, d] and down_proj [expert, d, f]."""
    architecture = architecture_for(config)
    gate, up, down = architecture.projections
    e, f, d = config.num_experts, config.expert_dim, config.embed_dim
    for name, tensor in found.items():
        name = name.replace(".mlp.", f".{architecture.moe}.") if architecture.moe else name
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if not stacked:
            yield name, tensor
            continue
        of_both = stacked[2] == "gate_up"
        _check_shape(tensor, (e, 2 * f, d) if of_both else (e, d, f))
        for expert, matrix in enumerate(tensor.unstack()):
            parts = zip((gate, up), matrix.split(2), strict=True) if of_both else [(down, matrix)]
            for projection, part in parts:
                yield f"{stacked[1]}.{expert}.{projection}.weight", part


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `PIECE` bytes."""
    rows = tensor.shape[0]
    step = max(1, PIECE * rows // max(tensor.size, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


Bounds = list[tuple[int, int]]


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> Bounds:
    """First and last (exclusive) position of a shard in each dimension."""
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def _inside(index: tuple[int, ...], bounds: Bounds) -> bool:
    return all(first <= i < last for i, (first, last) in zip(index, bounds, strict=False))


def _met(slot: Slot, bounds: Bounds, first: int, last: int) -> tuple[tuple[slice, ...], np.ndarray]:
    """Of rows ``first`` to ``last`` of a tensor: the part that lies in a shard, and where it begins in the shard."""
    stacked = len(slot.index)
    rows, *others = bounds[stacked:][::-1] if slot.transpose else bounds[stacked:]
    low, high = max(first, rows[0]), min(last, rows[1])
    begins = [low - rows[0], *(0 for _ in others)]
    begins = begins[::-1] if slot.transpose else begins
    leading = [i - bound[0] for i, bound in zip(slot.index, bounds, strict=False)]
    part = (slice(low - first, high - first), *(slice(*bound) for bound in others))
    return part, np.array([*leading, *begins], np.int32)


def _fill(
    shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype, parts: Sequence[tuple[Tensor, Slot]]
) -> jax.Array:
    """One parameter from its tensors, in place: each piece goes to the devices whose shards it meets."""
    places = {
        device: _bounds(index or (), shape) for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shard = sharding.shard_shape(shape)
    small = math.prod(shard) * dtype.itemsize <= PIECE  # put together on the host: nothing is compiled for it
    write, make = (_write_host, np.zeros) if small else (_write, jnp.zeros)
    buffers: dict[jax.Device, Any] = {}
    for device in places:
        with jax.default_device(device):  # `zeros(device=...)` would make them elsewhere first
            buffers[device] = make(shard, dtype)
    for tensor, slot in parts:
        holders = {device: bounds for device, bounds in places.items() if _inside(slot.index, bounds)}
        for first, last in _pieces(tensor) if holders else ():
            values = tensor.read(first, last).astype(dtype, copy=False)
            for device, bounds in holders.items():
                part, start = _met(slot, bounds, first, last)
                if part[0].start < part[0].stop:
                    piece = values[part] if small else jax.device_put(values[part], device)
                    buffers[device] = write(buffers[device], piece, start, slot.transpose)
            jax.block_until_ready(list(buffers.values()))  # else pieces that wait for their turn would pile up
    shards = [jax.device_put(buffer, device, may_alias=not small) for device, buffer in buffers.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@partial(jax.jit, static_argnames="transpose", donate_argnames="buffer")
def _write(buffer: Array, values: Array, start: Int[Array, "dim"], transpose: bool) -> Array:
    """``buffer`` with ``values``, transposed or not, as the entry that begins at ``start``."""
    values = values.T if transpose else values
    values = values.reshape((1,) * (buffer.ndim - values.ndim) + values.shape)
    return jax.lax.dynamic_update_slice(buffer, values, list(start))


def _write_host(buffer: np.ndarray, values: np.ndarray, start: np.ndarray, transpose: bool) -> np.ndarray:
    """As `_write`, in NumPy."""
    values = values.T if transpose else values
    values = values.reshape((1,) * (buffer.ndim - values.ndim) + values.shape)
    buffer[tuple(slice(i, i + n) for i, n in zip(start, values.shape, strict=True))] = values
    return buffer


def export_model(
    config: ModelConfig, params: dict, directory: Path, dtype: DType, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes ``params`` as the safetensors of a checkpoint into ``directory``, which is there; returns the files.

    One tensor at a time is on the host. Casts to ``dtype`` round to nearest.

    Raises:
      UserError: no supported architecture computes ``config``, or some of the parameters are on other hosts.
    """
    sources = []
    for name, slot in slots(config).items():
        leaf = leaf_of(params, slot.leaf)
        if not leaf.is_fully_addressable:
            raise UserError("the parameters are spread over several hosts: export in a single process")
        sources.append(Source(name, jnp.dtype(dtype), slot.shape(leaf.shape), partial(_fetch, leaf, slot)))
    return write_checkpoint(directory, sources, shard_bytes)


def _fetch(leaf: jax.Array, slot: Slot) -> np.ndarray:
    """The tensor of ``slot`` from the shards that hold it."""
    values = np.empty(leaf.shape[len(slot.index) :], leaf.dtype)
    for shard in leaf.addressable_shards:
        bounds = _bounds(shard.index or (), leaf.shape)
        if shard.replica_id == 0 and _inside(slot.index, bounds):
            index = [i - bound[0] for i, bound in zip(slot.index, bounds, strict=False)]
            at = tuple(slice(*bound) for bound in bounds[len(index) :])
            values[at] = np.asarray(_entry(shard.data, np.array(index, np.int32)))
    return values.T if slot.transpose else values


@jax.jit
def _entry(buffer: Float[Array, "..."], index: Int[Array, "dim"]) -> Array:
    """``buffer[*index]``, compiled once for all indices."""
    rest = buffer.shape[index.size :]
    start = [*index, *(jnp.int32(0) for _ in rest)]
    return jax.lax.dynamic_slice(buffer, start, (1,) * index.size + rest).reshape(rest)
