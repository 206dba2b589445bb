"""Dynamic sampling and over-long responses, on rollouts made by hand, and in a run."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlstab_jax.inference import sample_keys
from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.learner import score
from rlstab_jax.objectives import Objective, piece, recipes
from rlstab_jax.rundir import read_metrics
from rlstab_jax.tasks import Arithmetic, ArithmeticConfig, DatasetConfig, Failure, Prompt, Reward, Rewards, Split
from rlstab_jax.training import loop
from rlstab_jax.training.collect import (
    Responses,
    collect,
    judge,
    key_ids,
    length_punishment,
    plain_answer,
    try_task,
    without_truncated,
)
from rlstab_jax.training.engines import build
from rlstab_jax.training.run import alarms, train
from rlstab_jax.types import Rollout, UserError
from tests.training import tiny_run
from tests.training.test_loop import configured, fresh_state

LENGTH = 3
DENSE = {"model": {"num_experts": 0}, "learner": {"replay": "live"}}  # compiles faster


@dataclasses.dataclass(frozen=True)
class RoundedConfig(tiny_run.LenientConfig):
    """The lenient task with few different rewards."""

    def build(self) -> "Rounded":
        return Rounded(self)


class Rounded(tiny_run.Lenient):
    """Some of a random model's groups earn equal rewards: one response in three is right."""

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        return float(sum(map(ord, response)) % 3 == 0)


def rollout(marks: list[int]) -> Rollout:
    """Rows that can be told apart in every array: prompts of one token, responses of up to three."""
    column = np.array(marks)[:, None]
    lengths = column % 3 + 1
    return Rollout(
        tokens=jnp.asarray(column + np.zeros((1, 4), int)),
        prompt_mask=jnp.ones((len(marks), 1), bool),
        response_mask=jnp.asarray(np.arange(LENGTH) < lengths),
        log_probs=jnp.asarray(-column / 100 * np.ones(LENGTH)),
        truncated=jnp.asarray(lengths[:, 0] == 3),
        routes=jnp.asarray(np.broadcast_to(column[None, :, :, None], (2, len(marks), 3, 1)).astype(np.uint8)),
        temperature=jnp.asarray(column[:, 0] / 10),
    )


class Sampler:
    """Answers of given rewards, one list of groups an attempt; row ``i`` of attempt ``a`` is marked 10 a + i."""

    def __init__(self, *rewards: list[tuple[float, float]]):
        self.rewards, self.calls = rewards, []

    def __call__(self, prompts: list[Prompt], attempt: int) -> Responses:
        self.calls.append((attempt, [prompt.id for prompt in prompts]))
        total = np.array(self.rewards[attempt], np.float32).ravel()
        marks = [10 * attempt + i for i in range(len(total))]
        failures = (Failure("a", 1, "broken"),) if attempt else ()
        rewards = Rewards(total, {"a": total * 2}, failures, gave_up=attempt)
        return Responses(prompts, rollout(marks), [f"row {i}" for i in marks], rewards, {"time/sample": 1.0})


def prompts(first: int, count: int = 3) -> list[Prompt]:
    return [Prompt(i, f"p{i}", f"a{i}") for i in range(first, first + count)]


def rows_of(batch: Any) -> list[int]:
    """The marks of the batch, which are the same in all of its arrays."""
    marks = np.asarray(batch.rollout.tokens)[:, 0].tolist()
    assert batch.texts == [f"row {i}" for i in marks]
    expected = rollout(marks)
    jax.tree.map(np.testing.assert_array_equal, batch.rollout, expected)
    return marks


DULL, BRIGHT = (1.0, 1.0), (0.0, 1.0)


def test_a_group_has_signal_by_what_is_trained_on() -> None:
    """Marks 2 and 5 are cut off. In the second group only they differ from the mean, in the third one none does."""
    rewards = Rewards(np.array([0, 1, 1, 0, 0.5, 1, 0.5, 0.5, 0.5]))
    of = Responses(prompts(0), rollout([0, 1, 2, 2, 0, 5, 0, 1, 2]), [""] * 9, rewards, {})
    assert of.signal.tolist() == [True, True, False]
    assert dataclasses.replace(of, drops=True).signal.tolist() == [True, False, False]


def nothing(scores: Any) -> jax.Array:
    return jnp.zeros_like(scores.mask)


def none_of_them() -> Objective:
    return dataclasses.replace(recipes.minirl(), select=piece(nothing))


def test_a_step_that_trains_on_nothing_is_said() -> None:
    engines = build(configured(objective={"recipe": none_of_them}, **DENSE))
    source = engines.task.split("train")
    _, metrics, _ = loop.global_step(engines, fresh_state(engines), iter([[source[i] for i in range(4)]]), 1)
    assert metrics["learner/rejected"] == 1
    assert metrics["learner/loss"] == metrics["learner/grad_norm"] == 0
    (line,) = alarms(metrics)
    assert line.startswith("no token was trained on: the objective rejected all")


def test_groups_without_signal_are_replaced_in_order() -> None:
    sampler = Sampler([DULL, BRIGHT, (0.0, 0.0)], [DULL, BRIGHT, DULL], [(0.5, 0.25), BRIGHT, DULL])
    further = iter([prompts(10), prompts(20), prompts(30)])
    batch = collect(sampler, prompts(0), further, attempts=5)
    assert sampler.calls == [(0, [0, 1, 2]), (1, [10, 11, 12]), (2, [20, 21, 22])]
    assert rows_of(batch) == [12, 13, 2, 3, 20, 21]
    assert [prompt.id for prompt in batch.prompts] == [11, 1, 20]
    np.testing.assert_array_equal(batch.rewards, [0, 1, 0, 1, 0.5, 0.25])
    assert next(further)[0].id == 30  # no more was drawn than was needed


def test_what_is_measured_is_all_that_was_sampled() -> None:
    """Not what was selected: that would report a reward that no policy has."""
    sampler = Sampler([DULL, BRIGHT], [BRIGHT, BRIGHT])
    batch = collect(sampler, prompts(0, 2), [prompts(10, 2)], attempts=2)
    lengths = [1, 2, 3, 1, 2, 3, 1, 2]  # of rows 0 1 2 3, 10 11 12 13
    assert batch.metrics == {
        "reward/mean": 5 / 8,
        "reward/without_signal": 1 / 4,
        "reward/component/a": 10 / 8,
        "reward/verifier_failures": 1,
        "reward/verifier_gave_up": 1,
        "response/count": 8,
        "response/length": np.mean(lengths),
        "response/truncated": 2 / 8,
        "dynamic/attempts": 2,
        "dynamic/unfilled": 0,
        "dynamic/unused": 1,
        "time/sample": 2,
    }
    assert batch.failed == [
        {"prompt": "p10", "answer": "a10", "response": "row 11", "reward": 1.0, "failure": "a: broken"}
    ]


@pytest.mark.parametrize(("attempts", "batches"), [(2, 5), (5, 1)])
def test_places_stay_open_when_attempts_or_prompts_end(attempts: int, batches: int) -> None:
    sampler = Sampler([DULL, BRIGHT, DULL], [BRIGHT, DULL, DULL])
    batch = collect(sampler, prompts(0), [prompts(10 * i) for i in range(1, 1 + batches)], attempts)
    assert rows_of(batch) == [10, 11, 2, 3, 4, 5]
    assert [prompt.id for prompt in batch.prompts] == [10, 1, 2]
    assert batch.metrics["dynamic/unfilled"] == pytest.approx(1 / 3)


def test_off_and_not_needed() -> None:
    sampler = Sampler([DULL, BRIGHT])
    off = collect(sampler, prompts(0, 2), [prompts(10, 2)], attempts=1)
    assert rows_of(off) == [0, 1, 2, 3]
    assert not any(name.startswith("dynamic/") for name in off.metrics)
    sampler = Sampler([BRIGHT, BRIGHT])
    whole = collect(sampler, prompts(0, 2), [prompts(10, 2)], attempts=4)
    assert rows_of(whole) == [0, 1, 2, 3]
    assert whole.metrics["dynamic/attempts"] == 1


def test_a_prompt_that_occurs_twice_is_answered_anew() -> None:
    twice = [*prompts(5, 2), *prompts(5, 1), *prompts(7, 1)]
    numbers = key_ids(twice)
    assert [numbers[i] for i in (0, 1, 3)] == [5, 6, 7]
    keys = jax.random.key_data(sample_keys(jax.random.key(0), 1, numbers, 2))
    assert len({tuple(key) for key in keys.tolist()}) == 8
    assert key_ids([dataclasses.replace(prompt, id=np.int32(prompt.id)) for prompt in twice]) == numbers
    again = jax.random.key_data(sample_keys(jax.random.key(0), 1, numbers, 2, attempt=1))
    assert not {tuple(key) for key in keys.tolist()} & {tuple(key) for key in again.tolist()}


def test_soft_punishment() -> None:
    """0 up to 16 tokens of 20, then -1/4 a token. Worked out from Eq. 13 with L_max = 20, L_cache = 4."""
    lengths = np.array([1, 16, 17, 18, 19, 20])
    mask = np.arange(20) < lengths[:, None]
    of = dataclasses.replace(rollout([0] * 6), response_mask=jnp.asarray(mask))
    np.testing.assert_allclose(length_punishment(of, 4), [0, 0, -0.25, -0.5, -0.75, -1])


def test_dropped_responses_have_no_token() -> None:
    kept = without_truncated(rollout([0, 1, 2]))  # of 1, 2 and 3 tokens, the last one cut off
    np.testing.assert_array_equal(kept.response_mask, [[1, 0, 0], [1, 1, 0], [0, 0, 0]])


def columns_without_times(out: Path) -> dict[str, np.ndarray]:
    return {name: c for name, c in read_metrics(out).items() if not name.startswith(("time/", "throughput/"))}


def test_a_run_with_dynamic_sampling_is_resumed_exactly(tmp_path: Path) -> None:
    """Prompts that were drawn and not used stay drawn; one program samples every attempt."""
    rounded = RoundedConfig(**vars(tiny_run.TASK))
    config = configured(
        task=rounded,
        rollout={"attempts": 3, "response_length": 10},
        evaluation={"every": 0},
        gradient_steps=12,
        **DENSE,
    )
    for function in (sample_batch, score):
        function.clear_cache()
    assert train(config, tmp_path / "whole", say=lambda line: None) is None
    assert (sample_batch._cache_size(), score._cache_size()) == (1, 1)
    for gradient_steps in (4, 12):
        part = dataclasses.replace(config, gradient_steps=gradient_steps)
        assert train(part, tmp_path / "parts", say=lambda line: None) is None
    whole, parts = columns_without_times(tmp_path / "whole"), columns_without_times(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "parts" / "samples.jsonl").read_bytes()
    attempts = whole["dynamic/attempts"]
    assert {1, 2} <= set(attempts)
    np.testing.assert_array_equal(whole["response/count"], 16 * attempts)
    np.testing.assert_array_equal(whole["progress/responses"], 16 * attempts.cumsum())


@pytest.mark.parametrize("overlong", ["keep", "drop", "penalise"])
def test_over_long_responses_in_the_updates(overlong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped ones have no token there, and count in the baseline; the punishment is part of the reward."""
    given, update = [], loop.update
    monkeypatch.setattr(loop, "update", lambda *a, **b: given.append(a[2]) or update(*a, **b))
    rewards = []
    monkeypatch.setattr(loop, "judge", lambda *a: rewards.append(judge(*a)[1].total) or judge(*a))
    margin = 2 if overlong == "penalise" else 0
    changes = {"overlong": overlong, "overlong_margin": margin, "response_length": 10}
    engines = build(configured(rollout=changes, **DENSE))
    source = engines.task.split("train")
    _, metrics, _ = loop.global_step(engines, fresh_state(engines), iter([[source[i] for i in range(4)]]), 1)
    truncated = np.concatenate([part.rollout.truncated for part in given])
    mask = np.concatenate([part.rollout.response_mask for part in given])
    assert 0 < truncated.mean() == metrics["response/truncated"] < 1
    assert (mask.sum(1) == 0).tolist() == (truncated & (overlong == "drop")).tolist()
    groups = np.concatenate([part.groups for part in given])
    trained = rewards[0].reshape(4, 4)[groups[::4]]  # in the order of the mini-batches
    if overlong == "penalise":
        trained = trained + np.clip((mask.shape[1] - 2 - mask.sum(1)) / 2, -1, 0).reshape(4, 4)
        assert metrics["reward/overlong"] == pytest.approx(np.mean(trained) - np.mean(rewards[0]), abs=1e-6)
    assert metrics["learner/rejected"] == 0  # of the tokens that are there
    expected = trained - trained.mean(1, keepdims=True)
    np.testing.assert_allclose(np.concatenate([part.advantage for part in given]), expected.ravel(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attempts": 0}, "rollout.attempts = 0: expected at least 1"),
        ({"overlong": "penalise"}, "rollout.overlong_margin = 0 and rollout.overlong = 'penalise'"),
        ({"overlong": "drop", "overlong_margin": 2}, "rollout.overlong_margin = 2 and rollout.overlong = 'drop'"),
        (
            {"overlong": "penalise", "overlong_margin": 99},
            "rollout.overlong_margin = 99 exceeds the response's space of",
        ),
    ],
)
def test_bad_options_of_collecting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(configured(rollout=changes))
    assert message in str(error.value)


def broken(prompt: Prompt, response: str) -> float:
    raise KeyError(response)


def picky(prompt: Prompt, response: str) -> float:
    return 1.0 if prompt.answer == "2" else broken(prompt, response)


def test_a_task_is_tried_before_long_work(tmp_path: Path):
    """A reward that raises is named; a verifier may fail on some prompts, as it may in a run, but not on all."""

    class Own(Arithmetic):
        def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
            return broken(prompt, response)

    try_task(Arithmetic(ArithmeticConfig()), 32)
    with pytest.raises(UserError, match=r"Own.reward failed on the response '.*' to prompt .*: KeyError"):
        try_task(Own(ArithmeticConfig()), 32)
    with pytest.raises(UserError, match="expected 1 to 1: raise the prompt length"):
        try_task(Arithmetic(ArithmeticConfig()), 1)

    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "1+{i}=", "answer": "{i + 1}"}}\n' for i in range(4)))
    data = DatasetConfig((str(tmp_path / "data.jsonl"),), alphabet="0123456789+=", heldout_share=0.0)
    try_task(dataclasses.replace(data, rewards=(Reward("picky", picky),)).build(), 8)
    failing = dataclasses.replace(data, rewards=(Reward("broken", broken),))
    with pytest.raises(UserError, match="reward 'broken': its verifier failed on 4 of 4 responses, more than"):
        try_task(failing.build(), 8)
    try_task(dataclasses.replace(failing, max_verifier_failures=1.0).build(), 8)


@pytest.mark.parametrize("answer", [Fraction(1, 2), (1, 2), np.int64(3)])
def test_answers_that_are_no_json(answer: Any) -> None:
    """Samples have them as text; prompts that wait in a checkpoint would not come back as they were."""

    class Own(Arithmetic):
        def split(self, split: Split) -> Any:
            return [dataclasses.replace(super().split(split)[0], answer=answer)]

        def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
            return 0.0

    task = Own(ArithmeticConfig())
    try_task(task, 32)
    with pytest.raises(UserError, match=rf"\({type(answer).__name__}\) is not the same after JSON, in which check"):
        try_task(task, 32, kept=True)
    assert json.loads(json.dumps(plain_answer(answer))) == str(answer)
    assert [plain_answer(value) for value in ("7", 7, 0.5, None)] == ["7", 7, 0.5, None]


def test_dynamic_sampling_is_for_advantages_within_groups() -> None:
    """Elsewhere a group that is all right has an advantage, and would be thrown away."""
    with pytest.raises(UserError, match=r"attempts = 2, but under objective 'reinforce' responses of equal rewards"):
        build(configured(rollout={"attempts": 2}, objective={"name": "reinforce"}))
