"""A task of a user's own: what it does wrong is said in one line that names the method and what it gave."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rlstab_jax.tasks import (
    Arithmetic,
    ArithmeticConfig,
    CharTokenizer,
    Failure,
    Prompt,
    Rewards,
    build_task,
    decode_responses,
    encode_prompts,
    reward_of,
    rewards_of,
)
from rlstab_jax.types import UserError

PROMPTS = [Prompt(i, f"question {i}", "1") for i in range(3)]
RESPONSES = [("a", True), ("b", False), ("c", True)]
GOOD = Rewards(np.zeros(3), {"a": np.ones(3)}, (Failure("a", 2, "broken"),))


class Own(Arithmetic):
    given: Any = None

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        return self.given

    def rewards(self, prompts: Any, responses: Any) -> Rewards:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def own(given: Any) -> Own:
    task = Own(ArithmeticConfig())
    task.given = given
    return task


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            KeyError("x"),
            "Own.rewards failed: KeyError: 'x'. Mend it; rlstab train goes on from the last checkpoint with",
        ),
        (np.zeros(3), "Own.rewards returned ndarray: expected rlstab_jax.tasks.Rewards"),
        (Rewards(np.zeros(2)), r"Own.rewards: total is float64\[2\]: expected 3 numbers, one for each response"),
        (Rewards(np.zeros((3, 1))), r"total is float64\[3, 1\]: expected 3 numbers"),
        (Rewards(np.array(["1"] * 3)), r"total is <U1\[3\]: expected 3 numbers"),
        (Rewards(np.array([0, np.nan, 0])), "total is nan for the response 'b': expected a number within float32"),
        (Rewards(np.array([0, 0, 1e39])), r"total is 1e\+39 for the response 'c'"),
        (dataclasses.replace(GOOD, components={"a": np.zeros(1)}), r"Own.rewards: a is float64\[1\]: expected 3"),
        (dataclasses.replace(GOOD, components={"a": np.full(3, np.inf)}), "Own.rewards: a is inf for the response 'a'"),
        (dataclasses.replace(GOOD, components={"A-x": np.zeros(3)}), "a component 'A-x': expected lower-case letters"),
        (dataclasses.replace(GOOD, failures=(Failure("a", 3, "x"),)), "expected a Failure of a row from 0 to 2"),
    ],
)
def test_rewards_of_a_batch_are_checked(given: Any, message: str) -> None:
    assert rewards_of(own(GOOD), PROMPTS, RESPONSES) is GOOD
    with pytest.raises(UserError, match=message):
        rewards_of(own(given), PROMPTS, RESPONSES)


def test_a_reward_that_is_no_number_names_its_response() -> None:
    assert reward_of(own("2"), PROMPTS[0], "a", True) == 2
    for given in (float("nan"), 1e39):
        with pytest.raises(UserError, match=r"Own.reward is (nan|1e\+39) on the response 'a' to prompt 1 "):
            reward_of(own(given), PROMPTS[1], "a", True)


@pytest.mark.parametrize("length", [3.0, 0, None])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config(ArithmeticConfig):
        def build(self) -> Any:
            return type("Short", (Arithmetic,), {"max_response_tokens": length})(self)

    with pytest.raises(UserError, match=f"Short.max_response_tokens = {length}: expected a whole number of tokens"):
        build_task(Config())


class Broken(CharTokenizer):
    def encode(self, text: str) -> list[int]:
        raise KeyError(text[0])

    def decode(self, ids: Any) -> str:
        raise KeyError(ids[0])


@pytest.mark.parametrize("prompt", ["question", Prompt(-1, "1", "1"), Prompt("1", "1", "1"), Prompt(2**31, "1", "1")])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(UserError, match=r"the task's prompts: .*: expected a Prompt with an id from 0 to 2\*\*31 - 1"):
        encode_prompts([prompt], CharTokenizer("12"), 4)


def test_a_tokeniser_that_raises_is_named() -> None:
    with pytest.raises(UserError, match=r"Broken.encode failed on prompt 0 \('question 0'\): KeyError: 'q'"):
        encode_prompts(PROMPTS, Broken("12"), 12)
    tokens, mask = np.array([[3, 4]]), np.ones((1, 2), bool)
    with pytest.raises(UserError, match=r"Broken.decode failed on \[3, 4\]: KeyError: 3"):
        decode_responses(tokens, mask, np.array([True]), Broken("12"))
