"""Arrays that lie in the host's memory and not in the device's, where a backend has both."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from rlstab_jax.types import UserError

# The kind of the host's memory that devices read by themselves.
HOST = "pinned_host"


def check_offload(devices: Sequence[Any], field: str) -> None:
    """Raises UserError where a device cannot read the host's memory, which the config's ``field`` asks for."""
    for device in devices:
        kinds = {memory.kind for memory in device.addressable_memories()}
        if HOST not in kinds:
            raise UserError(
                f"{field}: the host's memory ({HOST}) is out of reach of {device.device_kind}, whose memories are "
                f"{', '.join(sorted(kinds))}: switch it off"
            )


def in_host_memory(leaf: Array) -> bool:
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def on_device(leaf: Array) -> Array:
    """``leaf`` where it can be computed with."""
    return jax.device_put(leaf, jax.memory.Space.Device) if in_host_memory(leaf) else leaf


def kept_like(leaf: Array, old: Array) -> Array:
    """``leaf`` in the memory that ``old`` lies in."""
    return jax.device_put(leaf, jax.memory.Space.Host) if in_host_memory(old) else leaf
