"""The device mesh: four named axes, always an argument of whoever needs it, never a global."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlstab_jax.types import UserError

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are split. The sizes multiply to the number of devices; one may be -1: all that remain."""

    data: int = -1
    """Devices that hold whole copies of the model and share the batch; -1 = all remaining."""
    fsdp: int = 1
    """Devices that share the batch and also split the parameters and the optimiser's state; -1 = all remaining."""
    expert: int = 1
    """Devices that split the experts of each MoE layer; -1 = all remaining."""
    tensor: int = 1
    """Devices that split heads, hidden units and vocabulary within a layer; -1 = all remaining."""


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """The sizes of the four axes on ``devices`` devices, with -1 worked out.

    Raises:
      UserError: a size is neither positive nor -1, more than one is -1, or they do not multiply to ``devices``.
    """
    sizes = dataclasses.astuple(config)
    text = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh ({text}): each size must be positive, or -1 for all remaining devices")
    if sizes.count(-1) > 1:
        raise UserError(f"mesh ({text}): only one axis can be -1 (all remaining devices)")
    fixed = math.prod(size for size in sizes if size != -1)
    if fixed > devices:
        raise UserError(f"mesh ({text}) needs {fixed} devices, but there are {devices}: lower a size")
    if devices % fixed or (-1 not in sizes and fixed != devices):
        hint = "choose sizes that divide it" if devices % fixed else "set one axis to -1 so that none is idle"
        raise UserError(f"mesh ({text}) makes groups of {fixed} of {devices} devices: {hint}")
    data, fsdp, expert, tensor = (devices // fixed if size == -1 else size for size in sizes)
    return data, fsdp, expert, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``("data", "fsdp", "expert", "tensor")`` over ``devices``, or over all devices of all hosts.

    The axes are automatic: the compiler places what no constraint names. ``tensor`` varies fastest, so the devices that
    talk most are neighbours. Raises ``UserError`` where the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    try:  # `jax.make_mesh` refuses sizes that are no products of whole sides of a TPU's torus
        ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # a part of the chips that is no cuboid, where some are set aside
        ordered = np.array(devices).reshape(shape)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))
