"""The inference engine mu: prefill and decode in one compiled program, recording what it really did.

It returns the log-probs of the very distribution that each token was drawn from, and the experts that it used. A draw's
key depends on (run seed, global step, prompt, sample number, attempt, position) alone: not on batch slot, mesh or
restarts.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlstab_jax.inference.sampling import Sampling, check_request
from rlstab_jax.inference.slots import (
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
from rlstab_jax.models.transformer import Transformer
from rlstab_jax.types import Rollout


def sample(
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
    record_routes: bool = True,
) -> Rollout:
    """Samples responses y ~ mu. Static are shapes and switches only; all of ``sampling`` is traced.

    Args:
      model: the architecture, with the inference engine's precision and kernels.
      variables: its stored weights, from `quantize.prepare`.
      prompts: right-aligned; columns that no prompt of the batch needs cost nothing, to the next half of the length.
      prompt_mask: True on prompt tokens.
      keys: [prompts * samples_per_prompt], from `sample_keys`.
      sampling: temperature, truncation, stop tokens, lengths: for all rows or for each.
      response_length: length of the response buffer; decoding ends early when every row has stopped.
      samples_per_prompt: G; the samples of a prompt share its prefill and its prompt's keys and values. Rows of one
        prompt are adjacent.
      support: static bound on the tokens kept of each distribution, for top-k, top-p and min-p; they are recorded. 0
        compiles no truncation in: these three must keep all then, and are ignored where they are traced.
      record_routes: return the routes; a dense model has none.

    Returns:
      The rollout, [prompts * samples_per_prompt] rows.

    Raises:
      UserError: no prompt or an empty one, a token id outside the vocabulary, a mask that is not bool, no response, a
        number of ``sampling`` outside its range or above ``support``, a truncation without one, another number of keys
        than of responses.
    """
    vocab_size = model.config.vocab_size
    check_request(prompts, prompt_mask, keys, sampling, samples_per_prompt, response_length, vocab_size, support)
    spare = spare_columns(prompt_mask)
    rollout = sample_batch(
        model,
        variables,
        prompts[:, spare:],
        prompt_mask[:, spare:],
        keys,
        sampling,
        response_length=response_length,
        samples_per_prompt=samples_per_prompt,
        support=support,
        record_routes=record_routes,
    )
    return put_back(rollout, prompts, spare, model.config.num_experts)


@partial(jax.jit, static_argnames=("model", "response_length", "samples_per_prompt", "support", "record_routes"))
def sample_batch(
    model: Transformer,
    variables: dict,
    prompts: Array,
    prompt_mask: Array,
    keys: Array,
    sampling: Sampling,
    *,
    response_length: int,
    samples_per_prompt: int,
    support: int,
    record_routes: bool,
    before: Int[Array, ""] | int = 0,
) -> Rollout:
    """`sample` as one compiled program, without its checks of the input. ``before``: as in `Slots`."""
    rows = prompts.shape[0] * samples_per_prompt
    repeat = partial(jnp.repeat, repeats=samples_per_prompt, axis=0)
    prompt_mask = jnp.asarray(prompt_mask)
    rows_over_devices = model.layout.constrain_rows
    prompts, prompt_mask = rows_over_devices((prompts, prompt_mask))
    keys, sampling = rows_over_devices((keys, sampling.per_row(rows)))
    filled = prefill(model, variables, prompts, prompt_mask)
    lengths = windows(response_length - 1)
    slots = Slots(
        keys=keys,
        sampling=sampling,
        limit=jnp.minimum(sampling.max_new_tokens - before, response_length),
        prompt_mask=prompt_mask,
        count=jnp.zeros(rows, jnp.int32),
        active=repeat(prompt_mask.any(1)) & (sampling.max_new_tokens > before),
        last=sampling.pad_id,
        column=jnp.int32(0),
        prompt=filled.keys_values,
        response=empty_responses(filled.keys_values, rows, lengths[0]),
        before=jnp.int32(before),
    )
    began = slots.active
    slots, first = first_draw(slots, repeat(filled.logits), support)
    records = empty_records(model, sampling, rows, response_length - 1, support, record_routes)
    step = jnp.int32(0)
    for length in lengths if response_length > 1 else ():
        stop = min(length, response_length - 1)
        slots, records, step = decode(model, variables, resize(slots, 0, length), records, step, stop, support)

    def joined(of_first: Array, of_records: Array) -> Array:
        return jnp.concatenate([of_first[:, None], of_records], axis=1)

    tokens, mask = joined(first.token, records.tokens), joined(began, records.mask)
    ends = (tokens[..., None] == sampling.stop_ids[:, None]).any(-1) & mask
    routes = None
    if records.routes is not None and filled.routes is not None:
        routes = jnp.concatenate([jnp.repeat(filled.routes, samples_per_prompt, axis=1), records.routes], axis=2)
    rollout = Rollout(
        tokens=jnp.concatenate([repeat(prompts), tokens], axis=1),
        prompt_mask=repeat(prompt_mask),
        response_mask=mask,
        log_probs=joined(first.log_prob, records.log_probs),
        truncated=~ends.any(1),
        routes=routes,
        temperature=sampling.temperature,
        support=None if records.support is None or first.support is None else joined(first.support, records.support),
        minimum=sampling.minimum,
    )
    return rows_over_devices(rollout)
