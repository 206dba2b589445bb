"""Configs that no run begins with: what is said of them names the field and what it may be."""

from typing import Any

import pytest

from rlstab_jax.training.engines import build
from rlstab_jax.types import UserError
from tests.training.test_loop import configured


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"top_p": 0.9}, "rollout.support = 0: expected at least 1: top_k, top_p and min_p keep some tokens"),
        ({"top_k": 9, "support": 8}, "rollout.support = 8: expected at least 9"),
        ({"top_p": 0.0}, r"rollout.top_p = 0.0: expected above 0, at most 1"),
        ({"min_p": 2.0}, "rollout.min_p = 2.0"),
        ({"log_probs": "matched"}, "rollout.log_probs = 'matched' with rollout.precision = .* give both engines one"),
        ({"slots": -1}, "rollout.slots = -1"),
        ({"temperature": 1e-7}, "rollout.temperature = 1e-07: expected at least 1e-06"),
        ({"uniform": 1.0}, r"rollout.uniform = 1.0: expected from 0 \(no mixture\) to below 1"),
        ({"uniform": 0.1, "log_probs": "rescore"}, "rollout.uniform = 0.1 with rollout.log_probs = 'rescore'"),
        ({"weight_noise": -0.1}, r"rollout.weight_noise = -0.1: expected 0 \(none\) or more, and finite"),
        (
            {"weight_noise": 0.1, "log_probs": "matched"},
            "rollout.weight_noise = 0.1 with rollout.log_probs = 'matched'",
        ),
    ],
)
def test_sampling_that_no_ratio_can_be_taken_of_is_refused(rollout: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(configured(rollout=rollout))


def test_an_evaluation_is_greedy_or_not_too_cold() -> None:
    for temperature in (1e-7, -1.0, float("nan")):
        with pytest.raises(UserError, match=rf"evaluation.temperature = {temperature}: expected 0 \(greedy\), or"):
            build(configured(evaluation={"temperature": temperature}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remat": True}, "learner.remat = True: expected one of none, full, dots, offload"),
        ({"moments_dtype": "float16"}, "learner.moments_dtype = 'float16': expected one of float32, bfloat16"),
        ({"replay_of": "old"}, "learner.replay_of = 'old': expected one of recorded, permuted, initial"),
        ({"replay_of": "initial", "replay": "r2"}, "learner.replay_of = 'initial' with learner.replay = 'r2'"),
        ({"replay": "r4"}, "learner.replay = 'r4': expected one of live, r2, r3"),
        ({"adam_b1": 1.0}, "learner.adam_b1 = 1.0: expected from 0 to 1 - 1e-6"),
        ({"adam_b2": 1 - 1e-8}, "learner.adam_b2 = 0.99999999: expected from 0 to 1 - 1e-6"),
        ({"adam_eps": float("nan")}, "learner.adam_eps = nan: expected at least 1e-18"),
        ({"adam_eps": 0.0}, "learner.adam_eps = 0.0: expected at least 1e-18"),
        ({"weight_decay": -1.0}, "learner.weight_decay = -1.0: expected 0"),
        ({"learning_rate": float("inf")}, "learner.learning_rate = inf: expected above 0"),
        ({"logits_per_chunk": 0}, "learner.logits_per_chunk = 0: expected at least 1"),
        ({"freeze": ["router"]}, r"learner.freeze = \['router'\]: expected a tuple"),
        ({"freeze": ("rooter",)}, "learner.freeze: no parameter is named 'rooter'; there are .*router"),
    ],
)
def test_what_the_learner_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(configured(learner=change))
