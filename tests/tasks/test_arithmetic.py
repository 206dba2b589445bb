"""The arithmetic task: its verifier, its splits and its demonstrations, against values worked out by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlstab_jax.tasks import Arithmetic, ArithmeticConfig, DemonstratedTask, Prompt
from rlstab_jax.types import UserError

PROMPT = Prompt(0, "3+5*7+a=", "0")  # 3 -> 8 -> 56 = 1 -> 11 = 0 modulo 11


def task(**changes) -> Arithmetic:
    return Arithmetic(ArithmeticConfig(**{"heldout_prompts": 8, **changes}))


configs = st.builds(
    task,
    operands=st.tuples(st.integers(3, 5), st.integers(5, 7)),
    operators=st.sampled_from(["+", "+*", "-+", "*-+"]),
    modulus=st.integers(7, 16),
    base=st.sampled_from([10, 16, 36]),
    digits=st.sampled_from([2, 3]),
    scratchpad=st.sampled_from([0, 1, 2, 3]),
    aligned=st.booleans(),
    demonstration_noise=st.just(0.0),
    unanswerable=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
)


@pytest.mark.parametrize(
    ("scratchpad", "right", "wrong"),
    [
        (0, ["0"], ["", "1", "00", "10", "0=", "0<stop>", "0<pad>"]),
        (1, ["810", "0", "99990"], ["", "811", "8 1 0", "81+0", "810=", "<pad>0", "81<stop>0", "0\n"]),
        (2, ["+8*1+0", "+0", "*9+9+0"], ["", "0", "80", "+8*1+1", "+8*1+0 ", "8*1+0", "+8*1+", "+8=0", "-0", "+8**0"]),
        (
            3,
            ["3+5=8;8*7=1;1+a=0;", "9*9=0;"],
            ["", "0", "3+5=8;8*7=1;1+a=1;", "1+a=0", "3+5=8;1+a=0;;", "1+a=00;", "1-1=0;"],
        ),
    ],
)
def test_reward_takes_the_last_result_exactly(scratchpad, right, wrong):
    arithmetic = task(scratchpad=scratchpad)
    assert [arithmetic.reward(PROMPT, response) for response in right] == [1.0] * len(right)
    assert [arithmetic.reward(PROMPT, response) for response in wrong] == [0.0] * len(wrong)
    assert arithmetic.reward(PROMPT, right[0], stopped=False) == 0.0


@pytest.mark.parametrize(("scratchpad", "expected"), [(0, "0"), (1, "810"), (2, "+8*1+0"), (3, "3+5=8;8*7=1;1+a=0;")])
def test_demonstration_without_noise(scratchpad, expected):
    assert task(scratchpad=scratchpad, demonstration_noise=0.0).demonstration(PROMPT, 0) == expected


def test_numbers_of_several_digits_and_subtraction():
    arithmetic = task(modulus=100, base=10, digits=3, operators="-*", demonstration_noise=0.0)
    assert arithmetic.demonstration(Prompt(0, "007-012*002=", "090"), 0) == "-095*090"  # 7 - 12 = -5 = 95; 190 = 90


@given(configs, st.integers(0, 2**30 - 1))
@settings(max_examples=40, deadline=None)
def test_demonstrations_earn_the_reward_and_fit(arithmetic, index):
    for prompt in (arithmetic.split("train")[index], arithmetic.split("heldout")[index % 8]):
        response, tokenizer = arithmetic.demonstration(prompt, index), arithmetic.tokenizer
        assert arithmetic.reward(prompt, response) == 1.0
        assert tokenizer.decode(tokenizer.encode(response)) == response
        assert len(tokenizer.encode(prompt.text)) <= arithmetic.max_prompt_tokens
        assert len(tokenizer.encode(response)) + 1 <= arithmetic.max_response_tokens


def test_unanswerable_prompts_have_their_share():
    """Each of the 11 answers to them is as likely, so that the ceiling is as the field says."""
    arithmetic = task(unanswerable=0.25)
    prompts = [arithmetic.split("train")[i] for i in range(2000)]
    hidden = [prompt for prompt in prompts if prompt.text.startswith("?")]
    assert 0.22 < len(hidden) / len(prompts) < 0.28
    answers = np.bincount([int(prompt.answer, 16) for prompt in hidden], minlength=11) / len(hidden)
    assert np.abs(answers - 1 / 11).max() < 0.04
    noiseless = task(unanswerable=1.0, demonstration_noise=0.0)
    assert noiseless.demonstration(Prompt(0, "?+5*7+a=", "0"), 0) == "+8*1+0"  # 3 is what leads there


def test_default_lengths():
    """The setting in which the phenomenon shows: responses of 7 to 17 tokens with the stop, both ends met."""
    arithmetic = Arithmetic()
    prompts = [arithmetic.split("train")[i] for i in range(400)]
    lengths = {len(arithmetic.demonstration(prompt, 0)) + 1 for prompt in prompts}
    assert (min(lengths), max(lengths)) == (7, 17)
    assert arithmetic.max_response_tokens == 17
    assert arithmetic.max_prompt_tokens == 18
    assert isinstance(arithmetic, DemonstratedTask)
    assert ArithmeticConfig().build().split("train")[7] == prompts[7]


@given(configs, st.integers(0, 2**30 - 1))
@settings(max_examples=40, deadline=None)
def test_aligned_prompts_are_equally_long(arithmetic, index):
    """Spaces stand before the "=" alone, and change nothing else; prompts that are not aligned have none."""
    text = arithmetic.split("train")[index].text
    chain, spaces = text.removesuffix("=").rstrip(" "), text.count(" ")
    assert text == chain + " " * spaces + "="
    if arithmetic.config.aligned:
        assert len(arithmetic.tokenizer.encode(text)) == arithmetic.max_prompt_tokens
    else:
        assert not spaces
        with pytest.raises(UserError, match="no token for ' '"):
            arithmetic.tokenizer.encode(" ")


def test_long_responses_can_be_had():
    assert Arithmetic(ArithmeticConfig(operands=(16, 22), digits=2, scratchpad=3)).max_response_tokens == 199


def test_splits_are_deterministic_and_disjoint():
    """Exact where it can be enumerated: chains of one or two `+a` modulo 11, 1,210 in all."""
    config = ArithmeticConfig(operands=(1, 2), operators="+", heldout_prompts=60)
    first, second = Arithmetic(config), Arithmetic(config)
    train, heldout = first.split("train"), list(first.split("heldout"))
    assert heldout == list(second.split("heldout"))
    assert train[12345] == second.split("train")[12345]
    trained = {train[i].text for i in range(12000)}
    other_seed = {prompt.text for prompt in Arithmetic(dataclasses.replace(config, seed=1)).split("heldout")}
    assert len({prompt.text for prompt in heldout}) == len(heldout) == 60
    assert not trained & ({prompt.text for prompt in heldout} | other_seed)
    assert len(trained) > 0.8 * (11 * 10 + 11 * 100)
    ids = [prompt.id for prompt in itertools.chain((train[i] for i in (0, 7, 2**30 - 1)), heldout)]
    assert len(set(ids)) == len(ids)
    assert all(0 <= i < 2**31 for i in ids)


def test_train_source_ends():
    with pytest.raises(IndexError):
        task().split("train")[2**30]


@pytest.mark.parametrize("propagates", [True, False])
def test_noise_replaces_its_share_of_intermediate_results(propagates):
    arithmetic = task(
        operands=(9, 9), operators="+", demonstration_noise=0.3, noise_propagates=propagates, scratchpad=3
    )
    wrong, right_steps, answers = 0, 0, 0
    for i in range(300):
        prompt = arithmetic.split("train")[i]
        steps = arithmetic.demonstration(prompt, seed=5).split(";")[:-1]
        assert arithmetic.demonstration(prompt, seed=5) == ";".join(steps) + ";"
        shown = [int(step[-1], 16) for step in steps]
        sound = [(int(s[0], 16) + int(s[2], 16)) % 11 == r for s, r in zip(steps, shown, strict=True)]
        wrong += 8 - sum(sound[:-1])
        right_steps += sound[-1]
        answers += steps[-1][-1] == prompt.answer
        continues = [steps[j + 1][0] == steps[j][-1] for j in range(8)]
        assert all(continues) if propagates else continues == sound[:-1]
    assert abs(wrong / (300 * 8) - 0.3 * 10 / 11) < 0.04  # one random digit in eleven is the right one
    assert right_steps == 300
    assert answers == 300 if not propagates else answers < 150


@pytest.mark.parametrize("scratchpad", [1, 2, 3])
def test_skips_go_to_the_last_result_at_once(scratchpad: int) -> None:
    """Answers to one prompt differ in length then, each of them right: what is left out is reckoned with, too."""
    arithmetic = task(operands=(8, 8), demonstration_noise=0.0, demonstration_skips=0.4, scratchpad=scratchpad)
    full = task(operands=(8, 8), demonstration_noise=0.0, scratchpad=scratchpad)
    shown, size = np.zeros(9), (0, 1, 2, 6)[scratchpad]
    for i in range(400):
        prompt = arithmetic.split("train")[i % 10]
        answer, whole = arithmetic.demonstration(prompt, i), full.demonstration(prompt, i)
        assert answer == whole[: len(answer) - size] + whole[-size:]
        assert arithmetic.reward(prompt, answer) == 1
        shown[len(answer) * 8 // len(whole)] += 1 / 400
    assert shown[0] == 0
    assert abs(shown[8] - 0.6) < 0.06
    assert np.abs(shown[1:8] - 0.4 / 7).max() < 0.04


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"operands": (0, 4)}, "operands"),
        ({"operands": (5, 4)}, "operands"),
        ({"operators": ""}, "operators"),
        ({"operators": "+/"}, "operators"),
        ({"operators": "++"}, "operators"),
        ({"base": 37}, "base"),
        ({"digits": 0}, "digits"),
        ({"modulus": 1}, "modulus"),
        ({"modulus": 17}, "modulus"),
        ({"scratchpad": 4}, "scratchpad"),
        ({"demonstration_noise": 1.5}, "demonstration_noise"),
        ({"demonstration_skips": -0.1}, "demonstration_skips"),
        ({"demonstration_skips": 0.5, "scratchpad": 0}, "demonstration_skips"),
        ({"demonstration_skips": 0.5, "operands": (1, 1), "modulus": 16}, "demonstration_skips"),
        ({"unanswerable": -0.1}, "unanswerable"),
        ({"heldout_prompts": 0}, "heldout_prompts"),
        ({"operands": (1, 1), "heldout_prompts": 256}, "heldout_prompts"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_configs_name_the_field(changes, field):
    with pytest.raises(UserError, match=field):
        task(**changes)
