"""Processes with several virtual CPU devices, whose number is fixed when JAX starts."""

import os


def virtual(devices: int) -> dict[str, str]:
    """What their environment has besides this one's."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
