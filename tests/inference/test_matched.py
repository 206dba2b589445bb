"""Matched mode: what sampled is what scores, bit for bit, whatever rows are beside it."""

import dataclasses
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare, sample, sample_matched, score_matched
from rlstab_jax.inference.matched import MatchedPass
from rlstab_jax.learner import score
from rlstab_jax.models import Precision
from rlstab_jax.training.passes import matched_scores
from rlstab_jax.types import Rollout, take_rows

pytestmark = pytest.mark.optimised

CONFIG = dataclasses.replace(tiny.MIXED, num_layers=2, dense_layers=(1,))
ROWS = np.arange(8)
SAMPLING = tiny.sampling(temperature=np.float32(0.7 + ROWS / 10), top_p=np.float32(1 - ROWS / 20))
OPTIONS = {"response_length": tiny.RESPONSE, "samples_per_prompt": 2, "support": 12}


def arguments(precision: Precision = tiny.FLOAT32) -> tuple:
    variables = prepare(tiny.parameters(CONFIG), precision)
    return tiny.model(CONFIG, precision), variables, *tiny.prompts(), tiny.keys(), SAMPLING


@cache
def matched() -> Rollout:
    return sample_matched(*arguments(), **OPTIONS)


def scored(rollout: Rollout, sampling: Any = SAMPLING, routes: jax.Array | None = None) -> MatchedPass:
    return score_matched(tiny.model(CONFIG), arguments()[1], rollout, sampling, routes)


def assert_equal(first: Rollout, second: Rollout) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_scores_are_the_samplers_bit_for_bit() -> None:
    rollout = matched()
    lengths = np.asarray(rollout.response_mask).sum(1)
    assert lengths.min() < tiny.RESPONSE == lengths.max()
    assert_equal(scored(rollout).rollout, rollout)
    assert_equal(scored(rollout, routes=rollout.routes).rollout, rollout)


def test_a_bfloat16_engine_with_a_float32_head_too() -> None:
    model, variables, *drawn = arguments(Precision("bfloat16", float32_lm_head=True))
    rollout = sample_matched(model, variables, *drawn, **OPTIONS)
    assert_equal(score_matched(model, variables, rollout, SAMPLING).rollout, rollout)


def test_rows_beside_it_and_their_number_change_no_bit() -> None:
    rollout = matched()
    rows = np.array([6, 1, 3])
    sampling = dataclasses.replace(SAMPLING, temperature=SAMPLING.temperature[rows], top_p=SAMPLING.top_p[rows])
    assert_equal(scored(take_rows(rollout, rows), sampling).rollout, take_rows(rollout, rows))


def test_it_draws_and_scores_what_the_other_engines_do() -> None:
    """To 1e-5, as between any two programs."""
    rollout, plain = matched(), sample(*arguments(), **OPTIONS)
    old, statistics = score(tiny.model(CONFIG), {"params": tiny.parameters(CONFIG)}, plain)
    mine = scored(rollout)
    for name in ("tokens", "response_mask", "truncated", "routes", "support", "prompt_mask", "temperature"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(rollout.log_probs, plain.log_probs, atol=1e-5)
    np.testing.assert_allclose(mine.entropy, old.entropy, atol=1e-5)
    np.testing.assert_array_equal(mine.live, old.live)
    fed = np.asarray(rollout.fed_mask)
    assert (np.asarray(mine.margin)[:, fed] > 0).all()
    scores, gathered = matched_scores(mine, CONFIG.num_experts)
    np.testing.assert_array_equal(scores.routes, old.routes)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(scores.router)[mask], np.asarray(old.router)[mask], atol=1e-5)
    assert gathered.keys() == statistics.keys()
    for name, statistic in statistics.items():
        np.testing.assert_allclose(gathered[name].value(), statistic.value(), atol=1e-5, err_msg=name)


def test_replayed_routes_are_used_and_the_live_ones_reported() -> None:
    rollout = matched()
    others = (rollout.routes + 1) % CONFIG.num_experts
    others = np.where(np.asarray(rollout.fed_mask)[None, :, :, None], others, CONFIG.num_experts).astype(np.uint8)
    altered = scored(rollout, routes=others)
    np.testing.assert_array_equal(altered.rollout.routes, others)
    assert (np.asarray(altered.live) != others).any()
    assert np.abs(altered.rollout.log_probs - rollout.log_probs).max() > 1e-3


def test_another_policy_is_scored_over_the_recorded_support() -> None:
    """Its own likeliest tokens are others: log-probs over those would be of draws that nobody made."""
    rollout = matched()
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(5), x.shape), tiny.parameters(CONFIG))
    mine = score_matched(tiny.model(CONFIG), prepare(params, tiny.FLOAT32), rollout, SAMPLING).rollout
    expected, _ = score(tiny.model(CONFIG), {"params": params}, rollout)
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(mine.log_probs, expected.log_probs, atol=1e-4)
    np.testing.assert_array_equal(mine.support, rollout.support)
    assert np.abs(np.asarray(mine.log_probs) - np.asarray(rollout.log_probs))[mask].max() > 0.1


def test_greedy_log_probs_are_of_a_point_mass() -> None:
    greedy = tiny.sampling(temperature=np.float32([0, 1] * 4))
    rollout = sample_matched(*arguments()[:5], greedy, **{**OPTIONS, "support": 0})
    assert not np.asarray(rollout.log_probs)[::2].any()
    assert np.asarray(rollout.log_probs)[1::2].any()
