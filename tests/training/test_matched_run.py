"""A run in matched mode, compiled as a user's is: equality to the bit is a property of the compiled programs."""

import pytest

from rlstab_jax.models import fp8
from tests.training.test_loop import metrics_of

pytestmark = pytest.mark.optimised


def test_matched_engines_have_no_gap_at_all() -> None:
    """Exactly: the program that sampled scores, with R3's routes and with live ones. Both engines quantise."""
    matched = {"precision": fp8(), "log_probs": "matched", "response_length": 6, "top_p": 0.9, "support": 8}
    metrics = metrics_of(rollout=matched, learner={"replay": "r3", "precision": fp8()})
    gaps = {name: value for name, value in metrics.items() if name.startswith(("discrepancy", "routing/rollout"))}
    assert len(gaps) > 8
    ratios = {name for name in gaps if name.endswith("max_ratio")}
    assert all(value == (1 if name in ratios else 0) for name, value in gaps.items()), gaps
    assert metrics["staleness/k3"] > 0
