"""How a token is drawn: the keys, the truncated support, and the log-prob under the very distribution drawn from."""

import operator
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.checks import HUGE, INT32_MAX, TINY, check_range
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.types import MinimalLength, UserError


@struct.dataclass
class Sampling:
    """How tokens are drawn: all traced, each a scalar or one number per row.

    Truncation is compiled in where the sampler is given a ``support``, a static bound on the tokens that are kept, and
    is refused without one. Its order: temperature, top-k, top-p over what is left, min-p. A uniform distribution is
    mixed in last, over the tokens that are left; compiled in unless ``uniform`` is None.

    Attributes:
      temperature: divides the logits; 0 is greedy (the distribution is a point mass, log-prob 0). Else at least 1e-6
        (``COLDEST``).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: then keep the smallest set of tokens whose probability reaches p, in (0, 1].
      min_p: then keep tokens at least this many times as likely as the likeliest, in [0, 1].
      uniform: share u, in [0, 1], of the mixture mu = (1 - u) softmax + u U, with U uniform over the tokens that may be
        drawn; 0 changes nothing, and neither does any u at temperature 0. None for all rows: no mixture.
      min_new_tokens: no stop token is drawn before so many others. Log-probs are of the tokens that are left. None for
        all rows: no minimum.
      max_new_tokens: at most the response buffer's length; 0 draws nothing.
      stop_ids: [n] or [rows, n] tokens that end a response; the stop token belongs to the response. Where rows have
        lists of unequal length, repeat an id.
      pad_id: what fills the tokens behind a response.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    uniform: Any = None
    min_new_tokens: Any = None
    max_new_tokens: Any = 2**30
    stop_ids: Any = struct.field(default_factory=lambda: np.zeros(0, np.int32))
    pad_id: Any = 0

    def per_row(self, rows: int) -> "Sampling":
        """The same with one number, or one list of stop tokens, for each of ``rows`` rows."""

        def spread(name: str, dtype: jnp.dtype) -> Array | None:
            if getattr(self, name) is None:
                return None
            x = jnp.asarray(getattr(self, name), dtype)
            return jnp.broadcast_to(x, (rows, *x.shape[-1:]) if name == "stop_ids" else (rows,))

        return Sampling(**{field.name: spread(field.name, _DTYPES[field.name]) for field in fields(self)})

    @property
    def minimum(self) -> MinimalLength | None:
        """What a rollout says of ``min_new_tokens``, where these numbers are `per_row`."""
        return None if self.min_new_tokens is None else MinimalLength(self.min_new_tokens, self.stop_ids)

    def validate(self, rows: int) -> None:
        """Raises UserError for what is no number, numbers outside their range or of another count than ``rows``; traced
        ones pass."""
        for name in _DTYPES:
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer) or (value is None and name in ("uniform", "min_new_tokens")):
                continue
            value = _numbers(name, value)
            if name == "stop_ids":
                _check_stop_ids(value, rows)
            elif value.shape not in ((), (rows,)):
                raise UserError(
                    f"sampling.{name}: shape {value.shape}, expected a number, or one for each of {rows} rows"
                )
            elif name == "temperature":
                check_temperature("sampling.temperature", value)
            elif name in RANGES:
                check_range(f"sampling.{name}", value, RANGES[name])


def _numbers(name: str, value: Any) -> np.ndarray:
    """A field of `Sampling` as an array. Raises UserError unless it is one of numbers, whole ones where the field's
    dtype would cut others."""
    whole = _DTYPES[name] == jnp.int32
    expected = "whole numbers" if whole else "numbers"
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError) as error:  # such as lists of unequal lengths
        raise UserError(f"sampling.{name}: expected {expected}: {error}") from error
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    if numbers.size and not any(jnp.issubdtype(numbers.dtype, kind) for kind in kinds):
        [first] = numbers.ravel()[:1].tolist()
        raise UserError(f"sampling.{name} = {first!r} ({type(first).__name__}): expected {expected}")
    return numbers


def _check_stop_ids(stops: np.ndarray, rows: int) -> None:
    """Raises UserError for another shape than [n] or [rows, n], and for negative numbers."""
    if not (stops.ndim == 1 or (stops.ndim == 2 and len(stops) == rows)):
        raise UserError(f"sampling.stop_ids: shape {stops.shape}, expected [n], or [{rows}, n] for each row")
    if stops.size and stops.min() < 0:
        raise UserError(f"sampling.stop_ids = {stops.min()}: expected token ids; fill up short lists with an id twice")


_DTYPES: dict[str, Any] = {
    "temperature": jnp.float32, "top_p": jnp.float32, "min_p": jnp.float32, "uniform": jnp.float32,
    "top_k": jnp.int32, "pad_id": jnp.int32,
    "min_new_tokens": jnp.int32, "max_new_tokens": jnp.int32, "stop_ids": jnp.int32,
}  # fmt: skip
COLDEST = 1e-6
"""The least temperature above 0. Where a program computes a quotient by it twice, the two may differ in the last bit,
and the exponential of that difference must be finite. It is for logits of some hundreds; at 1e-8 it is not for 50."""
RANGES = {
    "top_k": (0, INT32_MAX, "0 (all) or more"),
    "top_p": (TINY, 1.0, "above 0, at most 1"),
    "min_p": (0.0, 1.0, "from 0 (all) to 1"),
    "uniform": (0.0, 1.0, "from 0 (no mixture) to 1"),
    "min_new_tokens": (0, INT32_MAX, "0 or more"),
    "max_new_tokens": (0, INT32_MAX, "0 or more"),
}


def check_temperature(name: str, value: Any) -> None:
    """Raises UserError if a temperature, or one of an array's, is neither 0 nor finite and at least ``COLDEST``."""
    expected = f"0 (greedy), or at least {COLDEST:g} and finite: log-probs of colder draws may be infinite"
    check_range(name, np.where(np.equal(value, 0), COLDEST, value), (COLDEST, HUGE, expected))


def sample_keys(key: Array, global_step: int, prompt_ids: Sequence[int], samples: int, attempt: int = 0) -> Array:
    """Keys [prompts * samples] of responses, row by row the ``samples`` of each prompt. ``key`` carries the run's seed.

    ``prompt_ids`` are unique non-negative numbers below 2^64, one per prompt. Raises UserError for other ids, and for a
    step, an attempt or a count of samples that is no whole number below 2^32; tracers pass.
    """
    try:
        ids = np.asarray([operator.index(number) for number in prompt_ids], np.uint64)
    except (OverflowError, TypeError) as error:
        raise UserError(f"prompt_ids: expected whole numbers from 0 to below 2^64: {error}") from error
    _check_whole("global_step", global_step, 0)
    _check_whole("attempt", attempt, 0)
    _check_whole("samples", samples, 1)
    low, high = (ids & np.uint64(0xFFFFFFFF)).astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)
    return _fold(key, jnp.uint32(global_step), low, high, jnp.uint32(attempt), samples)


def _check_whole(name: str, value: Any, least: int) -> None:
    """Raises UserError unless ``value`` is a whole number from ``least`` to below 2^32; tracers pass."""
    if isinstance(value, jax.core.Tracer):
        return
    expected = f"a whole number from {least} to below 2^32"
    try:
        check_range(name, operator.index(value), (least, 2**32 - 1, expected))
    except TypeError:
        raise UserError(f"{name} = {value!r}: expected {expected}") from None


@partial(jax.jit, static_argnames="samples")
def _fold(key: Array, step: Array, low: Array, high: Array, attempt: Array, samples: int) -> Array:
    fold = jax.random.fold_in
    of_step = fold(fold(key, step), attempt)
    of_prompt = jax.vmap(lambda a, b: fold(fold(of_step, a), b))(low, high)
    return jax.vmap(lambda k: jax.vmap(partial(fold, k))(jnp.arange(samples)))(of_prompt).reshape(-1)


@struct.dataclass
class Draw:
    """One token a row, its log-prob, and the ids of the ``K`` tokens it was drawn from at most (None: all).

    Places that a row's support does not use hold the vocabulary's size.
    """

    token: Int[Array, "rows"]
    log_prob: Float[Array, "rows"]
    support: Int[Array, "rows K"] | None


def draw(
    logits: Float[Array, "rows vocab"], keys: Array, position: Int[Array, "rows"], sampling: Sampling, support: int
) -> Draw:
    """Draws by Gumbel's maximum. ``sampling`` is per row; ``support`` bounds the tokens kept, 0 truncates nothing."""
    vocab = logits.shape[-1]
    scaled, ids = distribution(logits, position, sampling, support)
    noise = jax.vmap(lambda key, p: jax.random.gumbel(jax.random.fold_in(key, p), (vocab,)))(keys, position)
    noise = noise if ids is None else jnp.take_along_axis(noise, ids, axis=-1)
    greedy = sampling.temperature == 0
    choice = _first_maximum(scaled + jnp.where(greedy[:, None], 0.0, noise))[:, None]
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis=-1), choice, axis=-1)[:, 0]
    log_prob = jnp.where(greedy, 0.0, log_prob)
    if ids is None:
        return Draw(choice[:, 0], log_prob, None)
    kept = jnp.where(scaled > -jnp.inf, ids, vocab)
    return Draw(jnp.take_along_axis(ids, choice, axis=-1)[:, 0], log_prob, kept)


def distribution(
    logits: Float[Array, "rows vocab"],
    position: Int[Array, "rows"],
    sampling: Sampling,
    support: int,
    kept: Int[Array, "rows n"] | None = None,
) -> tuple[Float[Array, "rows n"], Int[Array, "rows n"] | None]:
    """What is drawn from: logits at the temperature, or log-probs of a mixture; -inf for tokens that are not kept. And
    the ids of these columns (None: all tokens).

    ``kept``: a support recorded of another policy's draw, in the place of this one's likeliest tokens; -1: none was.
    """
    rows, vocab = logits.shape
    temperature = sampling.temperature[:, None]
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
    if sampling.min_new_tokens is not None:
        early = jnp.where(position < sampling.min_new_tokens, -jnp.inf, 0.0)[:, None]
        scaled = scaled.at[jnp.arange(rows)[:, None], sampling.stop_ids].add(early, mode="drop")
    whole = scaled
    scaled, ids = _truncate(whole, sampling, min(support, vocab)) if support else (whole, None)
    if kept is not None and ids is not None:
        there = jnp.take_along_axis(whole, jnp.clip(kept, 0, vocab - 1), axis=-1)
        recorded = (kept >= 0).all(-1, keepdims=True)
        scaled = jnp.where(recorded, jnp.where(kept < vocab, there, -jnp.inf), scaled)
        ids = jnp.where(recorded, kept, ids)
    return scaled if sampling.uniform is None else _mixed(scaled, sampling), ids


def _mixed(scaled: Float[Array, "rows n"], sampling: Sampling) -> Float[Array, "rows n"]:
    """log((1 - u) softmax + u / n) over the n tokens of a row that are above -inf; as it is where nothing is mixed."""
    possible, uniform = scaled > -jnp.inf, sampling.uniform[:, None]
    mixes = (uniform > 0) & (sampling.temperature > 0)[:, None]
    of_uniform = jnp.log(uniform / possible.sum(-1, keepdims=True))
    mixed = jnp.logaddexp(jnp.log1p(-uniform) + jax.nn.log_softmax(scaled), of_uniform)
    return jnp.where(possible & mixes, mixed, scaled)


def _truncate(
    scaled: Float[Array, "rows vocab"], sampling: Sampling, support: int
) -> tuple[Float[Array, "rows K"], Int[Array, "rows K"]]:
    """The K likeliest tokens in descending order: their logits, -inf where they are not kept, and their ids."""
    top, ids = jax.lax.top_k(scaled, support)
    k = sampling.top_k[:, None]
    in_top_k = jnp.where(k > 0, jnp.arange(support) < k, True)
    # Without top-k the mass is the whole vocabulary's, also of tokens beyond the bound.
    of_top_k = jax.nn.logsumexp(jnp.where(in_top_k, top, -jnp.inf), axis=-1, keepdims=True)
    normaliser = jnp.where(k > 0, of_top_k, jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    probability = jnp.where(in_top_k, jnp.exp(top - normaliser), 0.0)
    before = jnp.cumsum(probability, axis=-1) - probability  # what the more likely tokens hold already
    p = sampling.top_p[:, None]
    in_top_p = (before < p) | (p >= 1)  # all of it is all of it, however the sum was rounded
    kept = in_top_k & in_top_p & (top - top[:, :1] >= jnp.log(sampling.min_p)[:, None])
    return jnp.where(kept | (jnp.arange(support) == 0), top, -jnp.inf), ids


def _first_maximum(x: Float[Array, "rows n"]) -> Int[Array, "rows"]:
    """argmax over the last axis. XLA's CPU compiler can take minutes over `jnp.argmax` of a small axis in a loop."""
    index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(x.shape[-1]), x.shape[-1] - 1)
    return index.min(-1)


def check_request(
    prompts: Int[ArrayLike, "prompts prompt_length"],
    prompt_mask: Bool[ArrayLike, "prompts prompt_length"],
    keys: Array,
    sampling: Sampling,
    samples_per_prompt: int,
    response_length: int,
    vocab_size: int,
    support: int,
) -> int:
    """The number of responses that are asked for. Raises UserError for what no sampler can answer."""
    check_prompts(prompts, prompt_mask, vocab_size)
    if response_length < 1 or samples_per_prompt < 1:
        lengths = f"response_length = {response_length}, samples_per_prompt = {samples_per_prompt}"
        raise UserError(f"{lengths}: expected at least 1 of each")
    if support < 0:
        raise UserError(f"support = {support}: expected 0 (truncates nothing), or how many tokens are kept at most")
    rows = np.shape(prompts)[0] * samples_per_prompt
    sampling.validate(rows)
    _check_tokens(sampling, vocab_size)
    _check_truncation(sampling, vocab_size, support)
    if getattr(keys, "shape", None) != (rows,):
        given = getattr(keys, "shape", type(keys).__name__)
        raise UserError(f"keys {given}: expected one for each of {rows} responses, as `sample_keys` makes them")
    return rows


def _check_tokens(sampling: Sampling, vocab_size: int) -> None:
    """Raises UserError for stop or padding tokens that do not exist; tracers pass."""
    if not isinstance(sampling.pad_id, jax.core.Tracer):
        pad = np.asarray(sampling.pad_id)
        if (pad < 0).any() or (pad >= vocab_size).any():
            raise UserError(f"sampling.pad_id = {pad}: expected a token id from 0 to {vocab_size - 1}")
    if not isinstance(sampling.stop_ids, jax.core.Tracer):
        largest = np.max(sampling.stop_ids, initial=0)
        if largest >= vocab_size:
            raise UserError(
                f"sampling.stop_ids = {largest}: expected token ids from 0 to {vocab_size - 1}: does the tokeniser "
                "belong to this model?"
            )


def _check_truncation(sampling: Sampling, vocab_size: int, support: int) -> None:
    """Raises UserError for a truncation that no support is given for, or a top-k that keeps more than it holds; tracers
    pass."""
    for name, all_tokens in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
        values = getattr(sampling, name)
        if support or isinstance(values, jax.core.Tracer):
            continue
        cut = np.atleast_1d(values)[np.atleast_1d(values) != all_tokens]
        if cut.size:
            raise UserError(
                f"sampling.{name} = {cut[0]} with support = 0: expected a support, which is how many tokens of a "
                f"distribution are kept at most; or {name} = {all_tokens}, which truncates nothing"
            )
    if 0 < support < vocab_size and not isinstance(sampling.top_k, jax.core.Tracer):
        largest = np.max(sampling.top_k)
        if largest > support:
            raise UserError(
                f"sampling.top_k = {largest} with support = {support}: expected a support of at least top_k"
            )


def check_prompts(
    prompts: Int[ArrayLike, "prompts prompt_length"],
    prompt_mask: Bool[ArrayLike, "prompts prompt_length"],
    vocab_size: int,
) -> None:
    """Raises UserError for no prompt, an empty one, one that is not right-aligned, a token id outside the vocabulary, a
    mask that is not bool, no arrays, or shapes that differ; tracers pass."""
    if isinstance(prompts, jax.core.Tracer) or isinstance(prompt_mask, jax.core.Tracer):
        return
    for name, given in (("prompts", prompts), ("prompt_mask", prompt_mask)):
        if not hasattr(given, "ndim"):
            raise UserError(f"{name}: expected an array [prompts, prompt_length], got a {type(given).__name__}")
    tokens, mask = on_host((prompts, prompt_mask))
    if tokens.ndim != 2 or tokens.shape != mask.shape or not len(tokens):
        raise UserError(
            f"prompts {tokens.shape} and prompt_mask {mask.shape}: expected both [prompts, prompt_length], at least one"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"prompts: dtype {tokens.dtype}, expected token ids, which are whole numbers")
    if mask.dtype != bool:
        raise UserError(f"prompt_mask: dtype {mask.dtype}, expected bool: pass prompt_mask.astype(bool)")
    if not mask.any(1).all():
        raise UserError(f"prompt {int(np.argmin(mask.any(1)))} is empty: give each prompt at least one token")
    gaps = ~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(1)
    if gaps.any():
        raise UserError(
            f"prompt {int(np.argmax(gaps))}: its tokens are not right-aligned; pad on the left, and let the mask be "
            "True from its first token to the end"
        )
    outside = mask & ((tokens < 0) | (tokens >= vocab_size))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UserError(
            f"prompt {row}, column {column}: token id {tokens[row, column]}, expected ids from 0 to {vocab_size - 1}: "
            "does the tokeniser belong to this model?"
        )
