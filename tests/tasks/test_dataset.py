"""Tasks made of files: ids, splits, templates, what is left out, and how responses are judged."""

import dataclasses
import json
import math
import string
import sys

import numpy as np
import pytest

from rlstab_jax.tasks import (
    AnsweredTask,
    ArithmeticConfig,
    BatchTask,
    CharTokenizer,
    Dataset,
    DatasetConfig,
    DemonstratedTask,
    DescribedTask,
    ExactMatch,
    Fields,
    Reward,
    Rewards,
    build_task,
    check_judge,
    dataset,
    prompt_iterator,
    reward_of,
)
from rlstab_jax.tasks.dataset import prompt_ids
from rlstab_jax.types import UserError
from tests.tasks.test_records import written

EXACT = (Reward("exact", ExactMatch("whole")),)
SUMS = [{"prompt": f"{a}+{b}=", "answer": a + b, "how": f"That is {a + b}"} for a in range(10) for b in range(10)]


def config(*train, **changes):
    return DatasetConfig(train=tuple(map(str, train)), **({"alphabet": string.printable, "rewards": EXACT} | changes))


def texts(task, name):
    return [task.split(name)[i].text for i in range(len(task.split(name)))]


@pytest.fixture
def sums(tmp_path):
    return written(tmp_path / "sums.jsonl", SUMS)


def test_it_keeps_every_protocol(sums):
    task = config(sums).build()
    for protocol in (BatchTask, DemonstratedTask, DescribedTask, AnsweredTask):
        assert isinstance(task, protocol)


def test_ids_do_not_depend_on_order_or_files(sums, tmp_path):
    """Nor do the order of the prompts and the split; some new records leave the others' ids as they are."""
    halves = [written(tmp_path / "b.parquet", SUMS[50:][::-1]), written(tmp_path / "a.jsonl", SUMS[:50])]
    one, other = config(sums).build(), config(*halves).build()
    more = config(sums, written(tmp_path / "more.jsonl", [{"prompt": "new", "answer": "1"}])).build()
    for name in ("train", "heldout"):
        assert list(one.split(name)) == list(other.split(name))
        assert set(one.split(name)) <= set(more.split(name))
    assert one.description == other.description
    assert one.description["fingerprint"] != more.description["fingerprint"]
    prompts = [*one.split("train"), *one.split("heldout")]
    assert sorted(p.text for p in prompts) == sorted(record["prompt"] for record in SUMS)
    assert len({p.id for p in prompts}) == 100
    assert all(0 <= p.id < 2**31 for p in prompts)


def test_colliding_ids_are_resolved_by_the_texts_alone():
    letters = string.ascii_lowercase[:16]
    ids = prompt_ids(letters, bits=4)
    assert sorted(ids.values()) == list(range(16))
    assert prompt_ids(letters[::-1], bits=4) == ids


def test_a_share_is_held_out(sums):
    for share, fewest, most in ((0.0, 0, 0), (0.2, 10, 32), (0.9, 80, 98)):
        task = config(sums, heldout_share=share).build()
        assert fewest <= len(task.split("heldout")) <= most
        assert not set(texts(task, "heldout")) & set(texts(task, "train"))


def test_a_held_out_file_has_a_layout_of_its_own(sums, tmp_path):
    heldout = written(tmp_path / "heldout.jsonl", [{"question": "Two and two?", "answer": "It is #### 4"}])
    task = config(sums, heldout=(str(heldout),), heldout_layout="gsm8k").build()
    assert texts(task, "heldout") == ["Two and two?"]
    assert len(task.split("train")) == 100


def test_what_is_held_out_in_a_file_is_not_trained_on(sums, tmp_path):
    heldout = written(tmp_path / "heldout.jsonl", [SUMS[3], SUMS[3], {"prompt": "new", "answer": 1}])
    task = config(sums, heldout=(str(heldout),)).build()
    assert sorted(texts(task, "heldout")) == sorted([SUMS[3]["prompt"], "new"])
    assert len(task.split("train")) == 99
    assert SUMS[3]["prompt"] not in texts(task, "train")
    assert task.description["left_out"] == {
        "held-out records whose prompt was there already": 1,
        "training prompts that are held out": 1,
    }
    assert task.remarks() == [
        "data: 99 prompts to train on, 2 held out",
        "data: left out: 1 held-out records whose prompt was there already",
        "data: left out: 1 training prompts that are held out",
    ]


def test_long_prompts_are_left_out_and_counted(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"prompt": "x" * n, "answer": 1} for n in range(1, 11)])
    task = config(path, max_prompt_tokens=4, heldout_share=0.0).build()
    assert sorted(texts(task, "train")) == ["x", "xx", "xxx", "xxxx"]
    assert task.max_prompt_tokens == 4
    assert task.description["left_out"] == {"training prompts of more than 4 tokens": 6}
    assert config(path).build().max_prompt_tokens == 10
    with pytest.raises(UserError, match=r"b\.jsonl: all prompts have more than task\.max_prompt_tokens = 1 tokens"):
        config(written(tmp_path / "b.jsonl", [{"prompt": "xx", "answer": 1}]), max_prompt_tokens=1).build()


def test_grain_takes_up_where_it_was(sums):
    source = config(sums).build().split("train")
    iterator = prompt_iterator(source, 7, seed=1)
    for _ in range(20):  # into the second epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(20)]
    restored = prompt_iterator(config(sums).build().split("train"), 7, seed=1)
    restored.set_state(state)
    assert [next(restored) for _ in range(20)] == expected


class StandIn(CharTokenizer):
    """A character tokeniser that has a chat template."""

    def __init__(self, directory, stop, today):
        super().__init__(string.printable)
        self.directory, self.stop, self.today = directory, stop, today

    def chat(self, messages):
        return "".join(f"<{message['role']}>{message['content']}\n" for message in messages) + "<assistant>"


@pytest.fixture
def hf_tokenizer(monkeypatch):
    monkeypatch.setattr(dataset, "HFTokenizer", StandIn)


MESSAGES = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 3 ="}]


@pytest.mark.usefixtures("hf_tokenizer")
def test_templates(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"prompt": "1 + {1}", "answer": 2}, {"messages": MESSAGES, "answer": 5}])
    common = {"alphabet": "", "tokenizer": "some/folder", "heldout_share": 0.0}
    task = config(path, chat=True, template="{prompt} = ? \\boxed{}", stop=("</a>",), **common).build()
    assert (task.tokenizer.directory, task.tokenizer.stop) == ("some/folder", ("</a>",))
    assert str(task.tokenizer.today) == task.config.chat_date
    assert sorted(texts(task, "train")) == [
        "<system>Count.\n<user>2 + 3 =\n<assistant>",
        "<user>1 + {1} = ? \\boxed{}\n<assistant>",
    ]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the prompt has 2 messages, which only a chat template"):
        config(path, **common).build()
    single = written(tmp_path / "b.jsonl", [{"prompt": MESSAGES[1:], "answer": 5}])
    assert texts(config(single, **common).build(), "train") == ["2 + 3 ="]


def test_another_file_in_another_layout(sums, tmp_path):
    """Read in its order, with the task's template and ids."""
    task = config(sums, template="Q: {prompt}").build()
    records = [{"question": q, "answer": f"#### {i}"} for i, q in enumerate(["one?", "two?", "one?"])]
    prompts = task.read(str(written(tmp_path / "g.jsonl", records)), "gsm8k")
    assert [(p.text, p.answer) for p in prompts] == [("Q: one?", "0"), ("Q: two?", "1")]
    known = task.split("train")[0]
    assert task.read(str(sums))[[p.text for p in task.read(str(sums))].index(known.text)] == known


def test_judging(sums):
    task = config(sums).build()
    prompt = task.split("train")[0]
    assert task.reward(prompt, prompt.answer) == 1
    assert task.reward(prompt, prompt.answer, stopped=False) == 0
    assert task.reward(prompt, "no") == 0
    rewards = task.rewards([prompt] * 3, [(prompt.answer, False), ("no", True), (prompt.answer, True)])
    np.testing.assert_array_equal(rewards.total, [0, 0, 1])
    np.testing.assert_array_equal(rewards.components["exact"], [0, 0, 1])
    cut = config(sums, judge_truncated=True).build()
    assert cut.reward(prompt, prompt.answer, stopped=False) == 1
    assert config(sums, answer_in="boxed").build().answer_of("\\boxed{3}") == "3"


def worth(prompt, response):
    return 1.0 if response == prompt.answer else -1.0


def test_a_response_that_never_stops_is_not_worth_more_than_a_wrong_one(sums):
    """Not without being asked for: where verifiers give less than 0, its reward has to be said."""
    priced = {"rewards": (Reward("worth", worth),)}
    task = config(sums, **priced).build()
    prompt = task.split("train")[0]
    assert task.reward(prompt, prompt.answer) == 1
    with pytest.raises(UserError, match=r"worth -1, less than the 0 .* set task.truncated_reward"):
        task.rewards([prompt] * 2, [(prompt.answer, True), ("no", True)])
    responses = [(prompt.answer, True), ("no", True), (prompt.answer, False)]
    for reward in (-1.5, 0.0):
        rewards = config(sums, **priced, truncated_reward=reward).build().rewards([prompt] * 3, responses)
        np.testing.assert_array_equal(rewards.total, [1, -1, reward])
        np.testing.assert_array_equal(rewards.components["worth"], [1, -1, 0])
    judged = config(sums, **priced, judge_truncated=True).build().rewards([prompt] * 3, responses)
    np.testing.assert_array_equal(judged.total, [1, -1, 1])


def test_a_reward_that_nobody_would_ask_is_refused(sums):
    class Mine(dataset.Dataset):
        def reward(self, prompt, response, *, stopped=True):
            return 42.0

    class Whole(Mine):
        def rewards(self, prompts, responses):
            return Rewards(np.full(len(prompts), 42.0))

    with pytest.raises(UserError, match="Mine has a `reward` of its own, but it inherits `rewards`"):
        check_judge(Mine(config(sums)))
    check_judge(Whole(config(sums)))
    check_judge(config(sums).build())
    check_judge(ArithmeticConfig().build())


def test_a_failure_is_of_its_own_row(sums):
    """Rows count in the whole batch, with those that no verifier was shown."""

    def fails(prompt, response):
        raise RuntimeError(response)

    task = config(sums, rewards=(Reward("fails", fails),), max_verifier_failures=1.0).build()
    prompt = task.split("train")[0]
    rewards = task.rewards([prompt] * 3, [("a", True), ("b", False), ("c", True)])
    assert [(f.row, f.message) for f in rewards.failures] == [(0, "RuntimeError: a"), (2, "RuntimeError: c")]
    strict = config(sums, rewards=(Reward("fails", fails),), max_verifier_failures=0.5).build()
    with pytest.raises(UserError, match="its verifier failed on 2 of 2 responses, more than"):
        strict.check(rewards, [prompt] * 3)  # of those that it was shown, however many were cut off
    right = config(sums).build().rewards([prompt] * 3, [("a", True), ("b", True), ("c", False)])
    both = Rewards.joined([dataclasses.replace(rewards, components={}), dataclasses.replace(right, components={})])
    strict.check(both, [prompt] * 6)  # a share of the whole batch, whoever judged which part of it


def test_a_task_that_is_none_or_whose_reward_fails_is_named(sums):
    class Mine(DatasetConfig):
        made = None

        def build(self):
            if isinstance(self.made, Exception):
                raise self.made
            return self.made

    for made, message in (
        (None, r"task: Mine.build\(\) returned NoneType without tokenizer, .*reward: expected a task"),
        (ZeroDivisionError("no"), r"task: Mine.build\(\) failed: ZeroDivisionError: no"),
    ):
        Mine.made = made
        with pytest.raises(UserError, match=message):
            build_task(Mine())

    class Broken(Dataset):
        def reward(self, prompt, response, *, stopped):
            return {"a": float, "b": "text", "c": sys.exit}[response]()

    task, prompt = Broken(DatasetConfig(alphabet="ab")), config(sums).build().split("train")[0]
    assert reward_of(task, prompt, "a", True) == 0
    for response, message in (("b", "TypeError: 'str'"), ("c", "SystemExit:")):
        with pytest.raises(UserError, match=f"Broken.reward failed on the response '{response}' to prompt .*{message}"):
            reward_of(task, prompt, response, True)


def test_what_is_demonstrated_has_a_fingerprint_of_its_own(sums, tmp_path):
    """A cold start learns from it; a run that is there does not."""
    others = written(tmp_path / "others.jsonl", [record | {"how": f"{record['answer']}!"} for record in SUMS])
    one, other = (config(file, fields=Fields(demonstration="how")).build().description for file in (sums, others))
    assert one["fingerprint"] == other["fingerprint"]
    assert one["demonstrations"] != other["demonstrations"]


def test_demonstrations(sums):
    task = config(sums, fields=Fields(demonstration="how")).build()
    prompt = task.split("train")[5]
    assert task.demonstration(prompt, 3) == f"That is {prompt.answer}"
    with pytest.raises(UserError, match=r"sums\.jsonl, line \d+: the record demonstrates no answer"):
        config(sums).build().demonstration(prompt, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_share": 1.0}, "task.heldout_share = 1.0: expected a share"),
        ({"template": "{question}"}, "task.template = '{question}': expected a text with {prompt} in it"),
        ({"alphabet": ""}, "task.tokenizer = '': expected either a directory, or task.alphabet"),
        ({"tokenizer": "here"}, "task.tokenizer = 'here': expected either a directory, or task.alphabet"),
        ({"alphabet": "aa"}, "task.alphabet = 'aa': expected each character once"),
        ({"stop": ("</a>",)}, "task.stop = ('</a>',): expected (), without a tokenizer"),
        ({"chat": True}, "task.chat = True: expected False, without a tokenizer"),
        ({"chat_date": "26 Jul 2024"}, "task.chat_date = '26 Jul 2024': expected a date as YYYY-MM-DD"),
        ({"max_prompt_tokens": -1}, "task.max_prompt_tokens = -1: expected 0"),
        ({"response_tokens": 0}, "task.response_tokens = 0: expected at least 1"),
        ({"max_verifier_failures": 2.0}, "task.max_verifier_failures = 2.0: expected a share"),
        ({"truncated_reward": math.inf}, "task.truncated_reward = inf: expected a finite number"),
        ({"rewards": ()}, "task.rewards is empty"),
        ({"alphabet": "0123456789+"}, "sums.jsonl, line 1: text '0+0=': no token for '='"),
        ({"layout": "gsm8k"}, "sums.jsonl, line 1: no field 'question', which layout 'gsm8k' reads"),
        ({"heldout_share": 0.9999999}, "sums.jsonl: all prompts are held out"),
    ],
)
def test_bad_configs(changes, message, sums):
    with pytest.raises(UserError) as error:
        config(sums, **changes).build()
    assert message in str(error.value)


def test_an_empty_data_set(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: the data set is empty, expected at least one record"):
        config(tmp_path / "empty.jsonl").build()
    task = config().build()
    with pytest.raises(UserError, match="the prompt source is empty"):
        prompt_iterator(task.split("train"), 2, seed=0)
