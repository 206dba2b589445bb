"""Which mesh axis splits which dimension: one table from logical names to mesh axes. A new layout is a new table.

Models name the dimensions of their parameters and arrays (``("experts", "embed", "expert_mlp")``) and know nothing of
meshes.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlstab_jax.types import UserError, row_axis

Rules = tuple[tuple[str, tuple[str, ...]], ...]

# Training: parameters and optimiser state are split as far as the mesh goes and gathered where they are used. Rows lie
# over the axis of the experts too: whatever is no expert uses it as data parallelism.
TRAINING: Rules = (
    ("batch", ("data", "fsdp", "expert")),
    ("time", ()),
    ("embed", ("fsdp",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("head_dim", ()),
    ("mlp", ("tensor",)),
    ("experts", ("expert",)),
    ("expert_mlp", ("tensor",)),
    ("layers", ()),
)

# Inference: as training, but fsdp splits no weights, since a decode step is too short to gather them.
INFERENCE: Rules = tuple((name, () if name == "embed" else axes) for name, axes in TRAINING)


def partition_spec(logical_axes: Iterable[str | None], rules: Rules) -> PartitionSpec:
    """The mesh axes of each dimension of one array, by ``rules``; ``None`` is a dimension that is never split.

    A mesh axis splits one dimension of an array only: the first that asks for it. So ``("batch", "time", "embed")`` is
    split by batch alone under ``TRAINING``, although both batch and embed ask for ``fsdp``.

    >>> tuple(partition_spec(("experts", "embed", "expert_mlp"), TRAINING))
    ('expert', 'fsdp', 'tensor')

    Raises:
      ValueError: a name is not in ``rules``.
    """
    table = dict(rules)
    used: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = []
    for name in logical_axes:
        if name is not None and name not in table:
            raise ValueError(f"no sharding rule for the axis {name!r}; the rules name {', '.join(table)}")
        axes = tuple(axis for axis in (table[name] if name is not None else ()) if axis not in used)
        used.update(axes)
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def shardings(mesh: Mesh, logical_tree: Any, rules: Rules) -> Any:
    """A ``NamedSharding`` for each leaf of ``logical_tree``.

    A leaf is a tuple of logical names, or the ``PartitionSpec`` of names that ``flax.linen.get_partition_spec`` gives.
    """
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names, rules)), logical_tree, is_leaf=_is_logical_axes
    )


def constrain(x: jax.Array, logical_axes: Iterable[str | None], mesh: Mesh | None, rules: Rules) -> jax.Array:
    """``x``, asked of the compiler to be laid out on ``mesh`` by ``rules``; just ``x`` where there is no mesh.

    A dimension that its mesh axes do not divide is left to the compiler.
    """
    if mesh is None:
        return x
    spec = partition_spec(logical_axes, rules)
    dimensions = zip(x.shape, spec, strict=True)
    fits = [axes if size % parts_of(mesh, axes) == 0 else PartitionSpec.UNCONSTRAINED for size, axes in dimensions]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))


def parts_of(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of parts that mesh axes, as they stand in a ``PartitionSpec``, cut a dimension into."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of one engine lie. Without a mesh, or on one device, nothing is asked of the compiler."""

    mesh: Mesh | None = None
    rules: Rules = TRAINING

    @property
    def splits(self) -> bool:
        """Whether there are several devices."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def rows(self) -> tuple[str, ...]:
        """The mesh axes that rows of a batch lie over."""
        return dict(self.rules)["batch"]

    @property
    def row_parts(self) -> int:
        """The number of parts that rows are split into."""
        return self.parts(self.rows)

    def parts(self, axes: str | tuple[str, ...]) -> int:
        """The number of parts that ``axes`` cut a dimension into."""
        return 1 if self.mesh is None else parts_of(self.mesh, axes)

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        """`constrain` by this layout."""
        return constrain(x, logical_axes, self.mesh if self.splits else None, self.rules)

    def constrain_rows(self, tree: Any) -> Any:
        """Arrays that travel (`rlstab_jax.types`), with their rows over the data-parallel devices."""

        def of(leaf: jax.Array) -> jax.Array:
            if not leaf.ndim:
                return leaf
            names: list[str | None] = [None] * leaf.ndim
            names[row_axis(leaf)] = "batch"
            return self.constrain(leaf, *names)

        return jax.tree.map(of, tree) if self.splits else tree


def check_divides(mesh: Mesh, tree: Any, logical_tree: Any, rules: Rules) -> None:
    """Checks that ``mesh`` divides each dimension of ``tree`` (arrays or ``ShapeDtypeStruct``) that ``rules`` split.

    Raises:
      UserError: names the first parameter, dimension and mesh axis that do not fit.
    """

    def check(path: jax.tree_util.KeyPath, names: Iterable[str | None], leaf: Any) -> None:
        names = tuple(names)
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(leaf.shape):
            raise ValueError(f"{parameter} has shape {leaf.shape} but the logical axes {names}")
        for dimension, (name, size, axes) in enumerate(
            zip(names, leaf.shape, partition_spec(names, rules), strict=True)
        ):
            parts = parts_of(mesh, axes)
            if size % parts:
                axes = (axes,) if isinstance(axes, str) else axes
                raise UserError(
                    f"{parameter}: dimension {dimension} ({name}, size {size}) is not divisible by the mesh axis "
                    f"{' x '.join(axes)} of {parts} devices: choose a size of that axis that divides {size}"
                )

    jax.tree_util.tree_map_with_path(check, logical_tree, tree, is_leaf=_is_logical_axes)


def _is_logical_axes(node: Any) -> bool:
    # `type is tuple` leaves named tuples, such as optax's states, to be walked as containers.
    named = type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
    return named or isinstance(node, PartitionSpec)
