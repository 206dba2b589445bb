"""Verifiers: where the answer is, when two answers are equal, and what becomes of those that cannot be judged."""

import dataclasses
import gc
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlstab_jax.tasks import ExactMatch, MathVerify, Numeric, Prompt, Reward
from rlstab_jax.tasks.extract import EXTRACTORS
from rlstab_jax.tasks.verify import Verdict, check_failures, check_rewards_config, judge, number
from rlstab_jax.types import UserError

BOX = "\\boxed{%s}"
MATH = MathVerify(seconds=1.0, workers=2)  # one pool for all tests


def prompt(answer, number=0):
    return Prompt(number, f"question {number}", answer)


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("boxed", "\\boxed{1} then \\boxed{2}", "2"),
        ("boxed", "\\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("boxed", "\\boxed {x^{2}} ", "x^{2}"),
        ("boxed", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("boxed", "\\boxed{\\boxed{3}}", "3"),
        ("boxed", "\\boxed{1} and, cut off, \\boxed{2", "1"),
        ("boxed", "\\boxed{2", None),
        ("boxed", "72", None),
        ("boxed", "} \\boxed{2} \\boxed{ {3}", "2"),
        ("boxed", "\\boxed{ {2} \\} }", "{2} \\}"),
        ("hashes", "#### 1\n#### 72\nbye", "72"),
        ("hashes", "####", None),
        ("hashes", "72", None),
        ("phrase", "The answer is 3. No, the final answer is: $4.5$.", "4.5"),
        ("phrase", "Final Answer: The final answer is $17$. I hope it is correct.", "17"),
        ("phrase", "the answer to all is 1; THE ANSWER: **42**", "42"),
        ("phrase", "Half of 68 is 34.\nAnswer: 34", "34"),
        ("phrase", "So:\n**Answer:** $\\frac{1}{2}$\n", "\\frac{1}{2}"),
        ("phrase", "My answer: 34", None),
        ("phrase", "the answer to all", None),
        ("any", "The answer is 1\n#### 2\n\\boxed{3}", "3"),
        ("any", "The answer is 1\n#### 2", "2"),
        ("any", "The answer is 1", "1"),
        ("any", "1", None),
        ("whole", " 7 ", "7"),
        ("whole", " ", None),
    ],
)
def test_extraction(how, text, answer):
    assert EXTRACTORS[how](text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("-1,234,567", -1234567),
        ("$ 5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("72.", 72),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-3/4", -0.75),
        ("50%", 50),
        ("50\\%", 50),
        ("9" * 400, int("9" * 400)),
        ("1/0", None),
        ("1e999", None),
        ("9" * 5000, None),
        ("9" * 400 + "/3", None),
        ("12,34", None),
        ("1 apple", None),
        ("--1", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        (".", None),
        ("e5", None),
    ],
)
def test_numbers(text, value):
    assert number(text) == value
    assert type(number(text)) is type(value)


@pytest.mark.parametrize(
    ("verifier", "reference", "response", "reward"),
    [
        (ExactMatch(), "(1, 2)", BOX % "(1,2)", 1),
        (ExactMatch(), "72", BOX % "72.0", 0),
        (ExactMatch(), "72", "72", 0),
        (ExactMatch("whole"), "72", "72", 1),
        (Numeric(), "72", BOX % "72.0", 1),
        (Numeric(), "1,200", "#### 1200", 1),
        (Numeric(), "0.3333333", BOX % "1/3", 1),
        (Numeric(), "0.333", BOX % "1/3", 0),
        (Numeric(tolerance=1e-2), "0.333", BOX % "1/3", 1),
        (Numeric(), "10000000000000001", BOX % "10000000000000000", 0),
        (Numeric(), "72", BOX % "many", 0),
        (Numeric(), "1234567", BOX % "1234568.0", 0),
        (Numeric(), "72", BOX % "72.00005", 0),
        (Numeric(), "0.5", BOX % ("9" * 400), 0),
        (Numeric(), "1", BOX % ("1" + "/1" * 3000), 0),
        (Numeric(), "72", "72", 0),
        (MATH, "72", BOX % "72.0", 1),
        (MATH, "\\frac{1}{2}", BOX % "0.5", 1),
        (MATH, "x^2 + 2x + 1", BOX % "(x+1)^2", 1),
        (MATH, "\\{1, 2\\}", "The final answer is $\\{2,1\\}$.", 1),
        (MATH, "2\\sqrt{2}", BOX % "\\sqrt{8}", 1),
        (MATH, "72", BOX % "71", 0),
        (MATH, "72", "72, without a box", 0),
        (MATH, "72", BOX % "\\frac{", 0),
    ],
)
def test_verifiers(verifier, reference, response, reward):
    assert verifier(prompt(reference), response) == reward


EXPLOSIVE = ("9^{9^{9^{9}}}", "9^{99999999}", "(x+1)^{100000}", "\\sum_{k=1}^{10^9} \\frac{1}{k^3+k+1}")


def test_explosive_answers_cost_their_own_reward():
    """Each of them burns its process; the others of the batch are judged, and so is the next batch."""
    answers = [*EXPLOSIVE, "36 * 2", *EXPLOSIVE, "36"]
    started = time.monotonic()
    verdicts = MATH.judge([prompt("72")] * len(answers), [BOX % answer for answer in answers])
    gave_up = Verdict(0.0, gave_up=True)
    assert verdicts == [gave_up] * 4 + [Verdict(1.0)] + [gave_up] * 4 + [Verdict(0.0)]
    assert time.monotonic() - started < 30  # equal ones are tried once: 4 of 1 s on 2 processes
    assert MATH.judge([prompt("72")], [BOX % "144/2"]) == [Verdict(1.0)]


def test_a_worker_that_was_killed_while_idle_costs_no_reward():
    verifier = MathVerify(workers=1)
    assert verifier.judge([prompt("72")], [BOX % "144/2"]) == [Verdict(1.0)]
    worker = verifier._pool._idle.get()
    worker._process.kill()
    worker._process.wait()
    verifier._pool._idle.put(worker)
    assert verifier.judge([prompt("72")], [BOX % "216/3"]) == [Verdict(1.0)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_workers_that_die_leave_no_descriptors():
    verifier = MathVerify(workers=1, seconds=0.5)

    def after_one_more(answer):
        assert verifier.judge([prompt("72")], [BOX % answer]) == [Verdict(0.0, gave_up=True)]
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    first = after_one_more(EXPLOSIVE[0])
    assert after_one_more(EXPLOSIVE[1]) <= first  # fewer where an earlier test's are let go of meanwhile


def test_memory_is_bounded():
    verifier = MathVerify(workers=1, memory_gib=0.5)
    assert verifier(prompt("2"), BOX % "4/2") == 1
    worker = verifier._pool._idle.get()  # a process ends with its worker
    limits = Path(f"/proc/{worker._process.pid}/limits").read_text()
    assert re.search(rf"Max address space +{2**29} +{2**29} ", limits)


def test_an_answer_of_excessive_length_is_not_tried():
    verdicts = MATH.judge([prompt("2")] * 2, [BOX % ("1+" * 3000 + "1"), BOX % ("1+" * 3 + "1")])
    assert verdicts == [Verdict(0.0, gave_up=True), Verdict(0.0)]


def test_a_reference_that_cannot_be_read_is_a_failure():
    (verdict,) = MATH.judge([prompt("}")], [BOX % "3"])
    assert "math-verify cannot read the reference answer" in verdict.failure
    with pytest.raises(ValueError, match="cannot read the reference"):
        MATH(prompt("}"), BOX % "3")


def test_workers_end_with_their_owner():
    verifier = MathVerify(workers=1)
    assert verifier(prompt("2"), BOX % "4/2") == 1
    worker = verifier._pool._idle.get()
    pid = worker._process.pid
    os.kill(pid, 0)
    del verifier, worker
    gc.collect()
    deadline = time.monotonic() + 10
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":  # dead, if not yet buried
        assert time.monotonic() < deadline
        time.sleep(0.01)


def length(prompt, response):
    return len(response)


def fragile(prompt, response):
    if "!" in response:
        raise KeyError("no '!'")
    if "q" in response:
        sys.exit(3)
    return None if "?" in response else 1


def test_several_rewards_are_weighted_and_kept_apart():
    rewards = (Reward("right", ExactMatch("whole")), Reward("length", length, weight=-0.1))
    judged = judge(rewards, [prompt("ab")] * 2, ["ab", "abc"])
    np.testing.assert_allclose(judged.total, [0.8, -0.3])
    np.testing.assert_array_equal(judged.components["right"], [1, 0])
    np.testing.assert_array_equal(judged.components["length"], [2, 3])
    assert (judged.failures, judged.gave_up) == ((), 0)


def test_a_verifier_that_raises():
    """A failure costs its own reward and is counted; too many of them stop the run, naming the first prompt."""
    prompts, responses = [prompt("a", i) for i in range(4)], ["a", "a!", "a", "a"]
    rewards = (Reward("one", fragile, 2.0), Reward("right", ExactMatch("whole")))
    judged = judge(rewards, prompts, responses)
    check_failures(judged, prompts, 0.25)
    np.testing.assert_array_equal(judged.total, [3, 0, 3, 3])
    assert [f.message for f in judge(rewards, prompts[:1], ["q"]).failures] == ["SystemExit: 3"]
    assert [(f.reward, f.row, f.message) for f in judged.failures] == [("one", 1, "KeyError: \"no '!'\"")]
    responses[3] = "?"
    with pytest.raises(UserError) as error:
        check_failures(judge(rewards, prompts, responses), prompts, 0.25)
    assert str(error.value) == (
        "reward 'one': its verifier failed on 2 of 4 responses, more than task.max_verifier_failures allows; first on "
        "prompt 1 ('question 1'): KeyError: \"no '!'\". Mend the verifier or the data"
    )


def test_what_is_no_number_is_a_failure():
    for value in (float("nan"), float("inf"), "many", None):
        judged = judge((Reward("x", lambda prompt, response, value=value: value),), [prompt("a")], ["a"])
        assert judged.total.tolist() == [0]
        assert len(judged.failures) == 1
    judged = judge((Reward("x", Numeric("whole")),), [prompt("no number")], ["1"])
    assert judged.failures[0].message == "ValueError: the reference answer 'no number' is no number"


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """Judges a batch by its responses; may break in several ways."""

    lose: int = 0

    def judge(self, prompts, responses):
        if "!" in responses:
            raise KeyError("no '!'")
        odd = {"?": Verdict(float("nan")), "none": Verdict(None), "failed": Verdict(5.0, failure="of its own")}
        verdicts = [odd.get(response, Verdict(len(response))) for response in responses]
        return verdicts[self.lose :]


def test_verifiers_of_batches():
    """One that raises, or gives no number, has failed; a batch that lacks verdicts is the author's mistake."""
    asked = [prompt("a")] * 3
    check_rewards_config((Reward("x", AtOnce()),))  # it need not be callable
    judged = judge((Reward("x", AtOnce(), 2.0),), asked, ["ab", "?", ""])
    assert judged.total.tolist() == [4, 0, 0]
    assert [(f.row, f.message) for f in judged.failures] == [(1, "it returned nan")]
    judged = judge((Reward("x", AtOnce()),), asked, ["none", "failed", ""])
    assert judged.total.tolist() == [0, 0, 0]
    assert [f.message[:20] for f in judged.failures] == ["TypeError: float() a", "of its own"]
    judged = judge((Reward("x", AtOnce()),), asked, ["ab", "!", ""])
    assert judged.total.tolist() == [0, 0, 0]
    assert {f.message for f in judged.failures} == {"KeyError: \"no '!'\""}
    with pytest.raises(UserError, match=r"AtOnce.judge returned 2 of Verdict for 3 responses: expected a Verdict for"):
        judge((Reward("x", AtOnce(lose=1)),), asked, ["ab", "?", ""])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ((), "task.rewards is empty"),
        ((Reward("A b", length),), "name 'A b': expected lower-case"),
        ((Reward("a", length), Reward("a", length)), "name 'a': expected .* each name once"),
        ((Reward("a", length, float("nan")),), "weight nan of 'a': expected a finite number"),
        ((Reward("a", MathVerify(seconds=0)),), "MathVerify of 'a': seconds = 0: expected above 0"),
        ((Reward("a", MathVerify(workers=-1)),), "workers = -1: expected 0 \\(a default\\) or more"),
        ((Reward("a", MathVerify(memory_gib=0.1)),), "memory_gib = 0.1: expected at least 0.25"),
        ((Reward("a", length, "1"),), "task.rewards: weight = '1': expected a number"),
        ((Reward("a", ExactMatch("bocksed")),), "extract = 'bocksed' of 'a': expected one of any, "),
        ((Reward("a", lambda text: 1.0),), "cannot be called as \\(prompt, response\\): too many positional"),
        ((Reward(3, length),), "task.rewards: name = 3: expected a text"),
        ((Reward("a", MathVerify),), "the verifier of 'a' is the class MathVerify: give MathVerify\\(\\)"),
        ((Reward("a", "length"),), "the verifier of 'a' is 'length', expected a function"),
    ],
)
def test_bad_rewards(rewards, message):
    with pytest.raises(UserError, match=message):
        check_rewards_config(rewards)


def test_math_verify_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="MathVerify needs math-verify: pip install"):
        check_rewards_config((Reward("a", MATH),))
