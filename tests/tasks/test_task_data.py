"""Prompts through Grain, and the arrays made of them."""

import json

import numpy as np
import pytest

from rlstab_jax.tasks import Arithmetic, CharTokenizer, Prompt, decode_responses, encode_prompts, prompt_iterator
from rlstab_jax.types import UserError

SOURCE = [Prompt(i, str(i), "0") for i in range(7)]


def ids(batch: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in batch]


def test_position_survives_json():
    source = Arithmetic().split("train")
    iterator = prompt_iterator(source, 4, seed=3)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    restored = prompt_iterator(source, 4, seed=3)
    restored.set_state(state)
    assert [next(restored) for _ in range(3)] == expected


def test_each_epoch_is_a_permutation_and_a_new_one():
    iterator = prompt_iterator(SOURCE, 7, seed=0)
    epochs = [ids(next(iterator)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(next(prompt_iterator(SOURCE, 7, seed=1))) != epochs[0]


def test_one_pass_in_order_keeps_the_remainder():
    batches = list(prompt_iterator(SOURCE, 4, seed=0, shuffle=False, repeat=False))
    assert [ids(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6]]


def test_one_at_a_time():
    iterator = prompt_iterator(SOURCE, 1, seed=0)
    assert sorted(ids(next(iterator))[0] for _ in SOURCE) == list(range(len(SOURCE)))
    assert len(next(iterator)) == 1


@pytest.mark.parametrize(("source", "batch", "message"), [(SOURCE, 0, "batch_size"), ([], 4, "empty")])
def test_bad_iterators(source, batch, message):
    with pytest.raises(UserError, match=message):
        prompt_iterator(source, batch, seed=0)


def test_encode_prompts_right_aligns():
    tokens, mask = encode_prompts([Prompt(0, "a", ""), Prompt(1, "bab", "")], CharTokenizer("ab"), 3)
    np.testing.assert_array_equal(tokens, [[0, 0, 2], [3, 2, 3]])
    np.testing.assert_array_equal(mask, [[False, False, True], [True, True, True]])
    assert tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "message"), [("abab", "prompt 9 has 4 tokens, expected 1 to 3"), ("", "has 0 tokens")]
)
def test_prompt_that_does_not_fit(text, message):
    with pytest.raises(UserError, match=message):
        encode_prompts([Prompt(9, text, "")], CharTokenizer("ab"), 3)


def test_decode_responses():
    tokens = np.array([[2, 3, 1, 0], [2, 0, 3, 2], [1, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    rows = tokens, mask, np.array([False, True, False]), CharTokenizer("ab")
    assert decode_responses(*rows) == [("ab", True), ("a<pad>ba", False), ("", True)]


def test_a_stop_string_is_no_part_of_the_text():
    """The first one ends it; its last token may hold more. What met the limit without one did not stop."""
    tokenizer = CharTokenizer("ab")
    tokens = np.array([tokenizer.encode(text) for text in ("abba", "bbaa", "abab")])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    rows = tokens, mask, np.array([False, False, True]), tokenizer
    assert decode_responses(*rows, ("aa", "bb")) == [("a", True), ("", True), ("abab", False)]


def test_character_outside_the_alphabet():
    with pytest.raises(UserError, match="no token for 'c'"):
        CharTokenizer("ab").encode("abc")
