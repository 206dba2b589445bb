"""The two engines at work in a global step: the inference engine samples, the training engine scores."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlstab_jax.inference import (
    Sampling,
    prepare,
    sample_keys,
    sample_matched,
    sample_on,
    sampler_for,
    score_matched,
    with_noise,
)
from rlstab_jax.inference.matched import MatchedPass
from rlstab_jax.learner import Packing, PolicyScores, plan, score
from rlstab_jax.learner.controls import permuted
from rlstab_jax.learner.score import replayed_routes, score_statistics
from rlstab_jax.models import Transformer
from rlstab_jax.models.layers import PREDICTOR
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.stability.reduce import Statistics
from rlstab_jax.tasks import Prompt, encode_prompts
from rlstab_jax.training.collect import key_ids
from rlstab_jax.training.config import truncates
from rlstab_jax.training.engines import Engines
from rlstab_jax.types import Poll, Rollout, RoutingReplay, row_axis, undisturbed


def inference_weights(engines: Engines, params: dict, step: int) -> dict:
    """The stored weights of the inference engine at ``params``, with which global step ``step``'s batch is sampled."""
    rollout = engines.config.rollout
    if rollout.weight_noise:
        key = jax.random.fold_in(jax.random.key(engines.config.seed), _NOISE)
        key = jax.random.fold_in(key, 0 if rollout.weight_noise_lasts else step)
        params = engines.settle(with_noise(params, np.float32(rollout.weight_noise), key))
    return engines.settle(prepare(params, rollout.precision, engines.mesh))


_NOISE = 2**32 - 1  # where the keys of draws have the number of a global step


def responses_of(
    engines: Engines,
    sampler: Callable[..., Rollout],
    model: Transformer,
    weights: dict,
    prompts: Sequence[Prompt],
    keys: Array,
    sampling: Sampling,
    *,
    samples: int,
    prompt_length: int = 0,
    response_length: int = 0,
    **options: Any,
) -> Rollout:
    """Responses of ``model`` to ``prompts``, by ``sampler``: `sample` or another with its arguments and ``options``.

    ``prompt_length`` and ``response_length`` are the config's where they are 0.
    """
    rollout = engines.config.rollout
    tokens, mask = encode_prompts(prompts, engines.task.tokenizer, prompt_length or rollout.prompt_length)
    return engines.settle(
        sampler(
            model,
            weights,
            engines.place_rows(tokens),
            engines.place_rows(mask),
            keys,
            sampling,
            response_length=response_length or rollout.response_length,
            samples_per_prompt=samples,
            **options,
        )
    )


def sample_responses(
    engines: Engines,
    weights: dict,
    prompts: list[Prompt],
    step: int,
    attempt: int = 0,
    length: int = 0,
    poll: Poll = undisturbed,
) -> Rollout:
    """Responses of the inference engine to train on: ``samples_per_prompt`` adjacent rows for each prompt.

    Args:
      weights: from `inference_weights`.
      prompts, step, attempt: keys of draws depend on them.
      length: that of the responses; by default the config's.
      poll: called between waves, and between rounds of slots; it may raise.
    """
    config, rollout = engines.config, engines.config.rollout
    samples, size = config.samples_per_prompt, len(prompts) // rollout.waves
    keys = sample_keys(jax.random.key(config.seed), step, key_ids(prompts), samples, attempt)
    matched = rollout.log_probs == "matched"
    sampler: Callable[..., Rollout] = sample_matched if matched else sampler_for(engines.stop, rollout.slots, poll)

    def wave(number: int) -> Rollout:
        if number:
            poll()
        return responses_of(
            engines,
            sampler,
            engines.inference,
            weights,
            prompts[number * size :][:size],
            keys[number * size * samples :][: size * samples],
            engines.sampling,
            samples=samples,
            support=rollout.support if truncates(rollout) else 0,
            response_length=length,
        )

    waves = [wave(number) for number in range(rollout.waves)]
    return waves[0] if len(waves) == 1 else engines.place_rows(_joined(waves))


@jax.jit
def _joined(rollouts: list[Rollout]) -> Rollout:
    """The rows of several rollouts, one after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=row_axis(parts[0])), *rollouts)


def go_on_sampling(
    engines: Engines, weights: dict, rollout: Rollout, prompts: list[Prompt], step: int, begun: int, length: int
) -> Rollout:
    """``length`` more tokens of responses that have ``begun`` tokens, by newer weights than began them."""
    config = engines.config
    return sample_on(
        engines.inference,
        weights,
        rollout,
        sample_keys(jax.random.key(config.seed), step, key_ids(prompts), config.samples_per_prompt),
        engines.sampling.per_row(config.responses_per_step),
        begun=begun,
        response_length=length,
        support=config.rollout.support if truncates(config.rollout) else 0,
    )


def routes_to_replay(engines: Engines, initial: dict | None, rollout: Rollout, step: int) -> Rollout:
    """The rollout with the routes that R3 is to replay in the place of the recorded ones; see ``learner.replay_of``.

    Args:
      initial: the parameters that RL began with, where their choice is asked for.
      step: the global step that learns from the rollout; a permutation depends on it and the run's seed.
    """
    key = jax.random.fold_in(jax.random.key(engines.config.seed), step)
    return with_routes_of(engines, engines.config.learner.replay_of, initial, rollout, key)


def with_routes_of(engines: Engines, replay_of: str, initial: dict | None, rollout: Rollout, key: Array) -> Rollout:
    """The rollout with the routes that ``learner.replay_of`` names; ``key`` is of the permutation."""
    if replay_of == "recorded":
        return rollout
    if replay_of == "initial":
        assert initial is not None
        return replace(rollout, routes=score_old(engines, initial, rollout, RoutingReplay.LIVE)[0].routes)
    return replace(rollout, routes=engines.settle(permuted(rollout.routes, rollout.fed_mask, key)))


def score_old(
    engines: Engines, params: dict, rollout: Rollout, replay: RoutingReplay, predictor: dict | None = None
) -> tuple[PolicyScores, Statistics]:
    """The training engine's forward pass over a rollout; in matched mode by the program that sampled it.

    ``predictor``: the weights of the routers' predictors, which PR2 needs.
    """
    if engines.config.rollout.log_probs == "matched":
        routes = replayed_routes(replay, rollout, None) if replay is RoutingReplay.R3 else None
        # Model and weights as they sampled, laid out alike: on a mesh another layout is another order of sums.
        weights = inference_weights(engines, params, step=0)  # which have no noise
        scores, statistics = matched_scores(
            score_matched(engines.inference, weights, rollout, engines.sampling, routes),
            engines.config.model.num_experts,
        )
        return scores if engines.needs_router else replace(scores, router=None), statistics
    foretelling = replay is RoutingReplay.PR2
    variables = {"params": params} | ({PREDICTOR: predictor} if foretelling else {})
    observed = engines.config.learner.predictor_tokens if foretelling else 0
    return _score(engines, engines.training, variables, rollout, replay, observed)


def score_live(engines: Engines, params: dict, rollout: Rollout) -> PolicyScores | None:
    """pi_old with live routing, where replay alters the policy that is measured; None if that gap is not asked for."""
    if not engines.config.learner.live_gap:
        return None
    return score_old(engines, params, rollout, RoutingReplay.LIVE)[0]


def rescore(engines: Engines, weights: dict, rollout: Rollout) -> Array:
    """Log-probs [batch, response_length] of a scoring pass by the inference engine's weights.

    They are other numbers than the ones that drove the draw: sums run in another order, and a rounding can flip. The
    routes are those of the draw.
    """
    replay = RoutingReplay.LIVE if rollout.routes is None else RoutingReplay.R3
    return _score(engines, engines.inference, weights, rollout, replay)[0].log_probs


@partial(jax.jit, static_argnames="num_experts")
def matched_scores(matched: MatchedPass, num_experts: int) -> tuple[PolicyScores, Statistics]:
    """What `score` returns, from a matched pass."""
    rollout = matched.rollout
    if rollout.routes is None or matched.router is None:
        scores = PolicyScores(rollout.log_probs, matched.entropy, None, None, None)
        return scores, score_statistics(rollout, matched.entropy, None, None)
    router = jnp.moveaxis(matched.router[:, :, rollout.prompt_length - 1 :], 0, 2)
    router = router.reshape(*rollout.log_probs.shape, -1)
    one_hot = rollout.routes[..., None] == jnp.arange(num_experts)
    scores = PolicyScores(rollout.log_probs, matched.entropy, rollout.routes, matched.live, router)
    load = one_hot.sum((1, 2, 3), dtype=jnp.float32)
    return scores, score_statistics(rollout, matched.entropy, matched.margin, load)


def packed(engines: Engines, fed: Array | np.ndarray, micro_batches: int) -> Packing:
    """Where the sequences of rows with that mask of fed tokens go. Waits for it."""
    return engines.place_rows(plan(on_host(fed), micro_batches, engines.row_shards))


def _score(
    engines: Engines,
    model: Transformer,
    variables: dict,
    rollout: Rollout,
    replay: RoutingReplay,
    observed_tokens: int = 0,
) -> tuple[PolicyScores, Statistics]:
    learner = engines.config.learner
    return engines.settle(
        score(
            model,
            variables,
            rollout,
            replay=replay,
            micro_batches=learner.score_micro_batches,
            logits_per_chunk=learner.logits_per_chunk,
            packing=packed(engines, rollout.fed_mask, learner.score_micro_batches) if learner.packing else None,
            router=engines.needs_router,
            observed_tokens=observed_tokens,
        )
    )
