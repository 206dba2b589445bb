"""Matched mode: one batch-invariant program samples responses and scores them, equal bit for bit.

Elsewhere decoding and scoring are two programs, whose sums run in different orders: their log-probs differ by 1e-6 in
float32. Here both are one pass, a row at a time and a token at a time, through the block of a decode step. Nothing in a
row's numbers depends on other rows or on how many there are, so that mu_old and pi_old are equal exactly, and what
remains between pi_theta and mu_old is staleness. It costs the speed of batching.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.inference.sampling import Sampling, check_request, distribution, draw
from rlstab_jax.inference.slots import empty_responses, prefill
from rlstab_jax.models.by_layer import layers_of
from rlstab_jax.models.decode import decode_step
from rlstab_jax.models.layers import KeyValues, Past, rotations
from rlstab_jax.models.transformer import Transformer, embed, finish, logits_of
from rlstab_jax.types import Rollout, Routes, route_dtype


@struct.dataclass
class MatchedPass:
    """A policy's view of its rows, the same whether it sampled them or scored them.

    Attributes:
      rollout: tokens, masks, log-probs, support and the routes in use.
      entropy: of the distribution drawn from, on each prefix, nats.
      live, margin, router: as in `models.layers.Routing`; None for a dense model.
    """

    rollout: Rollout
    entropy: Float[Array, "rows R"]
    live: Routes | None
    margin: Float[Array, "layer rows fed"] | None
    router: Float[Array, "layer rows fed k"] | None


def sample_matched(
    model: Transformer,
    variables: dict,
    prompts: Int[Array | np.ndarray, "prompts prompt_length"],
    prompt_mask: Bool[Array | np.ndarray, "prompts prompt_length"],
    keys: Array,
    sampling: Sampling,
    *,
    response_length: int,
    samples_per_prompt: int = 1,
    support: int = 0,
) -> Rollout:
    """`sample`, with log-probs and routes that `score_matched` at the same weights gives again, bit for bit."""
    vocab_size = model.config.vocab_size
    rows = check_request(prompts, prompt_mask, keys, sampling, samples_per_prompt, response_length, vocab_size, support)
    repeat = partial(jnp.repeat, repeats=samples_per_prompt, axis=0)
    none = jnp.full((rows, response_length), -1, jnp.int32)
    kept = jnp.full((rows, response_length, min(support, model.config.vocab_size)), -1, jnp.int32) if support else None
    routes = _live(model, rows, np.shape(prompts)[1] + response_length - 1)
    return matched_pass(
        model, variables, repeat(prompts), repeat(prompt_mask), keys, sampling.per_row(rows), none, kept, routes
    ).rollout


def score_matched(
    model: Transformer, variables: dict, rollout: Rollout, sampling: Sampling, routes: Routes | None = None
) -> MatchedPass:
    """Scores a rollout of `sample_matched`, drawn with ``sampling``, over its support; replays ``routes``, or routes
    live."""
    rows, prompt_length = rollout.prompt_mask.shape
    given = jnp.where(rollout.response_mask, rollout.tokens[:, prompt_length:], -1)
    keys = jax.random.split(jax.random.key(0), rows)  # nothing is drawn
    scored = matched_pass(
        model,
        variables,
        rollout.tokens[:, :prompt_length],
        rollout.prompt_mask,
        keys,
        replace(sampling.per_row(rows), max_new_tokens=rollout.response_mask.sum(1)),
        given,
        rollout.support,
        _live(model, rows, rollout.fed_mask.shape[1]) if routes is None else routes,
    )
    return replace(scored, rollout=replace(scored.rollout, truncated=rollout.truncated))


def _live(model: Transformer, rows: int, fed: int) -> Routes:
    config = model.config
    shape = (config.num_moe_layers, rows, fed, config.experts_per_token)
    return jnp.full(shape, config.num_experts, route_dtype(config.num_experts))


@partial(jax.jit, static_argnames="model")
def matched_pass(
    model: Transformer,
    variables: dict,
    prompts: Int[Array, "rows prompt_length"],
    prompt_mask: Bool[Array, "rows prompt_length"],
    keys: Array,
    sampling: Sampling,
    given: Int[Array, "rows R"],
    kept: Int[Array, "rows R K"] | None,
    routes: Routes,
) -> MatchedPass:
    """Feeds each row's prompt and response; where a response token is not ``given`` (-1), draws it.

    With a ``kept``, distributions are truncated to at most K tokens: to those given, or else (-1) as ``sampling`` asks.
    """
    row = partial(_row, model, variables, layers_of(variables))
    out = jax.lax.map(
        lambda arguments: row(*arguments),
        (prompts, prompt_mask, keys, sampling, given, kept, jnp.moveaxis(routes, 1, 0)),
    )
    by_layer = {name: jnp.moveaxis(out[name], 0, 1) for name in ("used", "live", "margin", "router") if name in out}
    ends = (out["tokens"][..., None] == sampling.stop_ids[:, None]).any(-1) & out["mask"]
    rollout = Rollout(
        tokens=jnp.concatenate([prompts, out["tokens"]], axis=1),
        prompt_mask=prompt_mask,
        response_mask=out["mask"],
        log_probs=out["log_probs"],
        truncated=~ends.any(1),
        routes=by_layer.get("used"),
        temperature=sampling.temperature,
        support=out.get("support"),
        minimum=sampling.minimum,
    )
    return MatchedPass(rollout, out["entropy"], by_layer.get("live"), by_layer.get("margin"), by_layer.get("router"))


def _row(
    model: Transformer,
    variables: dict,
    layers: list[dict],
    prompt: Int[Array, "prompt_length"],
    prompt_mask: Bool[Array, "prompt_length"],
    key: Array,
    sampling: Sampling,
    given: Int[Array, "R"],
    kept: Int[Array, "R K"] | None,
    routes: Int[Array, "layer fed k"],
) -> dict[str, Array]:
    """One row from its first prompt token to its last response token."""
    prompt_length, length = prompt.shape[0], given.shape[0]
    columns, first = jnp.arange(prompt_length + length - 1), prompt_length - prompt_mask.sum()
    turns = rotations(columns.size, model.config)
    sampling = jax.tree.map(lambda a: a[None], sampling)
    limit = jnp.minimum(sampling.max_new_tokens[0], length)
    shapes = jax.eval_shape(partial(prefill, model), variables, prompt[None], prompt_mask[None]).keys_values
    no_prompt, nothing = empty_responses(shapes, 1, 0), jnp.zeros((1, 0), bool)

    def step(carry: tuple[Array, Array, list[KeyValues], dict[str, Array]]) -> Any:
        column, _, windows, out = carry
        seen = ((columns >= first) & (columns <= column))[None]  # the columns before are padding
        pasts = [Past(p, kv, nothing, seen, column) for p, kv in zip(no_prompt, windows, strict=True)]
        token = jnp.concatenate([prompt, out["tokens"]])[column]
        x, pasts, routing = decode_step(
            model,
            layers,
            embed(model, variables, token[None]),
            turns.at((column - first)[None, None]),
            jnp.ones(1, bool),
            pasts,
            jax.lax.dynamic_slice_in_dim(routes, column, 1, 1)[:, None] if routes.shape[0] else None,
        )
        if routing is not None:
            new = {"used": routing.used, "live": routing.live, "margin": routing.margin, "router": routing.log_probs}
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=1)
            out = out | {name: write(out[name], value[:, 0]) for name, value in new.items()}
        logits = logits_of(model, variables, finish(model, variables, x))
        position = column + 1 - prompt_length  # of the response token that is drawn from these
        active = (position >= 0) & (position < limit)
        token, response = _draw_or_read(logits, key, position, sampling, given, kept)
        out = {
            name: jnp.where(active, jax.lax.dynamic_update_index_in_dim(a, response[name], position, 0), a)
            if name in response
            else a
            for name, a in out.items()
        }
        stopped = active & (token == sampling.stop_ids[0]).any()
        return column + 1, (position < limit - 1) & ~stopped, [past.response for past in pasts], out

    going = prompt_mask.any() & (limit > 0)
    state = (first, going, empty_responses(shapes, 1, len(columns)), _outputs(model, sampling, length, routes, kept))
    return jax.lax.while_loop(lambda carry: carry[1], step, state)[-1]


def _draw_or_read(
    logits: Float[Array, "1 vocab"],
    key: Array,
    position: Int[Array, ""],
    sampling: Sampling,
    given: Int[Array, "R"],
    kept: Int[Array, "R K"] | None,
) -> tuple[Int[Array, ""], dict[str, Array]]:
    """The given token or else a new one, and what is recorded of it, by the names of `_outputs`."""
    support, vocab, place = 0 if kept is None else kept.shape[-1], logits.shape[1], jnp.maximum(position, 0)
    drawn = draw(logits, key[None], position[None], sampling, support)
    recorded = None if kept is None else kept[place][None]
    scaled, ids = distribution(logits, position[None], sampling, support, recorded)
    log_probs = jax.nn.log_softmax(scaled[0])
    read = given[place]
    token = jnp.where(read >= 0, read, drawn.token[0])
    of_token = (jnp.arange(vocab) if ids is None else ids[0]) == token
    possible = log_probs > -jnp.inf
    entropy = -jnp.sum(jnp.where(possible, jnp.exp(log_probs) * jnp.where(possible, log_probs, 0.0), 0.0))
    log_prob = jnp.sum(jnp.where(of_token, log_probs, 0.0))
    greedy = sampling.temperature[0] == 0
    log_prob, entropy = jnp.where(greedy, 0.0, log_prob), jnp.where(greedy, 0.0, entropy)
    response = {"tokens": token, "mask": jnp.bool_(True), "log_probs": log_prob, "entropy": entropy}
    return token, response if ids is None else response | {"support": jnp.where(possible, ids[0], vocab)}


def _outputs(
    model: Transformer,
    sampling: Sampling,
    length: int,
    routes: Int[Array, "layer fed k"],
    kept: Int[Array, "R K"] | None,
) -> dict[str, Array]:
    """What a row records, before it has begun."""
    out = {
        "tokens": jnp.broadcast_to(sampling.pad_id, (length,)),
        "mask": jnp.zeros(length, bool),
        "log_probs": jnp.zeros(length, jnp.float32),
        "entropy": jnp.zeros(length, jnp.float32),
    }
    if kept is not None:
        out["support"] = jnp.full_like(kept, model.config.vocab_size)
    if routes.shape[0]:
        none = jnp.full_like(routes, model.config.num_experts)
        zeros = jnp.zeros(routes.shape, jnp.float32)
        out |= {"used": none, "live": none, "margin": zeros[..., 0], "router": zeros}
    return out
