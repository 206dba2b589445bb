"""Logical names of the model's parameters, which the tables of `parallel.sharding` map to mesh axes."""

from typing import cast

import jax
from jax.sharding import Mesh

from rlstab_jax.models.precision import Precision
from rlstab_jax.parallel.sharding import INFERENCE, Layout, partition_spec, parts_of, shardings

# Of one layer's `ExpertWeights`.
EXPERTS = {
    "gate": ("experts", "embed", "expert_mlp"),
    "up": ("experts", "embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "embed"),
}
# By the last two names of a parameter's path; what repeats (layers) has one more dimension in front.
_NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("q", "kernel"): ("embed", "heads"),
    ("k", "kernel"): ("embed", "kv_heads"),
    ("v", "kernel"): ("embed", "kv_heads"),
    ("o", "kernel"): ("heads", "embed"),
    ("q_norm", "gain"): ("head_dim",),
    ("k_norm", "gain"): ("head_dim",),
    ("attention_norm", "gain"): ("embed",),
    ("mlp_norm", "gain"): ("embed",),
    ("final_norm", "gain"): ("embed",),
    ("router", "kernel"): ("embed", "experts"),
    ("moe", "predictor"): ("embed", "experts"),
    **{("moe", name): axes for name, axes in EXPERTS.items()},
    ("gate", "kernel"): ("embed", "mlp"),
    ("up", "kernel"): ("embed", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("lm_head", "kernel"): ("embed", "vocab"),
}


def logical_axes(params: dict) -> dict:
    """The logical name of each dimension of each parameter of `Transformer`, as a tree of tuples like ``params``.

    Args:
      params: arrays or ``ShapeDtypeStruct``, as in the collection "params".

    Raises:
      ValueError: a parameter has no names, or another rank.
    """

    def name(path: jax.tree_util.KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, ...]:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        names = ("vocab", "embed") if keys == ["embedding"] else _NAMES.get((keys[-2], keys[-1]))
        if names is None:
            raise ValueError(f"no logical axes for the parameter {'/'.join(keys)}")
        names = ("layers", *names) if keys[0].startswith("segment_") else names
        if len(names) != len(leaf.shape):
            raise ValueError(f"{'/'.join(keys)} has shape {leaf.shape}, but the logical axes {names}")
        return names

    return jax.tree_util.tree_map_with_path(name, params)


def laid_out(params: dict, layout: Layout) -> dict:
    """``params`` laid out by a table, and with them their gradient, which compilers would leave whole everywhere."""
    if layout.mesh is None or not layout.splits:
        return params
    return cast(
        dict, jax.lax.with_sharding_constraint(params, shardings(layout.mesh, logical_axes(params), layout.rules))
    )


def scale_axes(
    names: tuple[str, ...], weight: jax.Array, scale: jax.Array, precision: Precision, mesh: Mesh
) -> tuple[str | None, ...]:
    """Logical names of a scale's dimensions: its weight's where each device's values have scales of their own."""

    def own(name: str, size: int, scales: int) -> bool:
        parts = parts_of(mesh, partition_spec((name,), INFERENCE)[0])
        return scales == size or size % (parts * precision.block) == 0

    shapes = zip(names, weight.shape, scale.shape, strict=True)
    return tuple(name if scales > 1 and own(name, size, scales) else None for name, size, scales in shapes)
