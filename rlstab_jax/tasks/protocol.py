"""What the training loop asks of a task: prompts, a tokeniser, a reward. Any object with these attributes will do."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from rlstab_jax.types import UserError, one_line

Split = Literal["train", "heldout"]
LARGEST = float(np.finfo(np.float32).max)  # of a reward


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with its reference answer.

    Attributes:
      id: in [0, 2**31), unique over both splits of a task and stable between runs: random keys are derived from it.
      text: what the model is shown.
      answer: what the verifier compares with.
    """

    id: int
    text: str
    answer: str


class PromptSource(Protocol):
    """Random access to prompts: ``source[i]`` is the same prompt each time, for 0 <= i < len(source)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt: ...


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: ids lie in [0, vocab_size).
      pad_id: fills the places that the masks exclude.
      stop_ids: a response ends with the first of these, which is part of the response's tokens but not of its text.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text. Where ``rollout.stop`` names strings, each token must write at least a byte of it."""
        ...


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokeniser with a chat template."""

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The text that the model is shown of a conversation, up to where its answer begins."""
        ...


class Task(Protocol):
    """Prompts, tokeniser and reward.

    Attributes:
      max_prompt_tokens: the longest prompt, in tokens.
      max_response_tokens: the space that a full answer needs, in tokens, the stop token included.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_prompt_tokens(self) -> int: ...

    @property
    def max_response_tokens(self) -> int: ...

    def split(self, name: Split) -> PromptSource:
        """The prompts to train on, or the held-out ones: no text is in both."""
        ...

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        """R(x, y) of a response's text without the stop token or string that ended it; ``stopped`` is False when it
        met the length limit."""
        ...


@runtime_checkable
class DemonstratedTask(Task, Protocol):
    """A task that can also show how to answer, for the cold start."""

    def demonstration(self, prompt: Prompt, seed: int) -> str:
        """A response's text without its stop token, a function of (prompt, seed) alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Failure:
    """A verifier that could not judge a response; its own reward is 0.

    Attributes:
      reward: name of the reward.
      row: number of the response in the batch.
      message: what happened, in one line.
    """

    reward: str
    row: int
    message: str


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of a batch of responses.

    Attributes:
      total: what is trained on.
      components: the rewards that it is the weighted sum of, by name, unweighted; empty where a task has but one.
      failures: verdicts that failed and count as 0.
      gave_up: answers that used up the time or memory of a verifier, and count as 0.
      shown: responses that the verifiers were shown; 0 where that is not known.
    """

    total: Float[np.ndarray, "batch"]
    components: dict[str, Float[np.ndarray, "batch"]] = dataclasses.field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    gave_up: int = 0
    shown: int = 0

    @staticmethod
    def joined(parts: Sequence["Rewards"]) -> "Rewards":
        """The rewards of several parts of a batch, in order."""
        starts = np.cumsum([0, *(len(part.total) for part in parts)])
        return Rewards(
            np.concatenate([part.total for part in parts]),
            {name: np.concatenate([part.components[name] for part in parts]) for name in parts[0].components},
            tuple(
                dataclasses.replace(failure, row=failure.row + int(start))
                for part, start in zip(parts, starts, strict=False)
                for failure in part.failures
            ),
            sum(part.gave_up for part in parts),
            sum(part.shown for part in parts),
        )


@runtime_checkable
class BatchTask(Task, Protocol):
    """A task that judges a batch at once: in parallel, by several verifiers."""

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[tuple[str, bool]]) -> Rewards:
        """Of each response's text to its prompt, and whether it stopped; see `Task.reward`."""
        ...


def build_task(config: Any) -> Task:
    """The task of a `TaskConfig`. Raises UserError where it cannot be built, or is none."""
    made_by = f"task: {type(config).__name__}.build()"
    try:
        task = config.build()
    except UserError:
        raise
    except Exception as error:  # whatever a user's method may raise
        raise UserError(f"{made_by} failed: {one_line(error)}") from error
    needed = ("tokenizer", "max_prompt_tokens", "max_response_tokens", "split", "reward")
    if missing := [name for name in needed if not hasattr(task, name)]:
        raise UserError(
            f"{made_by} returned {type(task).__name__} without {', '.join(missing)}: expected a task, see "
            "rlstab_jax.tasks.Task"
        )
    for name in ("max_prompt_tokens", "max_response_tokens"):
        if not isinstance(value := getattr(task, name), int | np.integer) or value < 1:
            raise UserError(f"{type(task).__name__}.{name} = {value!r}: expected a whole number of tokens, 1 or more")
    check_judge(task)
    return task


MEND = "Mend it; rlstab train goes on from the last checkpoint with --accept-code"


def reward_of(task: Task, prompt: Prompt, response: str, stopped: bool) -> float:
    """Of one response. Raises UserError, which names it, where the task's own method fails, or gives no number."""
    of = f"on the response {response[:60]!r} to prompt {prompt.id} ({prompt.text[:60]!r})"
    try:
        reward = float(task.reward(prompt, response, stopped=stopped))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's method may raise
        raise UserError(f"{type(task).__name__}.reward failed {of}: {one_line(error)}. {MEND}") from error
    if not abs(reward) < LARGEST:
        raise UserError(f"{type(task).__name__}.reward is {reward} {of}: expected a number within float32. {MEND}")
    return reward


def rewards_of(task: "BatchTask", prompts: Sequence[Prompt], responses: Sequence[tuple[str, bool]]) -> Rewards:
    """Of a batch. Raises UserError where the task's own method fails, or gives what are no rewards of these
    responses."""
    made_by, rows = f"{type(task).__name__}.rewards", len(responses)
    try:
        rewards = task.rewards(prompts, responses)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's method may raise
        raise UserError(f"{made_by} failed: {one_line(error)}. {MEND}") from error
    if not isinstance(rewards, Rewards):
        raise UserError(f"{made_by} returned {type(rewards).__name__}: expected rlstab_jax.tasks.Rewards. {MEND}")
    for name, values in {"total": rewards.total, **rewards.components}.items():
        numbers = np.asarray(values)
        if numbers.shape != (rows,) or numbers.dtype.kind not in "biuf":
            raise UserError(
                f"{made_by}: {name} is {numbers.dtype}{list(numbers.shape)}: expected {rows} numbers, one for each "
                f"response. {MEND}"
            )
        if not (small := np.abs(numbers) < LARGEST).all():
            row = int(np.argmin(small))
            raise UserError(
                f"{made_by}: {name} is {numbers[row]} for the response {responses[row][0][:60]!r}: expected a number "
                f"within float32. {MEND}"
            )
    if bad := [name for name in rewards.components if not re.fullmatch(r"[a-z0-9_]+", name)]:
        raise UserError(f"{made_by}: a component {bad[0]!r}: expected lower-case letters, digits, underscores. {MEND}")
    for failure in rewards.failures:
        if not (isinstance(failure, Failure) and 0 <= failure.row < rows):
            raise UserError(f"{made_by}: {failure!r}: expected a Failure of a row from 0 to {rows - 1}. {MEND}")
    return rewards


def check_judge(task: Task) -> None:
    """Raises UserError for a task whose own `reward` nobody would ask, since a class above it judges batches."""

    def depth(name: str) -> int:
        return next((i for i, owner in enumerate(type(task).__mro__) if name in vars(owner)), 0)

    if isinstance(task, BatchTask) and depth("reward") < depth("rewards"):
        raise UserError(
            f"{type(task).__name__} has a `reward` of its own, but it inherits `rewards`, which judges whole batches "
            "and does not ask it: override `rewards`, or give task.rewards a verifier"
        )


@runtime_checkable
class DescribedTask(Task, Protocol):
    """A task whose content the config does not determine, such as files."""

    @property
    def description(self) -> dict[str, Any]:
        """For a run's manifest; equal content gives an equal ``fingerprint``."""
        ...

    def remarks(self) -> list[str]:
        """Lines for the user: how many prompts there are, and how many were left out."""
        ...


@runtime_checkable
class AnsweredTask(Task, Protocol):
    """A task whose responses end in an answer that can be told apart, for majority votes."""

    def answer_of(self, response: str) -> str | None:
        """The answer that a response gives, or None without one."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Base of the configurations of tasks: a frozen dataclass whose ``build`` makes the task."""

    def build(self) -> Task:
        """The task. Raises UserError for values that cannot be met."""
        raise NotImplementedError
