"""The cold start: until an accuracy, kept for the next run, refused where it cannot be."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlstab_jax.learner import init_state
from rlstab_jax.learner.update import LearnerConfig
from rlstab_jax.tasks import ArithmeticConfig, DemonstratedTask, Fields, TaskConfig
from rlstab_jax.training import cold_start as cold_start_module
from rlstab_jax.training.cold_start import ColdStart, cold_start, demonstrations, supervised_update
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, beginning, build, initial_params
from rlstab_jax.training.interrupt import Stop
from rlstab_jax.training.lock import held
from rlstab_jax.training.run import train
from rlstab_jax.types import UserError
from tests.tasks.test_records import written
from tests.training import dataset_run, tiny_run


@dataclasses.dataclass(frozen=True)
class Undemonstrated(TaskConfig):
    """A task that only judges."""

    def build(self) -> Any:
        task = TASK.build()
        return _OnlyJudges(
            task.tokenizer, task.max_prompt_tokens, task.max_response_tokens, task.split, task.reward
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _OnlyJudges:
    tokenizer: Any
    max_prompt_tokens: int
    max_response_tokens: int
    split: Any
    reward: Any


# Modulo 2: right every other time as soon as the form of an answer is learnt.
TASK = ArithmeticConfig(operands=(1, 6), operators="+*", modulus=2, base=2, scratchpad=0, heldout_prompts=8)


def config(**changes: Any) -> RunConfig:
    default = tiny_run.config()
    default = dataclasses.replace(default, task=TASK)
    start = {"max_steps": 200, "target_accuracy": 0.4, "check_every": 5, "batch_size": 16, "learning_rate": 1e-2}
    start["check_prompts"] = 8
    return dataclasses.replace(default, cold_start=dataclasses.replace(default.cold_start, **start | changes))


def engines(**changes: Any) -> Engines:
    return build(config(**changes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold_start")


@pytest.fixture(scope="module")
def first(cache: Path) -> ColdStart:
    started = cold_start(engines(), cache, say=lambda line: None)
    assert started is not None
    return started


def assert_same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_reaches_its_target_and_is_kept(first: ColdStart, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first.accuracy >= 0.4
    assert 0 < first.steps < 200
    assert first.steps % 5 == 0
    lines: list[str] = []
    monkeypatch.setattr(cold_start_module, "_train", None)  # not called again: taken from the cache
    kept = cold_start(engines(), cache, lines.append)
    assert kept is not None
    assert (kept.accuracy, kept.steps) == (first.accuracy, first.steps)
    assert_same(kept.params, first.params)
    (entry,) = cache.iterdir()
    assert lines == [f"cold start: accuracy {first.accuracy:.3f} after {first.steps} updates, from {entry}"]


class OwnConfig(ArithmeticConfig):
    """The same fields; what its tasks demonstrate is its own affair."""


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"seed": 5, "gradient_steps": 2, "minibatches": 1}, True),
        ({"cold_start": dataclasses.replace(config().cold_start, seed=1)}, False),
        ({"task": dataclasses.replace(TASK, seed=1)}, False),
        ({"task": OwnConfig(**vars(TASK))}, False),
        ({"model": dataclasses.replace(tiny_run.MODEL, rope_theta=10.0)}, False),
    ],
)
def test_runs_that_share_one(changes: dict, shared: bool) -> None:
    """Those that differ only in what comes after it."""
    of_default = cold_start_module._fingerprint(engines())
    assert (cold_start_module._fingerprint(build(dataclasses.replace(config(), **changes))) == of_default) is shared


def test_it_does_not_depend_on_how_evaluations_draw(first: ColdStart) -> None:
    """So runs that differ in that may share one."""
    greedy = dataclasses.replace(config().evaluation, temperature=0.0, top_k=1)
    of = build(dataclasses.replace(config(), evaluation=greedy))
    assert cold_start_module._fingerprint(of) == cold_start_module._fingerprint(engines())
    again = cold_start(of, None, say=lambda line: None)
    assert again is not None
    assert (again.accuracy, again.steps) == (first.accuracy, first.steps)
    assert_same(again.params, first.params)


def test_a_damaged_one_is_made_again(first: ColdStart, cache: Path, tmp_path: Path) -> None:
    (entry,) = cache.iterdir()
    for header in entry.glob("*/header/metadata"):
        header.unlink()
    lines: list[str] = []
    again = cold_start(engines(), cache, lines.append)
    assert again is not None
    assert_same(again.params, first.params)
    assert lines[0].startswith(
        f"cold start: it is made again, since the kept one cannot be used and is now {entry}.old-1: "
    )
    assert "no good checkpoint" in lines[0]
    assert any(Path(f"{entry}.old-1").iterdir())
    kept = cold_start(engines(), cache, lines.append)
    assert kept is not None
    assert "from" in lines[-1]


def finished(first: ColdStart, cache: Path) -> list[str]:
    """The lines of a cold start there, which must end as the first one did."""
    lines: list[str] = []
    started = cold_start(engines(), cache, lines.append)
    assert started is not None
    assert (started.accuracy, started.steps) == (first.accuracy, first.steps)
    assert_same(started.params, first.params)
    return lines


class StopAt(Stop):
    """Asks to stop after so many more updates than one."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.left = updates

    def agreed(self) -> bool:
        self.left -= 1
        return self.left < 0


class KilledAt(StopAt):
    """And does not wait for an answer."""

    def agreed(self) -> bool:
        if super().agreed():
            raise KeyboardInterrupt
        return False


@pytest.mark.parametrize("update", [0, 4])  # the first, and one after which the accuracy is checked
def test_a_stopped_one_goes_on_bit_for_bit(first: ColdStart, update: int, tmp_path: Path) -> None:
    assert cold_start(engines(), tmp_path, print, StopAt(update)) is None
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.suffix == ".unfinished"
    lines: list[str] = []
    # Another number of steps that are allowed is no reason to begin anew, and is another entry.
    started = cold_start(engines(max_steps=300), tmp_path, lines.append)
    assert started is not None
    assert lines[0] == f"cold start: going on after {update + 1} updates"
    assert (started.accuracy, started.steps) == (first.accuracy, first.steps)
    assert_same(started.params, first.params)
    (entry,) = tmp_path.iterdir()
    assert entry.suffix == ""


def test_a_killed_one_goes_on_from_its_last_save(
    first: ColdStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_start_module, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        cold_start(engines(), tmp_path, print, KilledAt(6))
    assert finished(first, tmp_path)[0] == "cold start: going on after 7 updates"


def test_a_damaged_unfinished_one_begins_anew(first: ColdStart, tmp_path: Path) -> None:
    assert cold_start(engines(), tmp_path, print, StopAt(2)) is None
    for header in tmp_path.glob("*.unfinished/*/header/metadata"):
        header.unlink()
    assert not any("going on" in line for line in finished(first, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_one_that_cannot_be_saved_goes_on_to_its_end(
    first: ColdStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for now; then what a version saved that had other optimiser states."""

    def full(*_: Any) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(cold_start_module, "SAVE_EVERY", 0.0)
        patch.setattr(cold_start_module.Checkpoints, "save", lambda saves, step, state, progress: (
            full() if "prompts" in progress else save(saves, step, state, progress)))  # fmt: skip
        lines = finished(first, tmp_path)
    assert lines[0] == "cold start: it cannot be saved before its end: no space left"
    shutil.rmtree(tmp_path)

    directory = tmp_path / f"{cold_start_module._fingerprint(engines(), max_steps=0)}.unfinished"
    with cold_start_module.Checkpoints(directory) as saves:
        saves.save(3, {"w": jax.numpy.ones(2)}, {})
    lines = finished(first, tmp_path)
    assert lines[0].startswith("cold start: it begins anew: ")
    assert lines[1] == f"cold start: it is not saved before its end; remove {directory}"


save = cold_start_module.Checkpoints.save


def test_two_that_are_made_at_once(first: ColdStart, tmp_path: Path) -> None:
    """The second one keeps its hands off what the first one saves."""
    name = cold_start_module._fingerprint(engines(), max_steps=0)
    with held(tmp_path / f"{name}.unfinished"):
        lines = finished(first, tmp_path)
    assert lines[0].startswith("cold start: another process makes the same one and saves it")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_is_stopped_in_it_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rlstab_jax.training.run.cold_start", lambda engines, cache, say, stop: setattr(
            stop, "reason", "SIGTERM"))  # fmt: skip
        assert train(config(), tmp_path / "run", say=lambda line: None) == "SIGTERM"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_no_steps_are_random_parameters(tmp_path: Path) -> None:
    of = engines(max_steps=0, seed=3)
    started = cold_start(of, tmp_path)
    assert started is not None
    assert_same(started.params, initial_params(of.training, 3))
    assert started.steps == 0
    assert not any(tmp_path.iterdir())


def test_updates_after_the_last_check_are_measured(tmp_path: Path) -> None:
    started = cold_start(engines(max_steps=3, target_accuracy=0.0), tmp_path, say=lambda line: None)
    assert started is not None
    assert started.steps == 3


def test_a_seed_of_32_bits() -> None:
    of = engines(max_steps=0)
    leaf = jax.tree.leaves(beginning(of, 2**32 - 2))[0]
    assert not np.array_equal(leaf, jax.tree.leaves(beginning(of, 2**31 - 2))[0])


def test_every_record_is_looked_at_before_the_first_update(tmp_path: Path) -> None:
    """One of many demonstrates more than there is room for: its batch might come after hours."""
    records = [{"prompt": f"{i}+1=", "answer": str(i + 1), "how": str(i + 1)} for i in range(40)]
    data = written(tmp_path / "sums.jsonl", [*records, {"prompt": "0+0=", "answer": "0", "how": "0+0=0+0=0"}])
    plain = dataset_run.config()
    task = dataclasses.replace(plain.task, train=(str(data),), fields=Fields(demonstration="how"))
    start = dataclasses.replace(config().cold_start, batch_size=2, check_prompts=2)
    with pytest.raises(UserError, match=r"the demonstration of prompt \d+ \('0\+0='\) has 10 tokens, but rollout"):
        cold_start(build(dataclasses.replace(plain, task=task, cold_start=start)), tmp_path, say=lambda line: None)


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"accuracy 0\.\d+ after cold_start.max_steps = 5 updates, short of .*target"):
        cold_start(engines(max_steps=5, target_accuracy=1.0), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".unfinished"]  # with more steps it goes on
    shutil.rmtree(tmp_path / "cache")
    other = dataclasses.replace(config(), task=Undemonstrated())
    with pytest.raises(UserError, match="this task has no demonstrations: set it to 0"):
        cold_start(build(other), tmp_path)
    short = dataclasses.replace(config(), rollout=dataclasses.replace(config().rollout, response_length=1))
    with pytest.raises(UserError, match=r"has 2 tokens, but rollout.response_length = 1: raise it, use 0, or"):
        cold_start(build(short), tmp_path)
    of = engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.task, "demonstration", lambda prompt, seed: {}[prompt.text])
        with pytest.raises(UserError, match=r"the demonstration of prompt \d+ \(.*\) failed: KeyError"):
            demonstrations(of, of.task, [of.task.split("train")[0]], seed=1)
    assert not any(tmp_path.iterdir())


def test_demonstrations_lie_as_rollouts_do() -> None:
    of = engines()
    source, tokenizer = of.task.split("train"), of.task.tokenizer
    prompts = [source[i] for i in range(4)]
    batch = demonstrations(of, of.task, prompts, seed=1)
    for row, prompt in enumerate(prompts):
        ids = np.asarray(batch.tokens[row])[np.asarray(batch.valid[row])]
        demonstration = of.task.demonstration(prompt, 1)  # type: ignore[attr-defined]
        assert tokenizer.decode(ids) == prompt.text + demonstration + "<stop>"
    assert batch.response_mask[:, 0].all()
    assert batch.tokens.shape == (4, of.config.rollout.prompt_length + of.config.rollout.response_length)


def test_demonstrations_are_fed_in_parts_where_minibatches_are() -> None:
    """Each no larger than RL's, whose memory is what was planned for; the gradient is the whole batch's."""

    def parts(micro_batches: int, batch: int, row_shards: int = 1) -> int:
        of = config(batch_size=batch)
        learner = dataclasses.replace(of.learner, micro_batches=micro_batches)
        return cold_start_module._micro_batches(dataclasses.replace(of, learner=learner), row_shards)

    rows = config().prompts_per_minibatch * config().samples_per_prompt
    assert rows == 8
    assert [parts(1, 64), parts(2, 64), parts(4, 64), parts(2, 12), parts(2, 7)] == [1, 16, 32, 3, 7]
    assert parts(2, 16, row_shards=4) == 4
    assert parts(4, 16, row_shards=4) == 1  # two rows do not divide over four devices

    of = engines()
    numbers = LearnerConfig(learning_rate=1e-2, warmup_steps=0).numbers()
    task = of.task
    assert isinstance(task, DemonstratedTask)
    batch = demonstrations(of, task, [task.split("train")[i] for i in range(8)], seed=1)
    states = [init_state(initial_params(of.training, 0), numbers) for _ in range(2)]
    (whole, loss), (summed, same) = (
        supervised_update(of.training, state, batch, numbers, 2**20, parts)
        for state, parts in zip(states, (1, 4), strict=True)
    )
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, whole.opt_state[1].mu, summed.opt_state[1].mu)  # the gradients
