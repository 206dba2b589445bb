"""Experts and fused attention on 8 virtual devices, in a process of its own, and chunks of tokens on one device."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.models import Precision
from rlstab_jax.models.expert_parallel import compute
from rlstab_jax.models.experts import ExpertWeights, tiles
from rlstab_jax.models.precision import Stored
from rlstab_jax.parallel.sharding import Layout
from tests.xla import virtual

ROOT = Path(__file__).parents[2]


def test_on_eight_devices() -> None:
    command = [sys.executable, "-m", "tests.models.kernels_on_meshes"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | virtual(8), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 6


def test_chunks_on_one_device() -> None:
    """19 tokens in chunks of 8 give the gradients of all at once."""
    draw = np.random.default_rng(0)
    shapes = {"x": (19, 8), "gates": (19, 2), "gate": (4, 8, 6), "up": (4, 8, 6), "down": (4, 6, 8)}
    values = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    experts = np.stack([draw.permutation(5)[:2] for _ in range(19)]).astype(np.int32)  # 4: not dispatched

    @partial(jax.jit, static_argnames="chunk")
    def gradients(values: dict, chunk: int) -> Any:
        def loss(values: dict) -> Any:
            weights = ExpertWeights(*(Stored(values[name]) for name in ("gate", "up", "down")))
            x, gates = values["x"], values["gates"]
            return jnp.sum(compute(tiles, x, experts, gates, weights, Precision(), Layout(), chunk) ** 2)

        return jax.grad(loss)(values)

    whole, chunked = gradients(values, 0), gradients(values, 8)
    for name, gradient in whole.items():
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(chunked[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
