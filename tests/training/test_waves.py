"""A batch sampled in waves is the batch sampled at once: draws know nothing of the rows beside them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.inference import continuous
from rlstab_jax.models import Precision
from rlstab_jax.training import evaluate
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.passes import inference_weights, sample_responses
from rlstab_jax.types import UserError
from tests.training import tiny_run


def config(**rollout: Any) -> RunConfig:
    config = tiny_run.config()
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, precision=Precision(), temperature=0.9, **rollout)
    )


def test_waves() -> None:
    at_once = build(config())
    waves = build(config(waves=2))
    params = at_once.place(initial_params(at_once.training, 0))
    prompts = [at_once.task.split("train")[number] for number in range(4)]

    def sampled(engines: Engines) -> Any:
        return sample_responses(engines, inference_weights(engines, params, step=3), prompts, step=3)

    one, two = sampled(at_once), sampled(waves)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.response_mask, two.response_mask)
    np.testing.assert_array_equal(one.routes, two.routes)
    np.testing.assert_array_equal(one.truncated, two.truncated)
    np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)
    assert one.routes.shape == two.routes.shape
    assert len(np.unique(np.asarray(one.tokens), axis=0)) > 4


def evaluated(**rollout: Any) -> evaluate.Accuracy:
    """Of 7 prompts x 3 samples, by random parameters."""
    engines = build(config(**rollout))
    params = engines.place(initial_params(engines.training, 0))
    plain, key = evaluate.plain_sampling(engines), jax.random.key(1)
    return evaluate.accuracy(engines, engines.training_sampler, params, key, prompts=7, samples=3, sampling=plain)


def test_evaluations_sample_no_more_at_once_than_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In waves of 8 responses: 2 prompts at a time, the last wave filled up. In 5 slots: 5 rows of a decode step. The
    same draws."""
    sizes: list[int] = []
    sample, decode_round = continuous.sample, continuous.decode_round

    def counted(*arguments: Any, **how: Any) -> Any:
        rollout = sample(*arguments, **how)
        sizes.append(len(rollout.tokens))
        return rollout

    def counted_round(model: Any, variables: Any, state: Any, *more: Any) -> Any:
        sizes.append(len(state.count))
        return decode_round(model, variables, state, *more)

    monkeypatch.setattr(continuous, "sample", counted)
    monkeypatch.setattr(continuous, "decode_round", counted_round)
    at_once, waves = evaluated(), evaluated(waves=2)
    assert sizes == [21, 6, 6, 6, 6]
    slots = evaluated(slots=5)
    assert set(sizes[5:]) == {5}
    assert at_once == waves == slots
    assert at_once.mean > 0


def test_waves_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"rollout\.waves = 3: expected a divisor of the prompts of a global step, 4"):
        build(config(waves=3))
