"""Verifiers: a prompt and a response in, a number out; and several of them, weighted, as one reward.

A verifier is any function ``(prompt, response) -> float``. Those here are frozen dataclasses, so that a run's manifest
shows their numbers. One that raises, or returns what is no finite number, has failed: its reward is 0, the failure is
counted, and a share of failures in one batch above a limit stops the run.
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Sequence
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlstab_jax.tasks.extract import EXTRACTORS, Extract
from rlstab_jax.tasks.math_workers import MathWorkers
from rlstab_jax.tasks.protocol import Failure, Prompt, Rewards
from rlstab_jax.types import UserError, one_line


class Verifier(Protocol):
    """Judges one response, given its text without the stop token. A plain function will do."""

    def __call__(self, prompt: Prompt, response: str, /) -> float: ...


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response.

    Attributes:
      value: the reward, 0 after a failure.
      gave_up: whether the answer used up its time or memory; its reward is 0, and that is no failure.
      failure: why the verifier could not judge, or "".
    """

    value: float
    gave_up: bool = False
    failure: str = ""


@runtime_checkable
class BatchVerifier(Protocol):
    """A verifier that judges a batch at once, in parallel."""

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]: ...


@dataclasses.dataclass(frozen=True)
class Reward:
    """A verifier with its weight in the sum; logged as ``reward/component/<name>``, unweighted."""

    name: str
    """Lower-case letters, digits and underscores."""
    verifier: Any
    """A `Verifier`: one of this module, or a function of one's own, which is given as long as it takes; or a
    `BatchVerifier`, a frozen dataclass that judges a batch in its own way, e.g. in parallel and within a time."""
    weight: float = 1.0
    """Factor in the reward, which is the sum over the verifiers."""


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 if the extracted answer is the reference answer, letter by letter but for spaces, else 0."""

    extract: Extract = "any"
    """Where the answer is: in the last \\boxed, after ####, after "the answer is", any of these in turn, or whole."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        answer = EXTRACTORS[self.extract](response)
        return float(answer is not None and "".join(answer.split()) == "".join(prompt.answer.split()))


@dataclasses.dataclass(frozen=True)
class Numeric:
    """1 if the extracted answer is the reference's number, else 0. Raises ValueError for a reference that is none.

    Read are 1,234 and -0.5 and 2e3 and 3/4 and 50% (which is 50), with a dollar sign before them or not.
    """

    extract: Extract = "any"
    """Where the answer is; see `ExactMatch`."""
    tolerance: float = 1e-6
    """Largest difference, relative to the reference; one that is written as an integer must be met exactly."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        reference = number(prompt.answer)
        if reference is None:
            raise ValueError(f"the reference answer {prompt.answer!r} is no number")
        answer = number(EXTRACTORS[self.extract](response) or "")
        if answer is None:
            return 0.0
        if isinstance(reference, int):  # whatever the answer is written like: 72.0 is 72, 72.00005 is not
            return float(answer == reference)
        try:
            return float(math.isclose(answer, reference, rel_tol=0, abs_tol=self.tolerance * abs(reference)))
        except OverflowError:  # an integer beyond all floats
            return 0.0


@dataclasses.dataclass(frozen=True)
class MathVerify:
    """1 if the extracted answer equals the reference as mathematics, by math-verify, else 0.

    Comparisons run in worker processes. An answer that uses up the time or the memory of one costs its own reward.
    """

    extract: Extract = "any"
    """Where the answer is; see `ExactMatch`."""
    seconds: float = 5.0
    """CPU time of one comparison (and at most ten times as much by the clock)."""
    workers: int = 0
    """Processes; 0 for one each two processors, at most 16."""
    memory_gib: float = 2.0
    """Address space of each process."""

    @functools.cached_property
    def _pool(self) -> MathWorkers:
        return MathWorkers(
            self.workers or max(1, min(16, (os.cpu_count() or 1) // 2)), self.seconds, int(self.memory_gib * 2**30)
        )

    def __call__(self, prompt: Prompt, response: str) -> float:
        (verdict,) = self.judge([prompt], [response])
        if verdict.failure:
            raise ValueError(verdict.failure)
        return verdict.value

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Equal pairs of reference and answer are compared once; an answer that is the reference itself, never."""
        answers = [EXTRACTORS[self.extract](response) or "" for response in responses]
        pairs = [(prompt.answer, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        replies = {pair: _at_once(*pair) for pair in pairs}
        asked = [pair for pair, reply in replies.items() if reply is None]
        replies |= zip(asked, self._pool.compare(asked), strict=True)
        return [_verdict(replies[pair] or {}) for pair in pairs]


_LONGEST_ANSWER = 4096  # characters; what is longer is no final answer, and parsing it can take minutes


def _at_once(reference: str, answer: str) -> dict[str, Any] | None:
    """A worker's reply where it needs no worker."""
    if not answer or answer == reference:
        return {"right": bool(answer)}
    return {"gave_up": "length"} if len(answer) > _LONGEST_ANSWER else None


def _verdict(reply: dict[str, Any]) -> Verdict:
    return Verdict(float(reply.get("right", 0.0)), "gave_up" in reply, reply.get("error", ""))


_NUMBER = re.compile(
    r"([+-]?)\s*\$?\s*([+-]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(?:e([+-]?\d{1,3}))?\s*\\?%?", re.IGNORECASE
)
_FRACTION = re.compile(r"([^\s/]+)\s*/\s*([^\s/]+)")


def number(text: str) -> int | float | None:
    """The number that a text is, or None. An integer written without a point is an int of any size.

    >>> number("$1,234"), number("3/4"), number("12 apples")
    (1234, 0.75, None)
    """
    text = text.strip().strip("$").removesuffix(".")
    if (fraction := _FRACTION.fullmatch(text)) is not None:
        over, under = number(fraction[1]), number(fraction[2])
        return None if over is None or not under else _finite(lambda: over / under)
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[3] or match[4]) or (match[1] and match[2]):
        return None
    plain = (match[1] or match[2]) + (match[3] or "").replace(",", "") + (match[4] or "")
    if match[4] is None and match[5] is None:
        return int(plain) if len(plain) <= 4000 else None
    return _finite(lambda: float(plain + (f"e{match[5]}" if match[5] else "")))


def _finite(value: Any) -> float | None:
    try:
        result = value()
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def check_rewards_config(rewards: Sequence[Reward]) -> None:
    """Raises UserError for no reward, a bad or repeated name, a weight or a verifier that cannot be used."""
    if not rewards:
        raise UserError("task.rewards is empty: give at least one Reward")
    for reward in rewards:
        if isinstance(reward.verifier, type):
            name = reward.verifier.__name__
            raise UserError(f"task.rewards: the verifier of {reward.name!r} is the class {name}: give {name}()")
        for field, kind in (("name", str), ("weight", int | float)):
            if not isinstance(value := getattr(reward, field), kind):
                raise UserError(f"task.rewards: {field} = {value!r}: expected a {'text' if kind is str else 'number'}")
        if not re.fullmatch(r"[a-z0-9_]+", reward.name) or [r.name for r in rewards].count(reward.name) > 1:
            raise UserError(
                f"task.rewards: name {reward.name!r}: expected lower-case letters, digits and underscores, "
                "each name once"
            )
        if not math.isfinite(reward.weight):
            raise UserError(f"task.rewards: weight {reward.weight} of {reward.name!r}: expected a finite number")
        plain = isinstance(reward.verifier, FunctionType) or dataclasses.is_dataclass(reward.verifier)
        if not plain or not (callable(reward.verifier) or isinstance(reward.verifier, BatchVerifier)):
            raise UserError(
                f"task.rewards: the verifier of {reward.name!r} is {reward.verifier!r}, expected a function "
                "(prompt, response) -> float, or a dataclass that is called like one or has a method `judge`"
            )
        ours = isinstance(reward.verifier, ExactMatch | Numeric | MathVerify)
        if ours and (extract := reward.verifier.extract) not in EXTRACTORS:
            known = ", ".join(EXTRACTORS)
            raise UserError(f"task.rewards: extract = {extract!r} of {reward.name!r}: expected one of {known}")
        if not isinstance(reward.verifier, BatchVerifier):
            try:
                inspect.signature(reward.verifier).bind("prompt", "response")
            except TypeError as error:
                raise UserError(
                    f"task.rewards: the verifier of {reward.name!r} cannot be called as (prompt, response): {error}"
                ) from error
        if isinstance(reward.verifier, MathVerify):
            _check_math_verify(reward.name, reward.verifier)


def _check_math_verify(name: str, verifier: MathVerify) -> None:
    for field, ok, expected in (
        ("seconds", verifier.seconds > 0, "above 0"),
        ("workers", verifier.workers >= 0, "0 (a default) or more"),
        ("memory_gib", verifier.memory_gib >= 0.25, "at least 0.25"),
    ):
        if not ok:
            raise UserError(
                f"task.rewards: MathVerify of {name!r}: {field} = {getattr(verifier, field)}: expected {expected}"
            )
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("task.rewards: MathVerify needs math-verify: pip install 'rlstab_jax[data]'")


def judge(rewards: Sequence[Reward], prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
    """Each response's weighted sum of rewards, and each reward by itself. A verifier that fails gives 0."""
    total, components, failures, gave_up = np.zeros(len(responses)), {}, [], 0
    for reward in rewards:
        verdicts = _verdicts(reward.verifier, prompts, responses)
        values = np.array([verdict.value for verdict in verdicts])
        failures += [Failure(reward.name, row, v.failure) for row, v in enumerate(verdicts) if v.failure]
        gave_up += sum(verdict.gave_up for verdict in verdicts)
        components[reward.name] = values
        total += reward.weight * values
    return Rewards(total, components, tuple(failures), gave_up, len(responses))


def check_failures(judged: Rewards, prompts: Sequence[Prompt], most: float) -> None:
    """Raises UserError where a verifier failed on more than a share ``most`` of what it was shown of a whole batch: a
    broken verifier must not train silently. It names the first prompt, of one for each response, and what happened."""
    shown = judged.shown or len(prompts)  # a task that judges by itself may not say
    for name in dict.fromkeys(failure.reward for failure in judged.failures):
        failed = [failure for failure in judged.failures if failure.reward == name]
        if len(failed) > most * shown:
            first = prompts[failed[0].row]
            raise UserError(
                f"reward {name!r}: its verifier failed on {len(failed)} of {shown} responses, more than "
                f"task.max_verifier_failures allows; first on prompt {first.id} ({first.text[:60]!r}): "
                f"{failed[0].message}. Mend the verifier or the data"
            )


def _verdicts(verifier: Any, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
    if isinstance(verifier, BatchVerifier):
        return _verdicts_at_once(verifier, prompts, responses)
    return [_called(verifier, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _called(verifier: Verifier, prompt: Prompt, response: str) -> Verdict:
    try:
        value = verifier(prompt, response)
    except (Exception, SystemExit) as error:  # whatever a user's function may raise
        return _failed(error)
    return _verdict_of(value)


def _verdicts_at_once(verifier: BatchVerifier, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
    try:
        verdicts = list(verifier.judge(prompts, responses))
    except (Exception, SystemExit) as error:  # whatever a user's method may raise
        return [_failed(error)] * len(responses)
    if len(verdicts) != len(responses) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
        kinds = ", ".join(sorted({type(verdict).__name__ for verdict in verdicts}))
        raise UserError(
            f"{type(verifier).__name__}.judge returned {len(verdicts)} of {kinds or 'nothing'} for {len(responses)} "
            "responses: expected a Verdict for each"
        )
    return [Verdict(0.0, v.gave_up, v.failure) if v.failure else _verdict_of(v.value, v.gave_up) for v in verdicts]


def _verdict_of(value: Any, gave_up: bool = False) -> Verdict:
    """Of what a verifier returned."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        return _failed(error)
    return Verdict(number, gave_up) if math.isfinite(number) else Verdict(0.0, failure=f"it returned {number}")


def _failed(error: BaseException) -> Verdict:
    return Verdict(0.0, failure=one_line(error))
