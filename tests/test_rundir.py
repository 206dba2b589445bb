"""What a run leaves on disk: written, cut, torn, refused."""

import dataclasses
import enum
import errno
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from rlstab_jax.metrics import METRICS, STEP, describe
from rlstab_jax.rundir import RunDir, config_difference, open_run, plain, read_manifest, read_metrics
from rlstab_jax.types import UserError

MANIFEST = {"config": {"seed": 0, "learner": {"learning_rate": 1e-3, "cap": math.inf}, "steps": 10}, "devices": "cpu"}


def row(step: int, **more) -> dict:
    return {"progress/global_steps": step, "reward/mean": np.float32(0.1) * step, **more}


def run_of(path: Path, steps: int) -> RunDir:
    run = open_run(path, MANIFEST)
    for step in range(1, steps + 1):
        run.append_metrics(row(step))
        run.append_samples(step, [{"response": "81", "reward": 1.0}, {"response": "9", "reward": 0.0}])
    return run


def events(path: Path) -> list[tuple[int, dict[str, float]]]:
    """All steps of the event files, in the order in which TensorBoard reads them, with both checksums verified."""
    found = []
    for file in sorted(path.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while len(data) >= 16:
            (length,) = struct.unpack_from("<Q", data)
            body, end = data[12 : 12 + length], 16 + length
            if len(data) < end:
                break
            assert struct.unpack_from("<I", data, 8)[0] == masked_crc32c(data[:8])
            assert struct.unpack_from("<I", data, 12 + length)[0] == masked_crc32c(body)
            event = Event.FromString(body)
            if event.WhichOneof("what") == "summary":
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
            else:
                assert event.file_version == "brain.Event:2"
            data = data[end:]
    return found


def sample_steps(run: RunDir) -> list[int]:
    return [json.loads(line)["global_step"] for line in run.samples_path.read_text().splitlines()]


def test_names_resolve_to_their_definitions():
    assert describe("staleness/minibatch_03/k1") is METRICS["staleness/minibatch_NN/k1"]
    assert describe("routing/layer_117/rollout_vs_old") is METRICS["routing/layer_NN/rollout_vs_old"]
    assert describe("reward/component/math_2") is METRICS["reward/component/NAME"]
    assert all(describe(name) is metric for name, metric in METRICS.items())
    assert all(metric.meaning and metric.reduction and metric.unit for metric in METRICS.values())


@pytest.mark.parametrize(
    "name", ["reward", "staleness/minibatch_3/k1", "reward/layer_01/mean", "staleness/k1/", "discrepancy/k2"]
)
def test_undefined_names_are_refused(tmp_path, name):
    run = open_run(tmp_path / "run", MANIFEST)
    with pytest.raises(ValueError, match="not defined"):
        run.append_metrics({**row(1), name: 0.0})
    assert not run.metrics_path.exists()


def test_lines_are_strict_json_in_a_fixed_order(tmp_path):
    run = open_run(tmp_path / "run", MANIFEST)
    run.append_metrics({"reward/mean": np.float32(0.1), "progress/global_steps": np.int64(1), "weight/max": math.inf})
    run.append_metrics({"weight/max": math.nan, "reward/mean": 1 / 3, "progress/global_steps": 2})
    assert run.metrics_path.read_text() == (
        '{"progress/global_steps": 1, "reward/mean": 0.10000000149011612, "weight/max": null}\n'
        '{"progress/global_steps": 2, "reward/mean": 0.3333333333333333, "weight/max": null}\n'
    )
    steps = events(run.path)
    assert [step for step, _ in steps] == [1, 2]
    assert steps[0][1] == {"progress/global_steps": 1.0, "reward/mean": pytest.approx(0.1), "weight/max": math.inf}


def test_read_metrics_gives_columns(tmp_path):
    run = open_run(tmp_path / "run", MANIFEST)
    run.append_metrics(row(1))
    run.append_metrics(row(2, **{"eval/accuracy_rollout": 0.5}))
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"progress/global_steps": 3, "rew')
    for path in (run.path, run.metrics_path):
        columns = read_metrics(path)
        np.testing.assert_array_equal(columns["progress/global_steps"], [1, 2])
        np.testing.assert_array_equal(columns["eval/accuracy_rollout"], [math.nan, 0.5])
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_torn_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"progress/global_steps": 1}\n{"progr\n{"progress/global_steps": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_resuming_leaves_the_bytes_of_an_uninterrupted_run(tmp_path):
    whole, resumed = run_of(tmp_path / "whole", 6), run_of(tmp_path / "resumed", 5)
    with open(resumed.metrics_path, "ab") as metrics, open(resumed.samples_path, "ab") as samples:
        metrics.write(b'{"progress/global_st')
        samples.write(b'{"global_step": 6, "response": "8')
    (event_file,) = resumed.path.glob("events.*")
    event_file.write_bytes(event_file.read_bytes()[:-5])
    run = open_run(resumed.path, MANIFEST)
    run.truncate_after(3)
    assert [step for step, _ in events(run.path)] == [1, 2, 3]
    assert sample_steps(run) == [1, 1, 2, 2, 3, 3]
    for step in range(4, 7):
        run.append_metrics(row(step))
        run.append_samples(step, [{"response": "81", "reward": 1.0}, {"response": "9", "reward": 0.0}])
    for name in ("metrics.jsonl", "samples.jsonl", "manifest.json"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert events(run.path) == events(whole.path)
    assert not list(run.path.glob("*.tmp"))


def test_cutting_everything_begins_anew(tmp_path):
    run = run_of(tmp_path / "run", 2)
    run.truncate_after(0)
    assert run.metrics_path.read_bytes() == run.samples_path.read_bytes() == b""
    assert events(run.path) == []
    run.append_metrics(row(1))
    assert [step for step, _ in events(run.path)] == [1]


def test_a_step_is_never_written_twice(tmp_path):
    run_of(tmp_path / "run", 2)
    run = open_run(tmp_path / "run", MANIFEST)
    with pytest.raises(ValueError, match="truncate_after"):
        run.append_metrics(row(2))


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 60))
def test_any_torn_tail_and_cut_keep_whole_lines(tmp_path_factory, steps, cut, torn):
    run = run_of(tmp_path_factory.mktemp("torn") / "run", steps)
    for path in [run.metrics_path, *run.path.glob("events.*")] if steps else []:
        with open(path, "rb+") as file:
            file.truncate(max(0, path.stat().st_size - torn))
    left = len(read_metrics(run.path).get(STEP, [])) if steps else 0
    again = RunDir(run.path)
    again.truncate_after(cut)
    again.append_metrics(row(9))
    expected = [*range(1, min(cut, left) + 1), 9]
    assert read_metrics(run.path)["progress/global_steps"].tolist() == expected
    found = [step for step, _ in events(run.path)]
    assert found == sorted(set(found))
    assert set(found) <= {*range(1, cut + 1), 9}


def test_zeros_after_a_power_cut_are_no_events(tmp_path):
    run = run_of(tmp_path / "run", 2)
    (event_file,) = run.path.glob("events.*")
    event_file.write_bytes(event_file.read_bytes() + bytes(64))
    RunDir(run.path)
    assert [step for step, _ in events(run.path)] == [1, 2]


def test_manifest_round_trip(tmp_path):
    class Replay(enum.Enum):
        R3 = "r3"

    @dataclasses.dataclass(frozen=True)
    class Config:
        replay: Replay = Replay.R3
        operands: tuple[int, int] = (4, 12)
        cap: float = math.inf

    open_run(tmp_path / "run", {"config": Config(), "out": Path("runs/x"), "shape": np.arange(2)})
    assert read_manifest(tmp_path / "run") == {
        "config": {"replay": "r3", "operands": [4, 12], "cap": "inf"},
        "out": "runs/x",
        "shape": [0, 1],
    }
    open_run(tmp_path / "run", {"config": Config()})
    with pytest.raises(TypeError, match="no plain form"):
        plain({"loss": object()})


def test_another_config_is_refused_with_its_fields(tmp_path):
    run = run_of(tmp_path / "run", 1)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    other = {"config": {"seed": 1, "learner": {"learning_rate": 2e-3, "cap": math.inf}, "steps": 10, "new": None}}
    with pytest.raises(UserError) as error:
        open_run(run.path, other)
    for part in ("seed is 0 there and 1 here", "learner.learning_rate is 0.001 there and 0.002", "--fresh", "--out"):
        assert part in str(error.value)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_run_without_a_step_takes_another_config(tmp_path):
    """Its remedy, where it failed before its first step: the config is to be changed."""
    for seed in (0, 1):
        open_run(tmp_path / "run", {"config": {"seed": seed}})
        assert read_manifest(tmp_path / "run")["config"] == {"seed": seed}
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="seed is 1 there and 2 here"):
        open_run(tmp_path / "run", {"config": {"seed": 2}})


def test_a_field_that_an_older_version_did_not_have_had_its_default_there():
    before, defaults = {"learner": {"rate": 0.1}}, {"learner.rate": 0.3, "learner.clip": 1.0, "gone": 2}
    assert config_difference(before, {"learner": {"rate": 0.1, "clip": 1.0}}, defaults) == []
    assert config_difference(before, {"learner": {"rate": 0.1, "clip": 2.0}}, defaults) == [("learner.clip", 1.0, 2.0)]
    assert config_difference(before, {"learner": {"clip": 1.0}}, defaults) == [("learner.rate", 0.1, "absent")]


def test_config_difference_sees_missing_fields_and_types():
    assert config_difference({"a": (1, 2), "b": {"c": 1}}, {"a": [1, 2], "b": {}, "d": "x"}) == [
        ("b.c", 1, "absent"),
        ("b", "absent", {}),
        ("d", "absent", "x"),
    ]


def test_a_field_may_change_on_resuming(tmp_path):
    run_of(tmp_path / "run", 1)
    longer = {"config": {**MANIFEST["config"], "steps": 20}, "devices": "other"}
    open_run(tmp_path / "run", longer, may_change={"steps"})
    assert read_manifest(tmp_path / "run")["config"]["steps"] == 20
    assert read_manifest(tmp_path / "run")["devices"] == "cpu"  # of the machine that began the run


def test_fresh_moves_the_old_run_aside(tmp_path):
    said = []
    for step in (1, 2, 3):
        run = open_run(tmp_path / "run", {"config": {"seed": step}}, fresh=True, say=said.append)
        run.append_metrics(row(step))
    assert [read_metrics(tmp_path / name)[STEP].item() for name in ("run", "run.old-1", "run.old-2")] == [
        3,
        1,
        2,
    ]
    assert said == [f"{tmp_path}/run is kept as {tmp_path}/run.old-{number}" for number in (1, 2)]


@pytest.mark.parametrize("content", ["file", "directory"])
def test_what_is_no_run_is_left_alone(tmp_path, content):
    if content == "file":
        (tmp_path / "run").write_text("precious")
    else:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_run(tmp_path / "run", MANIFEST)


def test_what_is_no_number_is_named_with_its_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"progress/global_steps": 0, "x": null}\n{"progress/global_steps": 1, "x": "one"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: x is 'one', expected a number: mend or remove it"):
        read_metrics(tmp_path)
    file.write_text('{"progress/global_steps": 0}\n{"x": 1}\n{"progress/global_steps": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: progress/global_steps is None, expected a number"):
        RunDir(tmp_path)


@pytest.mark.parametrize("name", ["samples.jsonl", "report.png", "responses.jsonl"])
def test_a_directory_with_files_of_others_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"is there but holds no manifest\.json"):
        open_run(tmp_path, MANIFEST)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"config": []}'])
def test_unreadable_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        open_run(tmp_path, MANIFEST)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_full_disk_on_append(tmp_path):
    run = open_run(tmp_path / "run", MANIFEST)
    run.samples_path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"samples\.jsonl: the disk is full"):
        run.append_samples(1, [{"response": "8"}])


def test_full_disk_on_writing_aside_loses_nothing(tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", 3)
    before = run.metrics_path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"):
        run.truncate_after(1)
    assert run.metrics_path.read_bytes() == before
