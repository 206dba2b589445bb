"""Both engines on 8 virtual devices, in a process of its own: the number of devices is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path


def test_engines_give_equal_numbers_on_every_mesh() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    script = Path(__file__).with_name("engines_on_meshes.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal on") == 4
