"""How XLA compiles in tests, and processes with several virtual CPU devices, whose number is fixed when JAX starts."""

import os
import subprocess
import sys
from typing import Any

_EMITTERS = "xla_cpu_use_fusion_emitters"
_OLDER = f"--{_EMITTERS}=false"


def emit_quickly() -> None:
    """Has XLA turn fused operations into code as it used to, where it still can: that takes half as long."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _EMITTERS in flags:
        return
    environment = {"XLA_FLAGS": f"{flags} {_OLDER}".strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]  # ended by a flag that XLA does not know
    if subprocess.run(command, env=os.environ | environment, capture_output=True, check=False).returncode == 0:
        os.environ["XLA_FLAGS"] = environment["XLA_FLAGS"]


def exact() -> dict[str, Any]:
    """Options of `jax.jit` for code that is right to the last bit: as it used to be made, two of 3,072 numbers that are
    rounded to 4 bits go the other way."""
    return {"compiler_options": {_EMITTERS: True}} if _OLDER in os.environ.get("XLA_FLAGS", "") else {}


def virtual(devices: int) -> dict[str, str]:
    """What the environment of a process with several devices has besides this one's."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
