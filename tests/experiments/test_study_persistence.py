"""The gap's autocorrelation over checkpoints: by hand on made-up gaps, and of a run with equal and unequal engines."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import persistence
from rlstab_jax.models import Precision
from rlstab_jax.training.engines import build, initial_params
from rlstab_jax.training.passes import inference_weights, sample_responses
from rlstab_jax.types import UserError
from tests.training import tiny_run


def test_autocorrelation() -> None:
    """A gap that stays, one that turns around at each checkpoint, and noise; what lies outside the mask is not read."""
    mask = np.ones((10, 300), bool)
    mask[3:] = False
    pattern = np.random.default_rng(0).normal(size=(10, 300))
    pattern[~mask] = np.nan
    stays = np.stack([pattern, 2 * pattern, pattern + 1])
    np.testing.assert_allclose(persistence.autocorrelation(stays, mask), 1.0)
    turns = np.stack([pattern, -pattern, pattern])
    np.testing.assert_allclose(persistence.autocorrelation(turns, mask), [1, -1, 1])
    noise = np.random.default_rng(1).normal(size=(6, 10, 300))
    assert np.abs(persistence.autocorrelation(noise, mask)[1:]).max() < 0.1
    # A checkpoint without any gap is left out: lag 1 has none left, lag 2 the first and the last.
    np.testing.assert_allclose(
        persistence.autocorrelation(np.stack([pattern, 0 * pattern, pattern]), mask), [1, np.nan, 1]
    )


def test_a_run_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "EVERY", 1)
    config = dataclasses.replace(
        tiny_run.config(),
        gradient_steps=3,
        minibatches=1,
        evaluation=dataclasses.replace(tiny_run.config().evaluation, every=3),
        learner=dataclasses.replace(tiny_run.config().learner, replay="live"),
    )
    row = persistence.measure(config, tmp_path / "run", prompts=2)
    assert row["steps"] == [1, 2, 3]
    assert row["autocorrelation"][0] == 1.0
    assert -1 <= min(row["autocorrelation"]) < 1
    assert row["size"] > 1e-4
    rows = [{"cell": cell, "pair": i, "cold_start": i, **row} for cell in ("minirl", "no_is") for i in range(2)]
    assert [(line["cell"], line["lag"], line["pairs"]) for line in persistence.table(rows)] == [
        ("minirl", 1, 2), ("minirl", 2, 2), ("no_is", 1, 2), ("no_is", 2, 2)
    ]  # fmt: skip
    persistence.picture(rows, tmp_path / "persistence.png")
    assert (tmp_path / "persistence.png").stat().st_size > 10_000


@pytest.mark.parametrize("gap", [{"uniform": 0.3}, {"weight_noise": 0.1}])
def test_log_mu_is_that_of_the_gap(gap: dict[str, float]) -> None:
    """With engines of one precision it is the sampler's own log-prob, which the mixture or the noise is in."""
    config = dataclasses.replace(
        tiny_run.config(), rollout=dataclasses.replace(tiny_run.config().rollout, precision=Precision(), **gap)
    )
    engines = build(config)
    weights = inference_weights(engines, initial_params(engines.training, 0), step=1)
    probe = sample_responses(engines, weights, [engines.task.split("heldout")[i] for i in range(4)], 0)
    mask = np.asarray(probe.response_mask)
    found = persistence.log_mu(engines, weights, probe)
    np.testing.assert_allclose(found[mask], np.asarray(probe.log_probs)[mask], atol=2e-5)
    warm = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=0.5))
    with pytest.raises(UserError, match="temperature 1"):
        persistence.log_mu(dataclasses.replace(engines, config=warm), weights, probe)
