"""What no sampler can answer is refused with the field and what it may be, before anything is compiled."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlstab_jax.inference import sample, sample_continuously, sample_keys, sample_matched
from rlstab_jax.types import UserError


def ask(*prompts_and_keys: Any, sampler: Any = sample, **options: Any) -> None:
    """Of a model without parameters, which is never run. By default four right prompts, with two samples each."""
    arguments = prompts_and_keys or (*tiny.prompts(), tiny.keys())
    how = {"sampling": tiny.sampling(), "response_length": tiny.RESPONSE, "samples_per_prompt": tiny.SAMPLES}
    sampler(tiny.model(), {}, *arguments, **how | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"sampling.temperature = -1.0: expected 0 \(greedy\), or at least 1e-06"),
        ({"temperature": np.float32([0, 9e-7] * 4)}, "sampling.temperature = 8.9.*e-07: expected 0"),
        ({"temperature": np.nan}, "sampling.temperature = nan: expected 0"),
        ({"top_p": np.float32([1, 0] * 4)}, r"sampling.top_p = 0.0: expected above 0, at most 1"),
        ({"top_p": 1.5}, "sampling.top_p = 1.5"),
        ({"min_p": np.nan}, "sampling.min_p = nan"),
        ({"top_k": -2}, "sampling.top_k = -2"),
        ({"uniform": 1.5}, r"sampling.uniform = 1.5: expected from 0 \(no mixture\) to 1"),
        ({"stop_ids": np.zeros((3, 2), np.int32)}, r"sampling.stop_ids: shape \(3, 2\), expected \[n\], or \[8, n\]"),
        ({"stop_ids": np.int32([1, -1])}, "sampling.stop_ids = -1: expected token ids"),
        ({"stop_ids": np.int32([1, 17])}, "sampling.stop_ids = 17: expected token ids from 0 to 16"),
        ({"pad_id": 17}, "sampling.pad_id = 17: expected a token id from 0 to 16"),
        ({"pad_id": -3}, "sampling.pad_id = -3"),
        ({"pad_id": [0, 1]}, r"sampling.pad_id: shape \(2,\), expected a number, or one for each of 8 rows"),
        ({"temperature": "hot"}, "sampling.temperature = 'hot' .str.: expected numbers"),
        ({"temperature": None}, "sampling.temperature = None .NoneType.: expected numbers"),
        ({"temperature": [[1.0], [1.0, 2.0]]}, "sampling.temperature: expected numbers: "),
        ({"top_k": 2.5}, "sampling.top_k = 2.5 .float.: expected whole numbers"),
        ({"pad_id": "<pad>"}, "sampling.pad_id = '<pad>' .str.: expected whole numbers"),
        ({"stop_ids": [1.5]}, "sampling.stop_ids = 1.5 .float.: expected whole numbers"),
        ({"stop_ids": [[1, np.nan]] * 8}, "sampling.stop_ids = 1.0 .float.: expected whole numbers"),
        ({"stop_ids": None}, "sampling.stop_ids = None .NoneType.: expected whole numbers"),
        ({"min_new_tokens": np.int32([1, 2])}, r"sampling.min_new_tokens: shape \(2,\), expected .* each of 8 rows"),
    ],
)
def test_what_is_no_number_in_its_range_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(sampling=tiny.sampling(**changes))


def test_numbers_of_any_type_are_taken() -> None:
    for changes in (
        {"temperature": 1, "top_p": np.float64(1), "top_k": np.uint8(0), "max_new_tokens": jnp.int32(3), "pad_id": 0},
        {"temperature": jnp.bfloat16(0.5), "min_p": 0, "uniform": np.float16(0.1), "min_new_tokens": np.int64(2)},
        {"stop_ids": []},
        {"stop_ids": [[1], [np.int64(2)]], "temperature": [0, 0.5]},
        {"stop_ids": jnp.asarray([1, 2])},
    ):
        tiny.sampling(**changes).validate(2)


def test_prompts_that_no_model_can_read_are_refused() -> None:
    prompts, mask = tiny.prompts()
    empty, outside = mask.copy(), prompts.copy()
    empty[2] = False
    outside[1, -1] = 17
    left, holed = mask[:, ::-1], mask.copy()
    holed[1, 2] = False
    for arrays, message in (
        ((prompts, empty), "prompt 2 is empty"),
        ((outside, mask), "prompt 1, column 5: token id 17, expected ids from 0 to 16"),
        ((prompts, left), "prompt 0: its tokens are not right-aligned"),
        ((prompts, holed), "prompt 1: its tokens are not right-aligned"),
        ((prompts, mask[:, 1:]), r"prompts \(4, 6\) and prompt_mask \(4, 5\)"),
        ((prompts[:0], mask[:0]), r"prompts \(0, 6\) .* at least one"),
        ((prompts, mask.astype(int)), "prompt_mask: dtype int64, expected bool"),
        ((prompts.astype(np.float32), mask), "prompts: dtype float32, expected token ids"),
        ((prompts.tolist(), mask), r"prompts: expected an array \[prompts, prompt_length\], got a list"),
    ):
        with pytest.raises(UserError, match=message):
            ask(*arrays, tiny.keys())
    with pytest.raises(UserError, match="response_length = 0, samples_per_prompt = 2: expected at least 1"):
        ask(response_length=0)
    with pytest.raises(UserError, match="support = -1: expected 0"):
        ask(support=-1)
    with pytest.raises(UserError, match="keys list: expected one for each of 8 responses"):
        ask(prompts, mask, [1, 2])
    with pytest.raises(UserError, match="top_k = 6 with support = 5: expected a support of at least"):
        ask(support=5, sampling=tiny.sampling(top_k=6))


@pytest.mark.parametrize("sampler", [sample, partial(sample_continuously, slots=3), sample_matched])
def test_a_truncation_is_not_ignored(sampler: Any) -> None:
    for changes, message in (
        ({"top_p": 0.01}, "sampling.top_p = 0.01 with support = 0: expected a support, .* or top_p = 1, which"),
        ({"top_k": np.int32([0, 3] * 4)}, "sampling.top_k = 3 with support = 0"),
        ({"min_p": jnp.float32(0.5)}, "sampling.min_p = 0.5 with support = 0"),
    ):
        with pytest.raises(UserError, match=message):
            ask(sampler=sampler, sampling=tiny.sampling(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [-1]}, r"prompt_ids: expected whole numbers from 0 to below 2\^64"),
        ({"prompt_ids": [2**64]}, "prompt_ids: expected"),
        ({"prompt_ids": [1.7]}, "prompt_ids: expected"),
        ({"prompt_ids": np.float32([1])}, "prompt_ids: expected"),
        ({"prompt_ids": 5}, "prompt_ids: expected"),
        ({"global_step": -1}, r"global_step = -1: expected a whole number from 0 to below 2\^32"),
        ({"global_step": 2**32}, "global_step = 4294967296: expected"),
        ({"global_step": 1.7}, "global_step = 1.7: expected"),
        ({"attempt": "two"}, "attempt = 'two': expected"),
        ({"samples": 0}, r"samples = 0: expected a whole number from 1 to below 2\^32"),
        ({"samples": 1.5}, "samples = 1.5: expected"),
    ],
)
def test_keys_are_of_whole_numbers(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_keys(jax.random.key(0), **{"global_step": 0, "prompt_ids": [1], "samples": 2} | changes)


def test_keys_are_of_whole_numbers_of_any_type() -> None:
    """A traced step too."""
    ids = (1, 2**63, 3)
    base = sample_keys(jax.random.key(0), 3, ids, 2)
    for step, given, samples, attempt in (
        (np.int64(3), np.uint64(ids), np.int32(2), np.uint8(0)),
        (jnp.uint32(3), [np.uint64(i) for i in ids], 2, jnp.int32(0)),
    ):
        assert (sample_keys(jax.random.key(0), step, given, samples, attempt) == base).all()
    assert (jax.jit(lambda step: sample_keys(jax.random.key(0), step, ids, 2))(3) == base).all()
