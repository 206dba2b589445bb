"""Prompts through Grain, and the way from text to arrays and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from rlstab_jax.tasks.protocol import Prompt, PromptSource, Tokenizer
from rlstab_jax.types import UserError, one_line

if TYPE_CHECKING:
    import grain


def prompt_iterator(
    source: PromptSource,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
) -> "grain.DatasetIterator[list[Prompt]]":
    """Batches of prompts. The position is ``get_state()``, a dict for JSON; ``set_state(state)`` restores it exactly.

    Args:
      source: any random-access source of prompts, e.g. ``task.split("train")``.
      batch_size: prompts of a batch.
      seed: of the order, used where ``shuffle``; each epoch has another order.
      repeat: whether to go round for ever. If not, the last batch holds what is left.

    Raises:
      UserError: an empty source, or a batch without prompts.
    """
    import grain  # takes a second to import, and nothing else here needs it

    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: expected at least 1")
    if not len(source):
        raise UserError("the prompt source is empty: give it at least one prompt")
    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    if repeat:
        dataset = dataset.repeat()
    dataset = dataset.batch(batch_size, drop_remainder=repeat, batch_fn=list)
    # Prompts cost microseconds: threads that read ahead would only add a state to restore.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, prompt_length: int
) -> tuple[Int[np.ndarray, "batch prompt_length"], Bool[np.ndarray, "batch prompt_length"]]:
    """Right-aligned int32 tokens of the prompts, padded with ``pad_id``, and the mask that is True on real tokens.

    Raises UserError for an empty prompt and for one of more than ``prompt_length`` tokens.
    """
    tokens = np.full((len(prompts), prompt_length), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt) or not isinstance(prompt.id, int | np.integer) or not 0 <= prompt.id < 2**31:
            raise UserError(f"the task's prompts: {prompt!r}: expected a Prompt with an id from 0 to 2**31 - 1")
        try:
            ids = tokenizer.encode(prompt.text)
        except Exception as error:  # whatever a user's method may raise
            raise UserError(
                f"{type(tokenizer).__name__}.encode failed on prompt {prompt.id} ({prompt.text[:60]!r}): "
                f"{one_line(error)}"
            ) from error
        if not 0 < len(ids) <= prompt_length:
            raise UserError(
                f"prompt {prompt.id} has {len(ids)} tokens, expected 1 to {prompt_length}: raise the prompt length "
                f"or leave the prompt out; it begins {prompt.text[:40]!r}"
            )
        tokens[row, prompt_length - len(ids) :] = ids
        mask[row, prompt_length - len(ids) :] = True
    return tokens, mask


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids. Raises UserError where the tokeniser fails."""
    try:
        return tokenizer.decode(ids)
    except Exception as error:  # whatever a user's method may raise
        raise UserError(f"{type(tokenizer).__name__}.decode failed on {ids[:20]}: {one_line(error)}") from error


def decode_responses(
    tokens: Int[np.ndarray, "batch response_length"],
    mask: Bool[np.ndarray, "batch response_length"],
    truncated: Bool[np.ndarray, "batch"],
    tokenizer: Tokenizer,
    stop: Sequence[str] = (),
) -> list[tuple[str, bool]]:
    """Each response's text before its stop token or the first of the ``stop`` strings, and whether it stopped.

    ``mask`` is True up to and including the stop token, or the token that completes a stop string; ``truncated`` where
    there was none.
    """
    responses = []
    for row, keep, cut_off in zip(tokens, mask, truncated, strict=True):
        ids = row[keep].tolist()
        ids = ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids
        text = decode_text(tokenizer, ids)
        end = min((text.index(string) for string in stop if string in text), default=len(text))
        responses.append((text[:end], not cut_off))
    return responses
