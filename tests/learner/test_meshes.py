"""Both engines on 8 virtual devices, in a process of its own: the number of devices is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

from tests.xla import virtual


def test_engines_give_equal_numbers_on_every_mesh() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | virtual(8) | {"PYTHONPATH": str(root)}
    script = Path(__file__).with_name("engines_on_meshes.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal on") == 4
