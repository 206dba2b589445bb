"""A run on many devices is the run on one, to the tolerance of sums in another order."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.run import train
from tests.training.eight_device_run import MESHES, config

ROOT = Path(__file__).parents[2]
FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
# Programs in flight together starve each other's collectives of threads where there are fewer cores than devices.
FLAGS |= {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


def test_a_run_on_eight_devices(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.eight_device_run", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | FLAGS, text=True, stderr=subprocess.PIPE)
    train(config(6, MeshConfig()), tmp_path / "one", say=lambda line: None)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    one = read_metrics(tmp_path / "one")
    for name in MESHES:
        many = read_metrics(tmp_path / name)
        assert set(one) == set(many) | {metric for metric in one if metric.startswith("eval/")}
        steps = len(many["progress/global_steps"])  # where nothing is evaluated, there is no line before training
        for metric in many:
            if not metric.startswith(("time/", "throughput/")):
                np.testing.assert_allclose(
                    many[metric], one[metric][-steps:], rtol=1e-3, atol=1e-5, err_msg=f"{name} {metric}"
                )
