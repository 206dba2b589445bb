"""Batches made on devices of their own, while others learn: the same run, in less time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.engines import build
from rlstab_jax.training.pretrained import without_initial
from rlstab_jax.training.run import train
from rlstab_jax.training.validate import validate
from rlstab_jax.types import UserError
from tests.training.overlapping_run import config
from tests.training.test_loop import configured
from tests.xla import virtual

ROOT = Path(__file__).parents[2]


def start(devices: int, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.overlapping_run", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | virtual(devices), text=True, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def test_it_is_the_run_whose_device_takes_turns(tmp_path: Path) -> None:
    """One device trains and another makes batches, in a thread: bit for bit the run on one device."""
    process = start(2, tmp_path / "apart")
    assert train(config(6), tmp_path / "alone", say=lambda line: None) is None
    finish(process)
    alone, apart = read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "apart")
    assert alone.keys() == apart.keys()
    for name in alone:
        if not name.startswith(("time/", "throughput/")):
            np.testing.assert_array_equal(apart[name], alone[name], err_msg=name)


def test_what_moves_between_meshes(tmp_path: Path) -> None:
    finish(start(3, tmp_path))


@pytest.mark.parametrize(
    ("check", "rollout", "message"),
    [
        (validate, {"devices": -1}, r"rollout.devices = -1: expected 0 \(none set aside\) or more"),
        (validate, {"devices": 1}, "rollout.devices = 1 with rollout.lag = 0: each step would wait"),
        (validate, {"mesh": MeshConfig(data=2)}, "rollout.mesh = .* with rollout.devices = 0: it splits the devices"),
        (build, {"devices": 1, "lag": 1}, "rollout.devices = 1, but there are 1 devices and at least one must train"),
    ],
)
def test_devices_that_cannot_be_set_aside(check: Callable, rollout: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(configured(rollout=rollout))


def test_finished_parameters_are_looked_at_by_all_devices(tmp_path: Path) -> None:
    """`rlstab eval` and `diagnose` may run where there are none to set aside."""
    apart = configured(rollout={"lag": 1, "devices": 1, "mesh": MeshConfig(tensor=1)})
    assert without_initial(apart, tmp_path) == configured(rollout={"lag": 1})
