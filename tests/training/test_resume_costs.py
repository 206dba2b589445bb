"""A run goes on in another way of computing the same: with less memory, in other parts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.training import tiny_run


def config(gradient_steps: int, waves: int = 1, replay: str = "r2", **learner: Any) -> tiny_run.RunConfig:
    default = tiny_run.config()
    return dataclasses.replace(
        default,
        gradient_steps=gradient_steps,
        rollout=dataclasses.replace(default.rollout, waves=waves),
        learner=dataclasses.replace(default.learner, replay=replay, **learner),
        evaluation=dataclasses.replace(default.evaluation, every=0),
    )


def test_a_run_goes_on_in_less_memory(tmp_path: Path) -> None:
    train(config(4), tmp_path / "run")
    train(config(8, waves=2, micro_batches=2, score_micro_batches=2, remat="none"), tmp_path / "run")
    train(config(8), tmp_path / "whole")
    other, whole = (read_metrics(tmp_path / name) for name in ("run", "whole"))
    for name in ("reward/mean", "learner/grad_norm", "discrepancy/k3", "staleness/k3"):
        np.testing.assert_allclose(other[name], whole[name], rtol=1e-3, atol=1e-7, err_msg=name)
    with pytest.raises(UserError, match=r"learner.replay is 'r2' there and 'live' here"):
        train(config(8, replay="live"), tmp_path / "run")
