"""Objectives of the studies that are no published recipe, by hand."""

import numpy as np
import pytest

from experiments import recipes
from rlstab_jax.types import Scores


def test_masks_where_the_engines_differ() -> None:
    """By hand: KL between (.5, .5) and (.8, .2) is .223 nats one way, .193 the other; means of ratios by sequence."""
    old, rollout = np.log([[0.5, 0.5, 0.8], [0.5, 0.6, 0.5]]), np.log([[0.8, 0.5, 0.5], [0.5, 0.5, 0.6]])
    array = np.float32(old)
    scores = Scores(array, array, np.float32(rollout), np.ones((2, 3), bool), None)
    advantage = np.ones((2, 3), np.float32)
    for at, gate in ((0.05, [[0, 1, 0], [1, 1, 1]]), (0.2, [[0, 1, 0], [1, 1, 1]]), (0.23, np.ones((2, 3)))):
        np.testing.assert_array_equal(recipes.minirl_kpop(at).trust(scores, advantage), gate)
    # The ratios of both sequences cancel; the first token of the first one alone would be .625.
    np.testing.assert_array_equal(recipes.minirl_geometric().trust(scores, advantage), np.ones((2, 3)))
    apart = scores.replace(mask=np.array([[True, False, False], [True, True, True]]))
    np.testing.assert_array_equal(recipes.minirl_geometric().trust(apart, advantage), [[0] * 3, [1] * 3])


def test_weights_are_made_uneven_at_random() -> None:
    """As under another token's routes: half an effective sample, 1.6% of tokens masked beside the clip; of one batch
    always the same, of another one others."""
    log_prob = np.random.default_rng(0).uniform(-3, -0.1, (400, 100)).astype(np.float32)
    scores = Scores(log_prob, log_prob, log_prob, np.ones(log_prob.shape, bool), None)
    objective, plain = recipes.minirl_uneven(), recipes.minirl_uneven(spread=0.0, masked=0.0)
    weight = np.asarray(objective.truncate(scores, objective.weight(scores)))
    assert weight.mean() == pytest.approx(0.968, abs=0.01)  # the cap takes the rest
    assert weight.mean() ** 2 / (weight**2).mean() == pytest.approx(0.496, abs=0.015)
    masked = 1 - np.asarray(objective.trust(scores, np.ones_like(log_prob)))
    assert masked.mean() == pytest.approx(0.0156, abs=0.002)
    np.testing.assert_array_equal(plain.weight(scores), 1.0)
    np.testing.assert_array_equal(plain.trust(scores, np.ones_like(log_prob)), 1.0)
    np.testing.assert_array_equal(objective.weight(scores), objective.weight(scores))
    other = scores.replace(old=scores.old[::-1] - 1e-3)
    assert np.abs(np.asarray(objective.weight(other)) - objective.weight(scores)).max() > 1
