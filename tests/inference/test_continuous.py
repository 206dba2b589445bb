"""Continuous batching draws what the plain batch draws, whatever the slots, rounds and windows."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny

from rlstab_jax.inference import prepare, sample, sample_continuously, stop_strings
from rlstab_jax.inference import slots as slots_module
from rlstab_jax.tasks.tokenizer import CharTokenizer
from rlstab_jax.types import Rollout, UserError

CONFIG = dataclasses.replace(tiny.MIXED, num_layers=2, dense_layers=(1,))
PROMPTS, SAMPLES, LENGTH, SUPPORT = 10, 2, 24, 6


def arguments(**changes: Any) -> tuple:
    """Rows that end by stop token or by a limit of their own, each with numbers of its own."""
    rows = np.arange(PROMPTS * SAMPLES)
    sampling = {
        "max_new_tokens": np.int32(1 + 7 * rows % LENGTH),
        "stop_ids": np.array([1], np.int32),
        "temperature": np.float32(0.8 + rows / 40),
        "top_p": np.float32(1 - rows / 100),
    }
    variables = prepare(tiny.parameters(CONFIG), tiny.FLOAT32)
    keys = tiny.keys(PROMPTS, SAMPLES)
    return tiny.model(CONFIG), variables, *tiny.prompts(PROMPTS), keys, tiny.sampling(**(sampling | changes))


OPTIONS = {"response_length": LENGTH, "samples_per_prompt": SAMPLES, "support": SUPPORT}


@cache
def plain() -> Rollout:
    return sample(*arguments(), **OPTIONS)


def assert_same(first: Rollout, second: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name == "log_probs":
            np.testing.assert_allclose(a, b, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(("slots", "round_length"), [(5, 3), (64, 16)])
def test_slots_and_rounds_change_nothing(slots: int, round_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows, so that they move and change their length along the way."""
    lengths = np.asarray(plain().response_mask).sum(1)
    assert len(set(lengths)) > 5
    assert 0 < plain().truncated.sum() < len(lengths)
    assert plain().support.shape == (PROMPTS * SAMPLES, LENGTH, SUPPORT)
    monkeypatch.setattr(slots_module, "SHORTEST_WINDOW", 8)
    assert_same(sample_continuously(*arguments(), slots=slots, round_length=round_length, **OPTIONS), plain())


def test_growing_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "SHORTEST_WINDOW", 8)
    assert slots_module.windows(LENGTH - 1) == [6, 12, 23]
    assert slots_module.windows(3999) == [250, 500, 1000, 2048, 4096]
    options = OPTIONS | {"samples_per_prompt": 1}
    model, variables, prompts, mask, keys, sampling = arguments()
    separate = np.repeat(prompts, SAMPLES, 0), np.repeat(mask, SAMPLES, 0)  # also, so that the program is another
    assert_same(sample(model, variables, *separate, keys, sampling, **options), plain())


ALPHABET = CharTokenizer("abcdefghijklmno")  # 17 tokens, as many as the model has


def test_a_stop_string_ends_a_response_where_it_is_complete() -> None:
    """The same draws as without it, cut: whatever comes after, in this round, is gone."""
    ids = np.asarray(plain().tokens)[:, tiny.PROMPT :]
    lengths = np.asarray(plain().response_mask).sum(1)
    texts = [ALPHABET.decode(row[:n]) for row, n in zip(ids, lengths, strict=True)]
    pairs = [text[i : i + 2] for text in texts for i in range(len(text)) if text[i : i + 2].isalpha()]
    stops = (max(pairs, key=len), "b")
    stop = stop_strings(stops, ALPHABET.encode, ALPHABET.decode)
    rollout = sample_continuously(*arguments(), slots=5, round_length=3, stop=stop, **OPTIONS)
    cut = 0
    for row, text in enumerate(texts):
        ends = [text.find(s) + len(s) for s in stops if s in text]
        pieces = [ALPHABET.decode([i]) for i in ids[row, : lengths[row]]]
        expected = lengths[row]
        if ends:
            expected = int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), min(ends))) + 1
            cut += expected < lengths[row]
            assert not rollout.truncated[row]
        np.testing.assert_array_equal(np.asarray(rollout.response_mask)[row], np.arange(LENGTH) < expected)
        written = slice(tiny.PROMPT, tiny.PROMPT + expected)
        np.testing.assert_array_equal(rollout.tokens[row, written], ids[row, :expected])
        np.testing.assert_array_equal(rollout.tokens[row, written.stop :], 0)
        np.testing.assert_allclose(rollout.log_probs[row, :expected], plain().log_probs[row, :expected], atol=1e-5)
        fed = written.stop - 1
        np.testing.assert_array_equal(rollout.routes[:, row, :fed], plain().routes[:, row, :fed])
        assert (np.asarray(rollout.routes)[:, row, fed:] == CONFIG.num_experts).all()
        assert (np.asarray(rollout.support)[row, expected:] == CONFIG.vocab_size).all()
    assert cut > 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("z",), "'z' cannot be tokenised: text 'z'"),
        (("",), "'' cannot be tokenised"),
        ((b"a",), "stop string b'a': expected text, not bytes"),
        (("a", None), "stop string None: expected text, not NoneType"),
        ("ab", "stop strings 'ab': expected a list or tuple of texts"),
        (3, "stop strings 3: expected a list"),
    ],
)
def test_a_stop_string_that_no_response_can_contain_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stop_strings(texts, ALPHABET.encode, ALPHABET.decode)


def test_slots_and_rounds_are_at_least_one() -> None:
    for slots, round_length in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match=rf"slots = {slots}, round_length = {round_length}: expected at least 1"):
            sample_continuously(*arguments(), slots=slots, round_length=round_length, **OPTIONS)
