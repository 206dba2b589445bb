"""Prefill and decode over slots, each of which holds one response at a time: what every way of sampling is made of."""

from dataclasses import replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.inference.sampling import Draw, Sampling, draw
from rlstab_jax.models.by_layer import by_layer, layers_of
from rlstab_jax.models.decode import decode_step
from rlstab_jax.models.layers import KeyValues, Past, rotations
from rlstab_jax.models.transformer import Transformer, embed, finish, forward, logits_of
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.types import Rollout, Routes, masked, route_dtype


@struct.dataclass
class Prefill:
    """What feeding the prompts gave: logits of the first response token, keys and values of each layer, routes."""

    logits: Float[Array, "prompts vocab"]
    keys_values: list[KeyValues]
    routes: Routes | None


@struct.dataclass
class Slots:
    """All that decoding carries.

    Keys and values of the tokens that a slot has fed lie in the ``count - 1`` columns of its window before ``column``,
    which is the same for all slots: each step writes one column of all rows at once. ``last`` has been drawn and not
    been fed. An inactive slot is never dispatched; its numbers mean nothing.

    Attributes:
      count: response tokens drawn so far, of which ``last`` is the last.
      limit: of ``count``.
      before: response tokens that lie in the prompts, drawn by other weights; counted in the keys of the draws alone.
      prompt: keys and values of the prompts, [prompts, ...] for each layer; the rows of a prompt are adjacent.
      response: keys and values of the responses' windows, [slots, ...] for each layer.
    """

    keys: Array
    sampling: Sampling  # per row
    limit: Int[Array, "slots"]
    prompt_mask: Bool[Array, "prompts prompt_length"]
    count: Int[Array, "slots"]
    active: Bool[Array, "slots"]
    last: Int[Array, "slots"]
    column: Int[Array, ""]
    prompt: list[KeyValues]
    response: list[KeyValues]
    before: Int[Array, ""] | int = struct.field(default_factory=lambda: jnp.int32(0))

    @property
    def window(self) -> int:
        return self.response[0].v.values.shape[2]


@struct.dataclass
class Records:
    """What some steps of decoding did, a column a step: the token fed has its routes, the token drawn the rest.

    Outside ``mask`` a column says nothing: pad tokens, log-prob 0, the sentinels of routes and support.
    """

    tokens: Int[Array, "slots steps"]
    log_probs: Float[Array, "slots steps"]
    mask: Bool[Array, "slots steps"]
    routes: Routes | None
    support: Int[Array, "slots steps K"] | None


def prefill(
    model: Transformer,
    variables: dict,
    prompts: Int[Array, "prompts prompt_length"],
    prompt_mask: Bool[Array, "prompts prompt_length"],
) -> Prefill:
    """Feeds right-aligned prompts."""
    output = forward(model, by_layer(variables), prompts, prompt_mask)
    logits = logits_of(model, variables, output.hidden[:, -1])
    assert output.keys_values is not None
    return Prefill(logits, output.keys_values, None if output.routing is None else output.routing.used)


def empty_responses(prompt: list[KeyValues], slots: int, window: int) -> list[KeyValues]:
    """Windows without tokens, in the format of the prompts' keys and values."""

    def empty(a: Array, axis: int) -> Array:
        return jnp.zeros((slots, *a.shape[1:axis], window, *a.shape[axis + 1 :]), a.dtype)

    return [layer.over_time(empty) for layer in prompt]


def empty_records(
    model: Transformer, sampling: Sampling, slots: int, steps: int, support: int, record_routes: bool
) -> Records:
    """Records of steps that have not happened."""
    config = model.config
    narrow = route_dtype(config.num_experts)
    routes = (config.num_moe_layers, slots, steps, config.experts_per_token)
    records = Records(
        tokens=jnp.broadcast_to(sampling.pad_id[:, None], (slots, steps)),
        log_probs=jnp.zeros((slots, steps), jnp.float32),
        mask=jnp.zeros((slots, steps), bool),
        routes=jnp.full(routes, config.num_experts, narrow) if record_routes and config.num_moe_layers else None,
        support=jnp.full((slots, steps, min(support, config.vocab_size)), config.vocab_size) if support else None,
    )
    return cast(Records, model.layout.constrain_rows(records))


def first_draw(slots: Slots, logits: Float[Array, "slots vocab"], support: int) -> tuple[Slots, Draw]:
    """Draws a token for each active slot; what inactive ones draw is padding, with log-prob 0."""
    drawn = draw(logits, slots.keys, slots.count + slots.before, slots.sampling, support)
    token = jnp.where(slots.active, drawn.token, slots.sampling.pad_id)
    count = slots.count + slots.active
    stopped = (token[:, None] == slots.sampling.stop_ids).any(-1)
    after = replace(slots, count=count, last=token, active=slots.active & ~stopped & (count < slots.limit))
    kept = drawn.support
    if kept is not None:
        kept = jnp.where(slots.active[:, None], kept, logits.shape[-1])
    return after, Draw(token, masked(drawn.log_prob, slots.active), kept)


def decode(
    model: Transformer,
    variables: dict,
    slots: Slots,
    records: Records,
    start: Int[Array, ""],
    stop: Int[Array, ""] | int,
    support: int,
) -> tuple[Slots, Records, Int[Array, ""]]:
    """Steps until ``stop`` or until no slot is active; step i, from ``start`` on, is column i of the records.

    The window must have room for them. Returns the number of the step that was not made any more as well.
    """
    layers = layers_of(variables)
    prompt_count = _by_row(slots.prompt_mask.sum(1), slots)
    window = jnp.arange(slots.window)
    turns = rotations(slots.prompt_mask.shape[1] + slots.window, model.config)

    def step(carry: tuple[Slots, Records, Array]) -> tuple[Slots, Records, Array]:
        slots, records, i = carry
        age = slots.column - window  # of what lies in each column, in steps
        pasts = [
            Past(prompt, response, slots.prompt_mask, (age >= 0) & (age < slots.count[:, None]), slots.column)
            for prompt, response in zip(slots.prompt, slots.response, strict=True)
        ]
        x = embed(model, variables, slots.last)
        turn = turns.at((prompt_count + slots.count - 1)[:, None])
        x, pasts, routing = decode_step(model, layers, x, turn, slots.active, pasts)
        active = slots.active
        slots = replace(slots, response=[past.response for past in pasts], column=slots.column + 1)
        slots, drawn = first_draw(slots, logits_of(model, variables, finish(model, variables, x)), support)
        return slots, _record(records, i, drawn, active, None if routing is None else routing.used), i + 1

    def going(carry: tuple[Slots, Records, Array]) -> Array:
        slots, _, i = carry
        return slots.active.any() & (i < stop)

    return jax.lax.while_loop(going, step, (slots, records, start))


def _record(records: Records, i: Array, drawn: Draw, active: Array, routes: Array | None) -> Records:
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=1)
    recorded = replace(
        records,
        tokens=write(records.tokens, drawn.token[:, None]),
        log_probs=write(records.log_probs, drawn.log_prob[:, None]),
        mask=write(records.mask, active[:, None]),
    )
    if records.routes is not None and routes is not None:
        recorded = replace(recorded, routes=jax.lax.dynamic_update_slice_in_dim(records.routes, routes, i, 2))
    if records.support is not None and drawn.support is not None:
        recorded = replace(recorded, support=write(records.support, drawn.support[:, None]))
    return recorded


def _by_row(of_prompt: Array, slots: Slots) -> Array:
    return jnp.repeat(of_prompt, slots.count.shape[0] // of_prompt.shape[0], axis=0)


def resize(state: Slots, start: Int[Array, ""] | int, window: int) -> Slots:
    """A window of another length that begins at column ``start`` of the old one."""

    def cut(a: Array, axis: int) -> Array:
        padding = [(0, window if i == axis else 0) for i in range(a.ndim)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(a, padding), start, window, axis)

    return replace(state, response=[layer.over_time(cut) for layer in state.response], column=state.column - start)


def windows(steps: int) -> list[int]:
    """Lengths of the response window, each about twice the last: attention reads what is there, not what may come.

    The last one has room for all steps. Long ones are multiples of 128: kernels of TPUs would pad others, which copies
    the cache, at each step.
    """
    lengths = [steps]
    while lengths[0] > SHORTEST_WINDOW and len(lengths) < 5:
        lengths.insert(0, -(-lengths[0] // 2))
    return [-(-length // 128) * 128 if length > 1000 else length for length in lengths]


def spare_columns(prompt_mask: Bool[np.ndarray | Array, "prompts prompt_length"]) -> int:
    """Columns at the left that no prompt of the batch needs, so that one of a few lengths is left: each half the last.

    One program is compiled for each length that occurs. A traced mask is not looked at.
    """
    length = prompt_mask.shape[1]
    if isinstance(prompt_mask, jax.core.Tracer):
        return 0
    longest = int(on_host(prompt_mask).sum(1).max())
    bucket = length
    while bucket > SHORTEST_PROMPT and (bucket + 1) // 2 >= longest:
        bucket = (bucket + 1) // 2
    return length - bucket


def put_back(
    rollout: Rollout, prompts: Int[Array | np.ndarray, "prompts prompt_length"], spare: int, num_experts: int
) -> Rollout:
    """The columns that `spare_columns` took away."""
    if not spare:
        return rollout
    repeats = rollout.tokens.shape[0] // prompts.shape[0]
    routes = rollout.routes
    if routes is not None:
        routes = jnp.pad(routes, ((0, 0), (0, 0), (spare, 0), (0, 0)), constant_values=num_experts)
    return replace(
        rollout,
        tokens=jnp.concatenate([jnp.repeat(prompts[:, :spare], repeats, axis=0), rollout.tokens], axis=1),
        prompt_mask=jnp.pad(rollout.prompt_mask, ((0, 0), (spare, 0))),
        routes=routes,
    )


SHORTEST_PROMPT = 64  # below it, and for the windows below, another program costs more to compile than it saves
SHORTEST_WINDOW = 32
