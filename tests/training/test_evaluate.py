"""What an evaluation measures: whose responses, to which prompts, drawn how."""

from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.tasks import Rewards, encode_prompts
from rlstab_jax.training import evaluate
from rlstab_jax.training.engines import build
from rlstab_jax.types import Rollout
from tests.training.test_loop import configured


def test_accuracy_is_the_mean_reward_over_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of 0, 1/16, ... 15/16, for responses of 1, 2, 3, 1, ... tokens."""
    engines = build(configured())
    asked = [engines.task.split("heldout")[i] for i in range(8)]
    assert not {prompt.id for prompt in asked} & {engines.task.split("train")[i].id for i in range(8)}
    length = 1 + np.arange(16) % 3
    drawn_by, judged = [], []

    def sampler(model: Any, _: Any, tokens: jax.Array, mask: jax.Array, keys: jax.Array, *__: Any, **how: Any) -> Any:
        drawn_by.append(model)
        wanted = encode_prompts(asked, engines.task.tokenizer, engines.config.rollout.prompt_length)
        np.testing.assert_array_equal(tokens, wanted[0])
        np.testing.assert_array_equal(mask, wanted[1])
        assert (len(np.unique(jax.random.key_data(keys), axis=0)), how["samples_per_prompt"]) == (16, 2)
        space = np.zeros((16, how["response_length"]), np.float32)
        return Rollout(
            tokens=np.repeat(np.concatenate([tokens, space[:8].astype(np.int32)], 1), 2, axis=0),
            prompt_mask=np.repeat(mask, 2, axis=0),
            response_mask=np.arange(space.shape[1]) < length[:, None],
            log_probs=space,
            truncated=space[:, 0] > 0,
            routes=None,
            temperature=space[:, 0],
        )

    def judge(_: Any, prompts: list, rollout: Rollout, *__: Any) -> tuple[list[str], Rewards]:
        judged.extend(prompts)
        return [], Rewards(np.arange(16) / 16)

    monkeypatch.setattr(evaluate, "prepare", lambda params, *_: params)
    monkeypatch.setattr(evaluate, "sampler_for", lambda *_: sampler)
    monkeypatch.setattr(evaluate, "judge", judge)
    sampling = evaluate.plain_sampling(engines)
    found = evaluate.accuracy(
        engines, engines.inference, {}, jax.random.key(1), prompts=8, samples=2, sampling=sampling
    )
    assert judged == asked
    assert drawn_by == [engines.inference]
    assert found.mean == pytest.approx(15 / 32)
    assert found.response_length == pytest.approx(length.mean())


def test_each_engine_has_its_accuracy_and_draws_as_evaluations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = build(configured(rollout={"temperature": 0.9}, evaluation={"temperature": 0.3, "top_k": 3}))
    how: list[dict] = []

    def accuracy(_: Any, model: Any, *__: Any, **options: Any) -> evaluate.Accuracy:
        how.append(options)
        of_rollout = model == engines.inference
        return evaluate.Accuracy(float(of_rollout), 3.0 if of_rollout else 4.0)

    monkeypatch.setattr(evaluate, "accuracy", accuracy)
    assert evaluate.evaluate(engines, {}, jax.random.key(0)) == {
        "eval/accuracy_rollout": 1.0,
        "eval/accuracy_training": 0.0,
        "eval/response_length": 3.0,
    }
    for options in how:
        assert (options["prompts"], options["samples"], options["support"]) == (8, 2, 1024)
        assert (options["sampling"].temperature, options["sampling"].top_k) == (np.float32(0.3), 3)
    assert engines.inference != engines.training_sampler
