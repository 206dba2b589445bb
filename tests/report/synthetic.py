"""Synthetic runs on disk, for the tests of the report."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlstab_jax.rundir import RunDir, open_run

CONFIG: dict[str, Any] = {
    "seed": 0,
    "gradient_steps": 24,
    "minibatches": 2,
    "learner": {"learning_rate": 1e-3, "replay": "live"},
}


def write_run(path: Path, steps: int = 12, layers: int = 2, samples: bool = True, **config: Any) -> RunDir:
    """A run of ``steps`` global steps; fields of the config by name, `learner__replay` for nested ones.

    Its reward is seed + step / 100.
    """
    whole = {**CONFIG, "learner": dict(CONFIG["learner"])}
    for name, value in config.items():
        *groups, field = name.split("__")
        place = whole
        for group in groups:
            place = place[group]
        place[field] = value
    run = open_run(path, {"config": whole, "versions": {"jax": "0.10.2"}, "command": ["rlstab", "train", "c.py"]})
    run.append_metrics(_progress(0) | {"eval/accuracy_training": 0.25, "eval/accuracy_rollout": 0.2})
    for step in range(1, steps + 1):
        run.append_metrics(_progress(step) | metrics_of_step(step, whole["seed"], layers))
        if samples:
            run.append_samples(step, [sample(f"response {step}", 0.0), sample(f"better {step}", 1.0)])
    return run


def _progress(step: int) -> dict[str, float]:
    return {"progress/global_steps": step, "progress/gradient_steps": 2 * step}


def sample(response: str, reward: float, **more: Any) -> Mapping[str, Any]:
    return {"prompt": "1+1=", "answer": "2", "response": response, "reward": reward, **more}


def metrics_of_step(step: int, seed: int, layers: int) -> dict[str, float]:
    rng = np.random.default_rng((seed, step))
    metrics = {
        "reward/mean": seed + step / 100,
        "policy/entropy": 0.5 / step,
        "response/length": 12.0,
        "response/truncated": 0.0,
        "learner/grad_norm": 1.0 if step < 12 else 9.0,
        "discrepancy/k3": 1e-3 * math.exp(rng.normal()),
        "staleness/k3": 1e-4 * math.exp(rng.normal()),
        "staleness/minibatch_00/k3": 0.0,
        "staleness/minibatch_01/k3": 2e-4 * step,
        "trust/masked": 0.01,
        "weight/ess": 0.9,
        "weight/max": 5.0,
    }
    if layers:
        metrics |= {"routing/rollout_vs_old": 0.06, "routing/old_vs_target": 0.02}
    for layer in range(layers):
        metrics |= {f"routing/layer_{layer:02d}/rollout_vs_old": 0.01 * (seed + step + 10 * layer)}
    return metrics
