"""Partial rollouts: one response drawn in rounds, each of which may have newer weights than the round before."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.inference.sampling import Sampling
from rlstab_jax.models.transformer import Transformer
from rlstab_jax.types import Rollout


@partial(jax.jit, static_argnames=("model", "begun", "response_length", "support"))
def sample_on(
    model: Transformer,
    variables: dict,
    rollout: Rollout,
    keys: Array,
    sampling: Sampling,
    *,
    begun: int,
    response_length: int,
    support: int = 0,
) -> Rollout:
    """Goes on with responses by other weights than those that began them.

    The prefix is fed anew, so that its keys and values are those of the new weights, as in AReaL (2505.24298). Its
    tokens, log-probs and routes stay as they are: a token keeps the route with which its successor was drawn. At equal
    weights this draws what `sample` draws at once.

    Args:
      variables: the new weights, as in `sample`.
      rollout: whose first ``begun`` response columns are drawn. Only responses without a stop token go on.
      keys, sampling, support: those that the responses were begun with.
      begun: columns drawn so far.
      response_length: columns to draw now; the rollout has room for them.
    """
    prefix, end = rollout.prompt_length + begun, begun + response_length
    going = rollout.truncated & rollout.response_mask[:, begun - 1]
    drawn = sample_batch(
        model,
        variables,
        rollout.tokens[:, :prefix],
        rollout.valid[:, :prefix] & going[:, None],
        keys,
        sampling,
        response_length=response_length,
        samples_per_prompt=1,
        support=support,
        record_routes=rollout.routes is not None,
        before=begun,
    )

    def put(into: Array, columns: Array) -> Array:
        return into.at[:, begun:end].set(columns)

    new = replace(
        rollout,
        tokens=rollout.tokens.at[:, prefix : prefix + response_length].set(drawn.tokens[:, prefix:]),
        response_mask=put(rollout.response_mask, drawn.response_mask),
        log_probs=put(rollout.log_probs, drawn.log_probs),
        truncated=jnp.where(going, drawn.truncated, rollout.truncated),
    )
    if rollout.support is not None and drawn.support is not None:
        new = replace(new, support=put(rollout.support, drawn.support))
    if rollout.routes is not None and drawn.routes is not None:
        fed = slice(prefix - 1, prefix + response_length - 1)
        new = replace(new, routes=rollout.routes.at[:, :, fed].set(drawn.routes[:, :, prefix - 1 :]))
    return new


def with_room(rollout: Rollout, response_length: int, pad_id: int, vocab_size: int, num_experts: int) -> Rollout:
    """The rollout with space for longer responses, as if no more had been drawn."""
    more = response_length - rollout.response_length

    def pad(x: Array, axis: int, value: float) -> Array:
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value)

    return replace(
        rollout,
        tokens=pad(rollout.tokens, 1, pad_id),
        response_mask=pad(rollout.response_mask, 1, False),
        log_probs=pad(rollout.log_probs, 1, 0),
        routes=None if rollout.routes is None else pad(rollout.routes, 2, num_experts),
        support=None if rollout.support is None else pad(rollout.support, 1, vocab_size),
        version=None if rollout.version is None else pad(rollout.version, 1, 0),
    )
