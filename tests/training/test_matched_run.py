"""A run in matched mode, compiled as a user's is: equality to the bit is a property of the compiled programs."""

from pathlib import Path

import pytest

from rlstab_jax.models import fp8
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.run import train
from tests.training.test_loop import configured

pytestmark = pytest.mark.optimised


def test_matched_engines_have_no_gap_at_all(tmp_path: Path) -> None:
    """Exactly, at each of six global steps: the program that sampled scores, with R3's routes and with live ones. Both
    engines quantise."""
    matched = {"precision": fp8(), "log_probs": "matched", "response_length": 6, "top_p": 0.9, "support": 8}
    learner = {"replay": "r3", "precision": fp8()}
    train(
        configured(gradient_steps=12, rollout=matched, learner=learner, evaluation={"every": 0}),
        tmp_path / "run",
        say=lambda line: None,
    )
    metrics = read_metrics(tmp_path / "run")
    gaps = {name: values for name, values in metrics.items() if name.startswith(("discrepancy", "routing/rollout"))}
    assert len(gaps) > 8
    assert {len(values) for values in gaps.values()} == {6}
    assert all((values == name.endswith("max_ratio")).all() for name, values in gaps.items()), gaps
    assert (metrics["staleness/k3"] > 0).all()
