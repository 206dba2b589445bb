"""A run on many devices is the run on one, to the tolerance of sums in another order."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import _check_parts, build, build_pair, initial_params, resolved
from rlstab_jax.training.loop import first_train_state
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training import tiny_run
from tests.training.eight_device_run import MESHES, config
from tests.training.test_loop import configured
from tests.xla import virtual

ROOT = Path(__file__).parents[2]
# Programs in flight together starve each other's collectives of threads where there are fewer cores than devices.
FLAGS = virtual(8) | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


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
    gaps = {name: values for name, values in read_metrics(tmp_path / "matched").items() if "discrepancy" in name}
    assert all((values == name.endswith("max_ratio")).all() for name, values in gaps.items()), gaps
    assert len(gaps) >= 8


def test_parts_are_equal_on_all_devices() -> None:
    config = RunConfig(learner=LearnerConfig(micro_batches=4, score_micro_batches=8))
    _check_parts(config, {"mesh": 8}, "mesh")
    with pytest.raises(UserError, match=r"learner\.micro_batches = 4: 128 responses .* over 64 .*\(mesh\)"):
        _check_parts(config, {"mesh": 64, "rollout.mesh": 8}, "rollout.mesh")
    with pytest.raises(UserError, match=r"score_micro_batches = 8: 512 responses .* over 128 .*rollout\.mesh"):
        _check_parts(config, {"mesh": 8, "rollout.mesh": 128}, "rollout.mesh")


def test_slots_divide_over_each_mesh_that_samples() -> None:
    """Evaluations are by the devices that learn; only devices set aside are those of rollout.mesh."""

    def mesh(rows: int) -> Any:
        return SimpleNamespace(shape={"data": rows, "fsdp": 1, "expert": 1, "tensor": 1}, size=rows)

    config = resolved(configured(rollout={"slots": 4}), tiny_run.TASK.build())
    config = dataclasses.replace(config, prompts_per_minibatch=6)
    for meshes, on in (((mesh(3), None), "mesh"), ((mesh(3), mesh(2)), "mesh"), ((mesh(2), mesh(3)), r"rollout\.mesh")):
        with pytest.raises(UserError, match=rf"rollout.slots = 4 does not divide over 3 .* \({on}\.data x"):
            build_pair(config, *meshes, "cpu", (1,), 0)


def test_a_state_begins_where_it_is_kept() -> None:
    """As if it were made whole and placed then, which takes the room of moments in float32."""
    engines = build(configured(learner={"moments_dtype": "bfloat16", "offload_optimizer": True, "replay": "pr2"}))
    params, make = initial_params(engines.training, 0), partial(first_train_state, engines)
    begun, placed = engines.begin(make, params), engines.place(make(params))
    jax.tree.map(np.testing.assert_array_equal, begun, placed)
    assert jax.tree.map(lambda leaf: leaf.sharding, begun) == jax.tree.map(lambda leaf: leaf.sharding, placed)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(begun.opt_state) if leaf.ndim} == {"pinned_host"}
