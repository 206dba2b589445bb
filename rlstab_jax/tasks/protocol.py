"""What the training loop asks of a task: prompts, a tokeniser, a reward. Any object with these attributes will do."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

Split = Literal["train", "heldout"]


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

    def decode(self, ids: Sequence[int]) -> str: ...


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
        """R(x, y) of a response's text without its stop token; ``stopped`` is False when it met the length limit."""
        ...


@runtime_checkable
class DemonstratedTask(Task, Protocol):
    """A task that can also show how to answer, for the cold start."""

    def demonstration(self, prompt: Prompt, seed: int) -> str:
        """A response's text without its stop token, a function of (prompt, seed) alone."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Base of the configurations of tasks: a frozen dataclass whose ``build`` makes the task."""

    def build(self) -> Task:
        """The task. Raises UserError for values that cannot be met."""
        raise NotImplementedError
