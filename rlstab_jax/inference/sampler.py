"""The inference engine mu: prefill and decode in one compiled program, recording what it really did.

It returns the log-probs of the very distribution that each token was drawn from, and the experts that it used. A draw's
key depends on (run seed, global step, prompt, sample number, attempt, position) alone: not on batch slot, mesh or
restarts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.decode import decode_step, depth_first, layer_variables
from rlstab_jax.models.transformer import KeyValues, Transformer, embed, finish, forward, logits_of
from rlstab_jax.types import Rollout, Routes, masked, route_dtype


@struct.dataclass
class Sampling:
    """How tokens are drawn: all traced, each a scalar or one number per row.

    Attributes:
      temperature: divides the logits; 0 is greedy (the distribution is a point mass, log-prob 0).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: then keep the smallest set of tokens whose probability reaches p, in (0, 1].
      max_new_tokens: at most the response buffer's length.
      stop_ids: [n] tokens that end a response; the stop token belongs to the response.
      pad_id: what fills the tokens behind a response.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    max_new_tokens: Any = 2**30
    stop_ids: Any = struct.field(default_factory=lambda: np.zeros(0, np.int32))
    pad_id: Any = 0


@struct.dataclass
class SamplerState:
    """All that decoding carries.

    Invariants: ``mask[:, :count]`` has been decided; a row is active until its stop token or length limit; ``last`` is
    column ``count - 1`` of ``tokens`` and has not been fed yet; columns from ``prompt_length + count - 1`` on of cache
    and routes are empty.
    """

    count: Int[Array, ""]  # response tokens drawn so far
    active: Bool[Array, "batch"]
    last: Int[Array, "batch"]
    tokens: Int[Array, "batch R"]
    log_probs: Float[Array, "batch R"]
    mask: Bool[Array, "batch R"]
    routes: Routes | None
    caches: list[KeyValues]


def sample_keys(key: Array, global_step: int, prompt_ids: Sequence[int], samples: int, attempt: int = 0) -> Array:
    """Keys [prompts * samples] of responses, row by row the ``samples`` of each prompt. ``key`` carries the run's seed.

    ``prompt_ids`` are unique non-negative numbers below 2^64, one per prompt.
    """
    ids = np.asarray(prompt_ids, np.uint64)
    low, high = (ids & np.uint64(0xFFFFFFFF)).astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)
    return _fold(key, jnp.uint32(global_step), low, high, jnp.uint32(attempt), samples)


@partial(jax.jit, static_argnames="samples")
def _fold(key: Array, step: Array, low: Array, high: Array, attempt: Array, samples: int) -> Array:
    fold = jax.random.fold_in
    of_step = fold(fold(key, step), attempt)
    of_prompt = jax.vmap(lambda a, b: fold(fold(of_step, a), b))(low, high)
    return jax.vmap(lambda k: jax.vmap(partial(fold, k))(jnp.arange(samples)))(of_prompt).reshape(-1)


def keep_mask(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Bool[Array, "batch vocab"]:
    """The support left by top-k, then top-p. Tokens tied with the last kept one are kept as well."""
    batch, vocab = logits.shape
    column = partial(jnp.broadcast_to, shape=(batch,))
    descending = -jnp.sort(-logits, axis=-1)
    k = jnp.where(column(jnp.asarray(sampling.top_k)) > 0, column(jnp.asarray(sampling.top_k)), vocab)
    rank = jnp.arange(vocab)
    in_top_k = rank < jnp.minimum(k, vocab)[:, None]
    probability = jax.nn.softmax(jnp.where(in_top_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # what the more likely tokens hold already
    kept = in_top_k & ((before < column(jnp.asarray(sampling.top_p))[:, None]) | (rank == 0))
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return logits >= lowest


def draw(
    logits: Float[Array, "batch vocab"], keys: Array, position: Int[Array, ""], sampling: Sampling, truncate: bool
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """Draws one token per row, with its log-prob under the distribution it was drawn from (Gumbel's maximum)."""
    batch = logits.shape[0]
    temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), (batch,))[:, None]
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    if truncate:
        scaled = jnp.where(keep_mask(scaled, sampling), scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:]))(keys)
    token = _first_maximum(scaled + jnp.where(greedy, 0.0, noise))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), token[:, None], axis=-1)
    return token, jnp.where(greedy, 0.0, log_prob)[:, 0]


def _first_maximum(x: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """argmax over the last axis. XLA's CPU compiler can take minutes over `jnp.argmax` of a small axis in a loop."""
    index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(x.shape[-1]), x.shape[-1] - 1)
    return index.min(-1)


@partial(jax.jit, static_argnames=("model", "response_length", "samples_per_prompt", "truncate", "record_routes"))
def sample(
    model: Transformer,
    variables: dict,
    prompts: Int[Array, "prompts prompt_length"],
    prompt_mask: Bool[Array, "prompts prompt_length"],
    keys: Array,
    sampling: Sampling,
    *,
    response_length: int,
    samples_per_prompt: int = 1,
    truncate: bool = False,
    record_routes: bool = True,
) -> Rollout:
    """Samples responses y ~ mu. Static are shapes and switches only; all of ``sampling`` is traced.

    Args:
      model: the architecture, with the inference engine's precision and kernels.
      variables: its stored weights, from `quantize.prepare`.
      prompts: right-aligned.
      prompt_mask: True on prompt tokens. A row without any, which only fills up a batch, draws nothing.
      keys: [prompts * samples_per_prompt], from `sample_keys`.
      sampling: temperature, truncation, stop tokens.
      response_length: length of the response buffer; decoding ends early when every row has stopped.
      samples_per_prompt: G; the samples of a prompt share its prefill. Rows of one prompt are adjacent.
      truncate: compile top-k and top-p in; without it they are ignored.
      record_routes: return the routes; a dense model has none.

    Returns:
      The rollout, [prompts * samples_per_prompt] rows.
    """
    prompt_length = prompts.shape[1]
    repeat = partial(jnp.repeat, repeats=samples_per_prompt, axis=0)
    logits, caches, prompt_routes = _prefill(model, variables, prompts, prompt_mask, response_length)
    logits, caches = repeat(logits), jax.tree.map(repeat, caches)
    rows_mask = repeat(prompt_mask)
    limit = jnp.minimum(jnp.asarray(sampling.max_new_tokens), response_length)

    def advance(state: SamplerState, logits: Array) -> SamplerState:
        """Draws the token of column ``count`` for active rows."""
        token, log_prob = draw(logits, keys, state.count, sampling, truncate)
        token = jnp.where(state.active, token, sampling.pad_id)
        stopped = (token[:, None] == sampling.stop_ids).any(-1)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.count, axis=1)
        return replace(
            state,
            count=state.count + 1,
            active=state.active & ~stopped & (state.count + 1 < limit),
            last=token,
            tokens=write(state.tokens, token[:, None]),
            log_probs=write(state.log_probs, masked(log_prob, state.active)[:, None]),
            mask=write(state.mask, state.active[:, None]),
        )

    layers = layer_variables(model.config, variables)
    column_index = jnp.arange(prompt_length + response_length - 1)
    prompt_count = rows_mask.sum(1)
    keyed = jnp.pad(rows_mask, ((0, 0), (0, response_length - 1)), constant_values=True)

    def step(state: SamplerState) -> SamplerState:
        """Feeds the last token of active rows and draws the next."""
        column = prompt_length + state.count - 1
        x, caches, routes = decode_step(
            model,
            layers,
            embed(model, variables, state.last[:, None]),
            (prompt_count + state.count - 1)[:, None],
            (keyed & (column_index <= column))[:, None],
            state.active[:, None],
            state.caches,
            column,
        )
        if state.routes is not None and routes is not None:
            state = replace(state, routes=jax.lax.dynamic_update_slice_in_dim(state.routes, routes, column, 2))
        return advance(replace(state, caches=caches), logits_of(model, variables, finish(model, variables, x[:, 0])))

    rows = rows_mask.shape[0]
    routes = None
    if record_routes and prompt_routes is not None:
        routes = jnp.pad(
            jnp.repeat(prompt_routes, samples_per_prompt, axis=1),
            ((0, 0), (0, 0), (0, response_length - 1), (0, 0)),
            constant_values=jnp.asarray(model.config.num_experts, route_dtype(model.config.num_experts)),
        )
    state = SamplerState(
        count=jnp.int32(0),
        active=rows_mask.any(1),
        last=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, response_length), sampling.pad_id, jnp.int32),
        log_probs=jnp.zeros((rows, response_length), jnp.float32),
        mask=jnp.zeros((rows, response_length), bool),
        routes=routes,
        caches=caches,
    )
    state = jax.lax.while_loop(lambda s: s.active.any(), step, advance(state, logits))
    stopped = (state.mask & (state.tokens[..., None] == sampling.stop_ids).any(-1)).any(1)
    return Rollout(
        tokens=jnp.concatenate([repeat(prompts), state.tokens], axis=1),
        prompt_mask=rows_mask,
        response_mask=state.mask,
        log_probs=state.log_probs,
        truncated=~stopped,
        routes=state.routes,
        temperature=jnp.asarray(sampling.temperature, jnp.float32),
    )


def _prefill(
    model: Transformer, variables: dict, prompts: Array, prompt_mask: Array, response_length: int
) -> tuple[Float[Array, "prompts vocab"], list[KeyValues], Routes | None]:
    """Feeds the prompts: logits of the first response token, caches with room for the response, the prompts' routes."""
    output = forward(model, variables, prompts, prompt_mask)
    logits = logits_of(model, variables, output.hidden[:, -1])

    def with_room(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, 0), (0, response_length - 1), (0, 0)))

    caches = [jax.tree.map(with_room, kv) for kv in depth_first(model.config, output.keys_values)]
    return logits, caches, None if output.routing is None else output.routing.used
