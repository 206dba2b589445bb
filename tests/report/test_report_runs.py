"""Runs of a report: reading, grouping by seed, naming, differences of configs."""

import json
import re
from pathlib import Path

import pytest

from rlstab_jax.report.runs import common_name, differences, group_runs, read_runs
from rlstab_jax.types import UserError
from tests.report.synthetic import write_run


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two replays with two seeds each, of which one is longer."""
    write_run(tmp_path / "live-seed0", seed=0)
    write_run(tmp_path / "live-seed1", seed=1, steps=3, gradient_steps=96)
    write_run(tmp_path / "r3-seed0", learner__replay="r3")
    write_run(tmp_path / "r3-seed10", seed=10, learner__replay="r3")
    return tmp_path


def test_runs_that_differ_in_seed_and_length_are_a_group(study):
    groups = group_runs(read_runs([study]))
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("live", ["live-seed0", "live-seed1"]),
        ("r3", ["r3-seed0", "r3-seed10"]),
    ]
    assert [run.steps for run in groups[0].runs] == [24, 6]


def test_other_code_and_what_was_moved_aside_are_groups_of_their_own(tmp_path):
    for name, seed in (("a-seed0", 0), ("a-seed1", 1), ("a-seed1.old-1", 2)):
        write_run(tmp_path / name, seed=seed)
    assert [len(group.runs) for group in group_runs(read_runs([tmp_path]))] == [2, 1]
    manifest = tmp_path / "a-seed1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"code": {"the code of mine.loss": "1"}}))
    groups = group_runs(read_runs([tmp_path]))
    assert [len(group.runs) for group in groups] == [1, 1, 1]
    differ, _ = differences(groups)
    assert "the code of mine.loss" in str(differ)


def test_groups_may_span_other_fields(study):
    (group,) = group_runs(read_runs([study]), over=("seed", "learner.replay"))
    assert len(group.runs) == 4
    with pytest.raises(UserError, match=r"--over learner.reply: no run's config has such a field"):
        group_runs(read_runs([study]), over=("learner.reply",))


def test_differences_by_hand(study):
    differ, shared = differences(group_runs(read_runs([study])))
    assert [tuple(one) for one in differ] == [
        ("seed", [("0", "1"), ("0", "10")]),
        ("gradient_steps", [("24", "96"), ("24",)]),
        ("learner.replay", [('"live"',), ('"r3"',)]),
    ]
    assert ("learner.learning_rate", "0.001") in shared
    assert ("versions.jax (not config)", '"0.10.2"') in shared


def test_a_field_that_a_run_lacks_is_absent(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lag=3)
    differ, _ = differences(group_runs(read_runs([tmp_path / "a", tmp_path / "b"])))
    assert [tuple(one) for one in differ] == [("lag", [(None,), ("3",)])]


def test_equal_beginnings_are_told_apart(tmp_path):
    write_run(tmp_path / "x-seed0")
    write_run(tmp_path / "x-seed1", seed=1, minibatches=4)
    assert [group.label for group in group_runs(read_runs([tmp_path]))] == ["x-seed0", "x-seed1"]
    write_run(tmp_path / "other" / "x-seed0", minibatches=8)
    runs = read_runs([tmp_path / "x-seed0", tmp_path / "other" / "x-seed0"])
    assert [run.name for run in runs] == [f"{tmp_path.name}/x-seed0", "other/x-seed0"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["quickstart-seed0", "quickstart-seed10"], "quickstart"),
        (["r3-0", "r3-1"], "r3"),
        (["r3-seed1"], "r3"),
        (["seed4"], "seed4"),
        (["lr2", "lr23"], "lr2, lr23"),
        (["run-10", "run-12"], "run"),
        (["a", "b", "c", "d"], "a and 3 more"),
    ],
)
def test_names_of_groups(names, expected):
    assert common_name(names) == expected


def test_a_run_is_read_once_and_in_order_of_numbers(tmp_path):
    for seed in (10, 2):
        write_run(tmp_path / f"seed{seed}", seed=seed)
    runs = read_runs([tmp_path, tmp_path / "seed2", tmp_path / ".." / tmp_path.name / "seed10"])
    assert [run.name for run in runs] == ["seed2", "seed10"]


def test_a_run_that_is_being_written(tmp_path):
    run = write_run(tmp_path / "torn")
    with run.metrics_path.open("ab") as file:
        file.write(b'{"progress/gradient_steps": 2')
    assert read_runs([tmp_path])[0].steps == 24
    with run.metrics_path.open("ab") as file:
        file.write(b"6}\n{}\n")
    assert read_runs([tmp_path])[0].steps == 26


def test_runs_without_a_step_are_left_out_and_said(tmp_path):
    write_run(tmp_path / "begun")
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "manifest.json").write_text('{"config": {"seed": 0}}')
    said: list[str] = []
    assert len(read_runs([tmp_path / "begun", tmp_path / "early"], said.append)) == 1
    assert said == [f"{tmp_path / 'early'} is left out: it has no step yet"]
    with pytest.raises(UserError, match="no run there has a step yet"):
        read_runs([tmp_path / "early"], said.append)


def test_a_damaged_run_is_left_out_and_said(tmp_path):
    write_run(tmp_path / "good")
    _torn_in_the_middle(tmp_path / "torn")
    said: list[str] = []
    assert [run.name for run in read_runs([tmp_path], said.append)] == ["good"]
    (line,) = said
    assert line.startswith("left out: ")
    assert line.endswith("torn/metrics.jsonl, line 2 is no JSON object: mend or remove it")


def _nothing(path: Path) -> None:
    pass


def _file(path: Path) -> None:
    path.write_text("x")


def _no_config(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text("{}")


def _no_json(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text("{")


def _torn_in_the_middle(path: Path) -> None:
    write_run(path).metrics_path.write_text('{"reward/mean": 1}\n5\n{}\n')


def _a_step_twice(path: Path) -> None:
    file = write_run(path).metrics_path
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[-1]]))


def _sample_without_a_step(path: Path) -> None:
    write_run(path).samples_path.write_text('{"global_step": 1}\n{"reward": 1}\n')


def _reward_in_words(path: Path) -> None:
    write_run(path).samples_path.write_text('{"global_step": 1, "reward": "1"}\n')


def _no_gradient_steps(path: Path) -> None:
    write_run(path).metrics_path.write_text(json.dumps({"reward/mean": 1}) + "\n")


def _beside_runs(path: Path) -> None:
    path.mkdir()
    write_run(path.parent / "a run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "x: there is no such directory; give a run's, such as runs/quickstart-seed0"),
        (_file, "x is a file; give the directory of the run"),
        (Path.mkdir, "x: no manifest.json is there, so it is no run; give the directory of a run"),
        (_beside_runs, "so it is no run; give the directory of a run, or .* for all runs in it"),
        (_no_config, "x: its manifest.json holds no config; is it the directory of a run?"),
        (_no_json, "x: its manifest.json cannot be read"),
        (_torn_in_the_middle, "x/metrics.jsonl, line 2 is no JSON object: mend or remove it"),
        (
            _a_step_twice,
            "x/metrics.jsonl: progress/gradient_steps is 24 after 24; are these the lines of several runs?",
        ),
        (_sample_without_a_step, "x/samples.jsonl, line 2: expected a global_step and a reward that are numbers"),
        (_reward_in_words, "x/samples.jsonl, line 1: expected a global_step and a reward that are numbers"),
        (_no_gradient_steps, "x/metrics.jsonl holds no progress/gradient_steps: is it of a training run?"),
    ],
)
def test_mistakes_are_one_line(make, message, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(UserError) as error:
        read_runs([tmp_path / "x"])
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
