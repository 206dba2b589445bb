"""Continuous batching: a finished response gives its slot to a waiting prompt between bounded rounds of decoding.

The host decides who gets a slot, from two small arrays a round; tokens, log-probs and routes stay on the device. Draws
are those of `sample`: their keys know nothing of slots. On a mesh, slots and results lie over the devices as the
rows of `sample` do, and what the host looks at lies on each device: of several processes every host sees the same, and
decides the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlstab_jax.checks import INT32_MAX
from rlstab_jax.inference.sampler import sample
from rlstab_jax.inference.sampling import Sampling, check_request
from rlstab_jax.inference.slots import (
    Prefill,
    Records,
    Slots,
    decode,
    empty_records,
    empty_responses,
    first_draw,
    prefill,
    put_back,
    resize,
    spare_columns,
    windows,
)
from rlstab_jax.inference.stop_strings import StopStrings
from rlstab_jax.models.config import ModelConfig
from rlstab_jax.models.transformer import Transformer
from rlstab_jax.parallel.distributed import on_host, put
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.types import Poll, Rollout, UserError, route_dtype, undisturbed

ROUND = 16  # steps of decoding between two looks of the host


def sampler_for(stop: StopStrings | None, slots: int = 0, poll: Poll = undisturbed) -> Callable[..., Rollout]:
    """`sample`, or `sample_continuously` where strings end responses or ``slots`` are limited; 0: all are in flight."""
    if stop is None and not slots:
        return sample
    return partial(sample_continuously, slots=slots or INT32_MAX, stop=stop, poll=poll)


def sample_continuously(
    model: Transformer,
    variables: dict,
    prompts: Int[Array | np.ndarray, "prompts prompt_length"],
    prompt_mask: Bool[Array | np.ndarray, "prompts prompt_length"],
    keys: Array,
    sampling: Sampling,
    *,
    response_length: int,
    slots: int,
    samples_per_prompt: int = 1,
    support: int = 0,
    record_routes: bool = True,
    round_length: int = ROUND,
    stop: StopStrings | None = None,
    poll: Poll = undisturbed,
) -> Rollout:
    """Samples as `sample` does, with at most ``slots`` responses in flight, which are begun in their order.

    Arguments are those of `sample`, and besides:
      slots: rows of a decode step.
      round_length: steps between two looks at which slots have finished.
      stop: strings that end a response, besides the stop tokens.
      poll: called between rounds; what it raises ends the sampling.

    Returns:
      The rollout, [prompts * samples_per_prompt] rows in the order of the prompts.

    Raises:
      UserError: as `sample`; no slot, or no step in a round.
    """
    if slots < 1 or round_length < 1:
        raise UserError(f"slots = {slots}, round_length = {round_length}: expected at least 1 of each")
    vocab_size = model.config.vocab_size
    total = check_request(
        prompts, prompt_mask, keys, sampling, samples_per_prompt, response_length, vocab_size, support
    )
    slots = min(slots, total)
    layout = model.layout
    tokens, mask = on_host((prompts, prompt_mask))
    spare = spare_columns(mask)
    queue = _Queue(model, variables, tokens[:, spare:], mask[:, spare:], samples_per_prompt, slots)
    sampling = sampling.per_row(total)
    lengths = round_windows(response_length, round_length)
    state, results = begin_slots(
        model, variables, queue.tokens, queue.mask, sampling, keys, samples_per_prompt, response_length, slots,
        lengths[0], support, record_routes,
    )  # fmt: skip
    rows = np.full(slots, total)  # of the response in each slot; `total` is none
    ends = np.full(total, response_length + 1, np.int32)
    while True:
        for filled, fed, source, into, given in queue.admissions(np.flatnonzero(rows == total)):
            state, results = admit(
                layout, state, results, filled, fed, source, into, given, keys, sampling, response_length, support
            )
            rows[into[given < total]] = given[given < total]
        if (rows == total).all():
            break
        poll()
        before, column = np.asarray(state.count), int(state.column)
        if column + round_length > state.window:
            kept = max(int(before[rows < total].max()) - 1, 0)
            moved = _resize(replace(state, prompt=[]), column - kept, _roomy(lengths, kept, round_length))
            state = replace(moved, prompt=state.prompt)
        state, results = decode_round(model, variables, state, results, rows, support, record_routes, round_length)
        active = np.array(state.active)
        if stop is not None:
            # No more than a string can span, and what the round has drawn: responses are long.
            after, start = np.asarray(state.count), np.maximum(before - stop.reach, 0)
            drawn = np.asarray(_drawn(layout, results, rows, start, stop.reach + round_length))
            for slot in np.flatnonzero(rows < total):
                seen = int(before[slot] - start[slot])
                end = stop.end(drawn[slot, : after[slot] - start[slot]].tolist(), seen)
                if end is not None:
                    ends[rows[slot]], active[slot] = start[slot] + end, False
            state = replace(state, active=_like(state.active, active, layout))
        rows[~active] = total
    results = results if stop is None else _cut(results, ends, sampling.pad_id, model.config)
    return put_back(results, prompts, spare, model.config.num_experts)


class _Queue:
    """The host's view of what waits. Prompts are prefilled in chunks, when the first of their rows gets a slot."""

    def __init__(
        self,
        model: Transformer,
        variables: dict,
        prompts: Int[np.ndarray, "prompts prompt_length"],
        prompt_mask: Bool[np.ndarray, "prompts prompt_length"],
        samples: int,
        slots: int,
    ):
        self.tokens, self.mask = prompts, prompt_mask
        self._model, self._variables, self._samples = model, variables, samples
        self._total, self._next = len(self.tokens) * samples, 0
        self._chunk_prompts = chunk_prompts(slots, samples, model.layout.row_parts)
        self._admitted_at_once = admitted_at_once(slots)
        self._chunk: tuple[int, Prefill | None, np.ndarray] = (-1, None, self.mask[:0])

    def admissions(self, free: np.ndarray):
        """For free slots: a chunk's prefill and mask, and which of its rows go into which slots as which responses.

        The three index arrays have one length always; places not in use hold numbers past the end.
        """
        size, per_chunk = self._admitted_at_once, self._chunk_prompts * self._samples
        while len(free) and self._next < self._total:
            chunk = self._next // per_chunk
            count = min(len(free), size, self._total - self._next, (chunk + 1) * per_chunk - self._next)
            rows = self._next + np.arange(count)
            source = rows // self._samples - chunk * self._chunk_prompts
            spare = (0, size - count)
            yield (
                *self._prefilled(chunk),
                np.pad(source, spare),
                np.pad(free[:count], spare, constant_values=len(self.tokens) * self._samples),
                np.pad(rows, spare, constant_values=self._total),
            )
            self._next, free = self._next + count, free[count:]

    def _prefilled(self, chunk: int) -> tuple[Prefill, np.ndarray]:
        number, filled, mask = self._chunk
        if number != chunk or filled is None:
            share = slice(chunk * self._chunk_prompts, (chunk + 1) * self._chunk_prompts)
            spare = ((0, self._chunk_prompts - len(self.tokens[share])), (0, 0))
            mask = np.pad(self.mask[share], spare)
            filled = _prefill(self._model, self._variables, np.pad(self.tokens[share], spare), mask)
            self._chunk = (chunk, filled, mask)
        return filled, mask


def round_windows(response_length: int, round_length: int = ROUND) -> list[int]:
    """Lengths of the window of columns that all slots share: with room for the youngest beside the oldest."""
    return windows(response_length - 1 + max(round_length, response_length // 4))


def chunk_prompts(slots: int, samples: int, row_parts: int) -> int:
    """Prompts that are prefilled at once: those of as many responses as there are slots, on every device as many."""
    return -(-slots // (samples * row_parts)) * row_parts


def admitted_at_once(slots: int) -> int:
    """Slots that are filled at once, at most."""
    return -(-slots // 4)


_prefill = jax.jit(prefill, static_argnums=0)
_resize = jax.jit(resize, static_argnames="window")


@partial(jax.jit, static_argnums=(0, *range(6, 12)))
def begin_slots(
    model, variables, tokens, mask, sampling, keys, samples, response_length, slots, window, support, record_routes
) -> tuple[Slots, Rollout]:
    """Idle slots, and the buffers of the results, which hold the prompts already."""
    config, rows = model.config, len(tokens) * samples
    shapes = jax.eval_shape(partial(prefill, model), variables, tokens[:1], mask[:1])
    idle = jax.tree.map(lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype), shapes.keys_values)
    none = jnp.zeros(slots, jnp.int32)
    state = Slots(
        keys=keys[none],
        sampling=jax.tree.map(lambda a: a[none], sampling),
        limit=none,
        prompt_mask=jnp.zeros((slots, tokens.shape[1]), bool),
        count=none,
        active=none > 0,
        last=none,
        column=jnp.int32(0),
        prompt=idle,
        response=empty_responses(idle, slots, window),
    )
    empty = empty_records(model, sampling, rows, response_length, support, record_routes)
    routes = None
    if empty.routes is not None:
        shape = (config.num_moe_layers, rows, tokens.shape[1] + response_length - 1, config.experts_per_token)
        routes = jnp.full(shape, config.num_experts, route_dtype(config.num_experts))
    repeat = partial(jnp.repeat, repeats=samples, axis=0)
    results = Rollout(
        tokens=jnp.concatenate([repeat(tokens), empty.tokens], axis=1),
        prompt_mask=repeat(mask),
        response_mask=empty.mask,
        log_probs=empty.log_probs,
        truncated=jnp.ones(rows, bool),
        routes=routes,
        temperature=sampling.temperature,
        support=empty.support,
        minimum=sampling.minimum,
    )
    return _laid_out(model.layout, state, results)


def _laid_out(layout: Layout, state: Slots, results: Rollout) -> tuple[Slots, Rollout]:
    """Slots and results over the devices, as the rows of a batch are; on each of them what the host looks at."""

    def cache(a: Array) -> Array:
        return layout.constrain(a, "batch", "kv_heads", None, None)

    prompt, response = jax.tree.map(cache, (state.prompt, state.response))
    others = layout.constrain_rows(replace(state, prompt=[], response=[]))
    scalars = {"column": layout.constrain(state.column), "before": layout.constrain(jnp.asarray(state.before))}
    everywhere = scalars | {name: layout.constrain(getattr(state, name), None) for name in ("count", "active")}
    return replace(others, prompt=prompt, response=response, **everywhere), layout.constrain_rows(results)


def _like(old: Array, new: np.ndarray, layout: Layout) -> Array:
    """``new`` where ``old`` lies, so that what takes it is not compiled again."""
    return put(new, old.sharding) if layout.splits else jnp.asarray(new)


@partial(jax.jit, static_argnames=("layout", "response_length", "support"), donate_argnames=("state", "results"))
def admit(
    layout: Layout,
    state: Slots,
    results: Rollout,
    filled: Prefill,
    mask: Bool[Array, "prompts prompt_length"],
    source: Int[Array, "n"],
    into: Int[Array, "n"],
    given: Int[Array, "n"],
    keys: Array,
    sampling: Sampling,
    response_length: int,
    support: int,
) -> tuple[Slots, Rollout]:
    """Gives slots ``into`` to responses ``given`` of prompts ``source`` of a chunk, and draws their first tokens."""
    begun = jax.tree.map(lambda a: a.at[given].get(mode="clip"), sampling)
    active = mask[source].any(1) & (begun.max_new_tokens > 0)
    new = Slots(
        keys=keys.at[given].get(mode="clip"),
        sampling=begun,
        limit=jnp.minimum(begun.max_new_tokens, response_length),
        prompt_mask=mask[source],
        count=jnp.zeros_like(given),
        active=active,
        last=begun.pad_id,
        column=state.column,
        prompt=jax.tree.map(lambda a: a[source], filled.keys_values),
        response=[],
    )
    new, first = first_draw(new, filled.logits[source], support)
    old = replace(state, response=[], column=new.column)
    put = jax.tree.map(lambda a, b: a.at[into].set(b, mode="drop") if b.ndim else b, old, new)
    drawn = Records(
        first.token[:, None],
        first.log_prob[:, None],
        active[:, None],
        None,
        None if first.support is None else first.support[:, None],
    )
    results = _collect(results, given, jnp.zeros_like(given), drawn, begun.stop_ids)
    if results.routes is not None and filled.routes is not None:
        routes = results.routes.at[:, given, : mask.shape[1]].set(filled.routes[:, source], mode="drop")
        results = replace(results, routes=routes)
    return _laid_out(layout, replace(put, response=state.response), results)


@partial(
    jax.jit,
    static_argnames=("model", "support", "record_routes", "round_length"),
    donate_argnames=("state", "results"),
)
def decode_round(
    model: Transformer,
    variables: dict,
    state: Slots,
    results: Rollout,
    rows: Int[Array, "slots"],
    support: int,
    record_routes: bool,
    round_length: int,
) -> tuple[Slots, Rollout]:
    """At most ``round_length`` steps of decoding, written to the results of the responses ``rows``."""
    start = state.count
    records = empty_records(model, state.sampling, len(rows), round_length, support, record_routes)
    state, records, _ = decode(model, variables, state, records, jnp.int32(0), jnp.int32(round_length), support)
    return _laid_out(model.layout, state, _collect(results, rows, start, records, state.sampling.stop_ids))


def _collect(
    results: Rollout, rows: Int[Array, "n"], start: Int[Array, "n"], records: Records, stop_ids: Int[Array, "n stops"]
) -> Rollout:
    """Writes records into rows of the results, the first column at response position ``start`` of each."""
    total, prompt_length = results.response_mask.shape[0], results.prompt_length
    row = jnp.where(records.mask, rows[:, None], total)
    position = start[:, None] + jnp.arange(records.mask.shape[1])

    def write(buffer: Array, column: Array, values: Array) -> Array:
        return buffer.at[row, column].set(values, mode="drop")

    stopped = (records.mask & (records.tokens[..., None] == stop_ids[:, None]).any(-1)).any(1)
    written = replace(
        results,
        tokens=write(results.tokens, prompt_length + position, records.tokens),
        log_probs=write(results.log_probs, position, records.log_probs),
        response_mask=write(results.response_mask, position, records.mask),
        truncated=results.truncated.at[jnp.where(stopped, rows, total)].set(False, mode="drop"),
    )
    if results.support is not None and records.support is not None:
        written = replace(written, support=write(results.support, position, records.support))
    if results.routes is not None and records.routes is not None:
        # A step feeds the token that the step before has drawn.
        routes = results.routes.at[:, row, prompt_length + position - 1].set(records.routes, mode="drop")
        written = replace(written, routes=routes)
    return written


def _roomy(lengths: Sequence[int], kept: int, round_length: int) -> int:
    """The shortest window with room for a while: moving costs a copy of it."""
    fits = [length for length in lengths if kept + max(round_length, length // 4) <= length]
    return fits[0] if fits else lengths[-1]


@partial(jax.jit, static_argnums=(0, 4))
def _drawn(
    layout: Layout, results: Rollout, rows: Int[Array, "slots"], start: Int[Array, "slots"], count: int
) -> Int[Array, "slots count"]:
    """Tokens of responses ``rows`` from position ``start`` on, for the host: on each device."""
    columns = results.prompt_length + start[:, None] + jnp.arange(count)
    return layout.constrain(results.tokens.at[rows[:, None], columns].get(mode="clip"), None, None)


@partial(jax.jit, static_argnames="config", donate_argnames="results")
def _cut(results: Rollout, ends: Int[Array, "rows"], pad_id: Int[Array, "rows"], config: ModelConfig) -> Rollout:
    """Leaves the first ``ends`` tokens of each response, as if no more had been drawn. Uncut ones end past the last."""
    length, prompt_length = results.response_length, results.prompt_length
    inside = jnp.arange(length) < ends[:, None]
    tokens = jnp.where(inside, results.tokens[:, prompt_length:], pad_id[:, None])
    cut = replace(
        results,
        tokens=jnp.concatenate([results.tokens[:, :prompt_length], tokens], axis=1),
        response_mask=results.response_mask & inside,
        log_probs=jnp.where(inside, results.log_probs, 0.0),
        truncated=results.truncated & (ends > length),
    )
    if results.support is not None:
        cut = replace(cut, support=jnp.where(inside[..., None], results.support, config.vocab_size))
    if results.routes is not None:
        fed = cut.fed_mask[..., None]
        cut = replace(cut, routes=jnp.where(fed, results.routes, jnp.asarray(config.num_experts, results.routes.dtype)))
    return cut
