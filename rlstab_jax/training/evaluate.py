"""Accuracy on held-out prompts: mean over n samples of each, live routing, by either engine."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.inference import Sampling, StopStrings, prepare, sample_keys, sampler_for
from rlstab_jax.models import Transformer
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.tasks import Prompt
from rlstab_jax.training.collect import judge
from rlstab_jax.training.config import truncates
from rlstab_jax.training.engines import Engines
from rlstab_jax.training.passes import responses_of
from rlstab_jax.types import Rollout, row_axis, take_rows


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Mean reward over prompts x samples, and the mean length of the responses in tokens."""

    mean: float
    response_length: float


def accuracy(
    engines: Engines,
    model: Transformer,
    params: dict,
    key: jax.Array,
    *,
    prompts: int,
    samples: int,
    sampling: Sampling,
    support: int = 0,
    stop: StopStrings | None = None,
) -> Accuracy:
    """Samples held-out prompts with ``model`` as the engine and judges the responses, which ``stop`` may end.

    Each call with equal ``key`` draws with equal keys, so that evaluations along a run are paired.
    """
    source = engines.task.split("heldout")
    asked = [source[i] for i in range(prompts)]
    at_once = _prompts_at_once(engines, prompts, samples)
    # Filled up with the last prompt, so that all waves and devices have as many rows.
    fed = asked + [asked[-1]] * (-prompts % at_once)
    variables = engines.settle(prepare(params, model.precision, engines.mesh))

    def wave(fed: list[Prompt]) -> Rollout:
        sampler = sampler_for(stop, engines.config.rollout.slots)
        keys = sample_keys(key, 0, [prompt.id for prompt in fed], samples)
        options = {"support": support, "record_routes": False}
        return on_host(
            responses_of(engines, sampler, model, variables, fed, keys, sampling, samples=samples, **options)
        )

    waves = [wave(fed[i : i + at_once]) for i in range(0, len(fed), at_once)]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts, axis=row_axis(parts[0])), *waves)
    rollout = take_rows(whole, jnp.arange(prompts * samples))
    _, rewards = judge(engines.task, asked, rollout, stop.texts if stop else ())
    return Accuracy(float(rewards.total.mean()), float(rollout.response_mask.sum(1).mean()))


def _prompts_at_once(engines: Engines, prompts: int, samples: int) -> int:
    """All, or no more responses than a wave of rollouts has: more may not fit the devices. A multiple of these."""
    config, shards = engines.config, engines.row_shards
    if config.rollout.waves > 1:
        prompts = min(prompts, config.responses_per_step // config.rollout.waves // samples // shards * shards)
    return max(-(-prompts // shards) * shards, shards)


def plain_sampling(engines: Engines) -> Sampling:
    """Draws from the model's own distribution, at temperature 1, untruncated and of any length, whatever the config's
    rollouts and evaluations do."""
    return dataclasses.replace(
        engines.sampling,
        temperature=np.float32(1),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        uniform=None,
        min_new_tokens=None,
    )


def evaluation_sampling(engines: Engines) -> tuple[Sampling, int]:
    """How the config's evaluation draws, and the bound on the tokens kept, 0 without truncation.

    Responses end as rollouts do, but are never drawn from a mixture, which belongs to the rollouts alone.
    """
    evaluation = engines.config.evaluation
    sampling = dataclasses.replace(
        plain_sampling(engines),
        temperature=np.float32(evaluation.temperature),
        top_k=np.int32(evaluation.top_k),
        top_p=np.float32(evaluation.top_p),
        min_p=np.float32(evaluation.min_p),
        min_new_tokens=engines.sampling.min_new_tokens,
    )
    return sampling, evaluation.support if truncates(evaluation) else 0


def evaluate(engines: Engines, params: dict, key: jax.Array) -> dict[str, float]:
    """The ``eval/*`` metrics of these parameters: sampled by the inference engine, and by the training engine."""
    evaluation = engines.config.evaluation
    sampling, support = evaluation_sampling(engines)
    drawn = partial(
        accuracy,
        prompts=evaluation.prompts,
        samples=evaluation.samples,
        sampling=sampling,
        support=support,
        stop=engines.stop,
    )
    rollout = drawn(engines, engines.inference, params, key)
    by_training = drawn(engines, engines.training_sampler, params, key)
    return {
        "eval/accuracy_rollout": rollout.mean,
        "eval/accuracy_training": by_training.mean,
        "eval/response_length": rollout.response_length,
    }
