"""Kernels of libraries refuse some dtypes, widths and numbers of rows, and say so where they are traced: hours into a
run. So both engines are traced on its shapes before it begins."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlstab_jax.inference import Sampling, prepare
from rlstab_jax.inference.sampler import sample_batch
from rlstab_jax.models.config import PLATFORM
from rlstab_jax.models.huggingface import parameter_shapes
from rlstab_jax.models.transformer import Transformer, forward
from rlstab_jax.training.config import RunConfig


def check_kernels(config: RunConfig, training: Transformer, inference: Transformer, sampling: Sampling) -> None:
    """Raises UserError where a kernel that only some hardware has does not take what the engines will feed it.

    Args:
      config: as resolved.
      training, inference, sampling: as of `EnginePair`.
    """
    if PLATFORM.keys().isdisjoint(dataclasses.astuple(config.kernels)):
        return
    learner, rollout = config.learner, config.rollout
    params = parameter_shapes(config.model)
    prompts = config.prompts_per_step // rollout.waves
    two_tokens = partial(
        sample_batch,
        inference,
        response_length=2,
        samples_per_prompt=config.samples_per_prompt,
        support=0,
        record_routes=True,
    )
    variables = jax.eval_shape(partial(prepare, precision=rollout.precision), params)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts * config.samples_per_prompt))
    jax.eval_shape(two_tokens, variables, *_fed(prompts, rollout.prompt_length), keys, sampling)
    if learner.packing:  # it chooses its rows by itself
        return
    minibatch = config.prompts_per_minibatch * config.samples_per_prompt
    for rows in {minibatch // learner.micro_batches, config.responses_per_step // learner.score_micro_batches}:
        fed = _fed(rows, rollout.prompt_length + rollout.response_length - 1)
        jax.eval_shape(jax.grad(partial(_sum, training)), params, *fed)


def _sum(training: Transformer, params: dict, tokens: Array, mask: Array) -> Array:
    """Its gradient is traced, too: its products are of other dtypes than those of stored values."""
    return forward(training, {"params": params}, tokens, mask).hidden.sum()


def _fed(rows: int, length: int) -> tuple[Any, Any]:
    """Shapes of tokens and of their mask."""
    return jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows, length), jnp.bool_)
