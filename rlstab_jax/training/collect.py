"""From responses to a batch that is worth training on: judging, dynamic sampling, what becomes of over-long responses.

Dynamic sampling is DAPO's (2503.14476, section 3.2): a group whose rewards are all equal has no advantage and teaches
nothing (by the rewards as the task gives them: before a punishment for length, or a KL in the reward), so that its
place is given to another prompt's group, until every place holds one with signal or the attempts are used up. Each
attempt samples a whole batch of further prompts, in the program that is compiled already; its number is part of the
keys of its draws. What was drawn from the prompts' iterator is consumed, used or not.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.parallel.distributed import exchange, on_host, share, together
from rlstab_jax.tasks import (
    BatchTask,
    Dataset,
    Prompt,
    Rewards,
    Task,
    decode_responses,
    encode_prompts,
    reward_of,
    rewards_of,
)
from rlstab_jax.types import Rollout, UserError, row_axis, take_rows


@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses to a batch of prompts, judged; rows of one prompt are adjacent.

    ``seconds`` are those of sampling and of judging, by the name of their metric; ``drops`` says whether responses that
    met the length limit are left out of training.
    """

    prompts: list[Prompt]
    rollout: Rollout
    texts: list[str]
    rewards: Rewards
    seconds: dict[str, float]
    drops: bool = False

    def groups(self, values: Any) -> np.ndarray:
        """A copy of the values of rows, [prompt, sample]."""
        return np.array(values, object if isinstance(values[0], str) else None).reshape(len(self.prompts), -1)

    @property
    def signal(self) -> Bool[np.ndarray, "prompts"]:
        """True for groups whose rewards differ, if a response that has an advantage so is trained on."""
        rewards = self.groups(self.rewards.total)
        differ = (rewards != rewards[:, :1]).any(1)
        if not self.drops:
            return differ
        kept = ~self.groups(on_host(self.rollout.truncated))
        return differ & (kept & (rewards != rewards.mean(1, keepdims=True))).any(1)


def judge(
    task: Task, prompts: Sequence[Prompt], rollout: Rollout, stop: Sequence[str] = (), *, whole: bool = True
) -> tuple[list[str], Rewards]:
    """Texts and rewards of a rollout's responses; rows of one prompt are adjacent. Each process judges its share of
    them, and all return all. A text ends before the first of the ``stop`` strings.

    Raises UserError for what is no reward, for a tokeniser that fails, and for a verifier that fails too often, unless
    the rollout is no ``whole`` batch, so that a single prompt may be too many.
    """
    tokens, mask, truncated = on_host((rollout.tokens, rollout.response_mask, rollout.truncated))
    rows, samples = share(len(tokens)), len(tokens) // len(prompts)
    every = [prompts[row // samples] for row in range(len(tokens))]
    of_row = every[rows]

    def here() -> tuple[list[str], Rewards]:
        responses = decode_responses(
            tokens[rows, rollout.prompt_length :], mask[rows], truncated[rows], task.tokenizer, stop
        )
        texts = [text for text, _ in responses]
        if isinstance(task, BatchTask):
            return texts, rewards_of(task, of_row, responses)
        each = [reward_of(task, prompt, *response) for prompt, response in zip(of_row, responses, strict=True)]
        return texts, Rewards(np.array(each))

    judged = exchange(together(here))
    rewards = Rewards.joined([rewards for _, rewards in judged])
    if whole and isinstance(task, Dataset):
        task.check(rewards, every)
    rewards = dataclasses.replace(rewards, total=rewards.total.astype(np.float32))
    return [text for texts, _ in judged for text in texts], rewards


def try_task(task: Task, prompt_length: int, count: int = 4, kept: bool = False) -> None:
    """Encodes a few training prompts and judges their reference answers: what cannot work is said before long work.

    Args:
      kept: checkpoints hold prompts, whose responses are unfinished.

    Raises UserError as `judge` does; for a verifier where it fails on all of them; for answers that cannot be kept.
    """
    train = task.split("train")
    prompts = [train[i] for i in range(min(count, len(train)))]
    encode_prompts(prompts, task.tokenizer, prompt_length)
    for prompt in prompts if kept else ():
        if not _survives_json(prompt.answer):
            raise UserError(
                f"prompt {prompt.id}: its answer {prompt.answer!r} ({type(prompt.answer).__name__}) is not the same "
                "after JSON, in which checkpoints keep the prompts of partial rollouts: make it text, a number, or a "
                "list or dict of these, or set rollout.partial to 0"
            )
    # A task of one's own need not have answers that are texts.
    responses = [(prompt.answer if isinstance(prompt.answer, str) else "", True) for prompt in prompts]
    if not isinstance(task, BatchTask):
        for prompt, response in zip(prompts, responses, strict=True):
            reward_of(task, prompt, *response)
        return
    rewards = rewards_of(task, prompts, responses)
    if isinstance(task, Dataset) and len(prompts) in Counter(failure.reward for failure in rewards.failures).values():
        task.check(rewards, prompts)


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


@dataclasses.dataclass(frozen=True)
class _Logged:
    """What is logged of the responses of one attempt: their arrays on the devices are not kept for it."""

    rewards: Rewards
    signal: Bool[np.ndarray, "prompts"]
    lengths: Int[np.ndarray, "batch"]
    truncated: Bool[np.ndarray, "batch"]
    seconds: dict[str, float]
    failed: list[dict[str, Any]]

    @staticmethod
    def of(one: Responses) -> "_Logged":
        lengths, truncated = on_host((one.rollout.response_mask.sum(1), one.rollout.truncated))
        return _Logged(one.rewards, one.signal, lengths, truncated, one.seconds, list(_failed(one)))


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step trains on, and what it took.

    Attributes:
      prompts, rollout, texts: of the groups trained on.
      rewards: the task's, before any punishment for length.
      metrics: of all that was sampled.
      failed: responses that a verifier could not judge, for samples.jsonl.
    """

    prompts: list[Prompt]
    rollout: Rollout
    texts: list[str]
    rewards: Float[np.ndarray, "batch"]
    metrics: dict[str, float]
    failed: list[dict[str, Any]]


def collect(
    respond: Callable[[list[Prompt], int], Responses],
    prompts: list[Prompt],
    further: Iterable[list[Prompt]],
    attempts: int,
) -> Batch:
    """Samples a batch, and replaces groups without signal.

    Args:
      respond: samples and judges responses to a batch of prompts; its second argument is the number of the attempt.
      prompts: the batch of attempt 0.
      further: batches for later attempts, of the same size. Where they end, so do the attempts.
      attempts: at most so many; 1 replaces nothing.

    Returns:
      The batch. Groups with signal stay where they are; those without are replaced in order, by the groups with signal
      of further attempts in order. Places that are open after the last attempt keep their groups of attempt 0.
    """
    new, further = respond(prompts, 0), iter(further)
    sampled, prompts, rollout = [_Logged.of(new)], list(prompts), new.rollout
    texts, rewards = new.groups(new.texts), new.groups(new.rewards.total)
    places = np.flatnonzero(~new.signal)
    while len(places) and len(sampled) < attempts and (asked := next(further, None)) is not None:
        del new  # or its arrays were kept while the next attempt samples
        sampled.append(_Logged.of(new := respond(asked, len(sampled))))
        found = np.flatnonzero(new.signal)[: len(places)]
        filled, places = places[: len(found)], places[len(found) :]
        for place, group in zip(filled, found, strict=True):
            prompts[place] = asked[group]
        texts[filled], rewards[filled] = new.groups(new.texts)[found], new.groups(new.rewards.total)[found]
        rows = np.arange(texts.size, dtype=np.int32).reshape(texts.shape)
        rows[filled] = texts.size + rows[found]
        rollout = _rows_of_both(rollout, new.rollout, jnp.asarray(rows.ravel()))
    metrics = _metrics(sampled)
    if attempts > 1:
        with_signal = sum(int(one.signal.sum()) for one in sampled)
        metrics |= {
            "dynamic/attempts": len(sampled),
            "dynamic/unfilled": len(places) / len(prompts),
            "dynamic/unused": with_signal - (len(prompts) - len(places)),
        }
    failed = [row for one in sampled for row in one.failed]
    return Batch(prompts, rollout, texts.ravel().tolist(), rewards.ravel(), metrics, failed)


def key_ids(prompts: Sequence[Prompt]) -> list[int]:
    """Numbers that the keys of a batch's draws are derived from: ids, and another one each time that a prompt occurs
    again, at the border of two epochs or in a small data set. Equal keys would repeat its responses word by word."""
    seen: Counter[int] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(int(prompt.id) + (seen[prompt.id] << 32))
        seen[prompt.id] += 1
    return numbers


@jax.jit
def _rows_of_both(first: Rollout, second: Rollout, rows: Int[Array, "batch"]) -> Rollout:
    """Those rows of two rollouts, one after the other."""

    def joined(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.concatenate([one, other], axis=row_axis(one)) if one.ndim else one

    return take_rows(jax.tree.map(joined, first, second), rows)


def _metrics(sampled: Sequence[_Logged]) -> dict[str, float]:
    """Of all responses that were sampled, whether they are trained on or not."""
    lengths = np.concatenate([one.lengths for one in sampled])
    components = {name: [one.rewards.components[name] for one in sampled] for name in sampled[0].rewards.components}
    metrics = {
        "reward/mean": float(np.concatenate([one.rewards.total for one in sampled]).mean()),
        "reward/without_signal": float(np.concatenate([~one.signal for one in sampled]).mean()),
        "response/length": float(lengths.mean()),
        "response/truncated": float(np.concatenate([one.truncated for one in sampled]).mean()),
        "response/count": len(lengths),
        **{f"reward/component/{name}": float(np.concatenate(values).mean()) for name, values in components.items()},
        **{name: sum(one.seconds[name] for one in sampled) for name in sampled[0].seconds},
    }
    if components or any(one.rewards.failures for one in sampled):
        metrics["reward/verifier_failures"] = sum(len(one.rewards.failures) for one in sampled)
        metrics["reward/verifier_gave_up"] = sum(one.rewards.gave_up for one in sampled)
    return metrics


def plain_answer(answer: Any) -> Any:
    """A prompt's answer as samples.jsonl has it: a task of one's own may have answers that are no JSON."""
    return answer if isinstance(answer, str | int | float | None) else str(answer)


def _failed(responses: Responses) -> Iterator[dict[str, Any]]:
    samples = len(responses.texts) // len(responses.prompts)
    for failure in responses.rewards.failures:
        prompt = responses.prompts[failure.row // samples]
        yield {
            "prompt": prompt.text,
            "answer": plain_answer(prompt.answer),
            "response": responses.texts[failure.row],
            "reward": float(responses.rewards.total[failure.row]),
            "failure": f"{failure.reward}: {failure.message}",
        }


def length_punishment(rollout: Rollout, margin: int) -> Float[np.ndarray, "batch"]:
    """DAPO's soft over-long punishment (Eq. 13): 0 up to ``margin`` tokens before the limit, from there linearly to -1
    at the limit, which is the length of the response's space."""
    lengths = on_host(rollout.response_mask.sum(1))
    return np.clip((rollout.response_length - margin - lengths) / margin, -1, 0).astype(np.float32)


def without_truncated(rollout: Rollout) -> Rollout:
    """The rollout with an empty mask on each response that met the length limit: no sum and no denominator of the loss
    counts it (DAPO's over-long filtering)."""
    return dataclasses.replace(rollout, response_mask=rollout.response_mask & ~rollout.truncated[:, None])
