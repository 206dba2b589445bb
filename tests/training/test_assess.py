"""`rlstab eval` on a run that was trained on a file: its numbers, its files, resuming, and what it refuses."""

import dataclasses
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab_jax.cli import load_config, main
from rlstab_jax.rundir import read_manifest, read_metrics
from rlstab_jax.training import assess as assessing
from rlstab_jax.training import cold_start
from rlstab_jax.training.engines import build
from rlstab_jax.training.statistics import bootstrap, ladder, majority, pass_at_k
from rlstab_jax.types import UserError
from tests.tasks.test_dataset import SUMS
from tests.tasks.test_records import written
from tests.training import tiny_run

CONFIG = "tests/training/dataset_run.py"
UNCACHED = ("--compilation-cache", "None")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for samples, right in ((1, 0), (1, 1), (5, 2), (6, 6), (6, 0), (7, 3)):
        verdicts = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(verdicts, k))
            assert pass_at_k(right, samples, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))
    assert pass_at_k(1, 1024, 512) == pytest.approx(0.5)
    for wrong in ((3, 2, 1), (1, 2, 3), (1, 2, 0)):
        with pytest.raises(ValueError, match="expected"):
            pass_at_k(*wrong)


@pytest.mark.parametrize(
    ("answers", "right", "value"),
    [
        (["7", "8", "7"], [1, 0, 1], 1),
        (["7", "8", "8"], [1, 0, 0], 0),
        (["7", "8"], [1, 0], 0.5),
        (["7", "8", "9", None, None], [1, 0, 0, 0, 0], 1 / 3),
        ([None, None], [0, 0], 0),
        ([None, "7"], [0, 1], 1),
    ],
)
def test_majority(answers, right, value):
    assert majority(answers, [bool(x) for x in right]) == pytest.approx(value)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).random(400)
    interval = bootstrap(values, draws=2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval["mean"] == values.mean()
    np.testing.assert_allclose(
        [interval["low"], interval["high"]], values.mean() + np.array([-half, half]), atol=0.1 * half
    )
    assert bootstrap(values, draws=2000) == interval
    assert bootstrap(np.ones(5)) == {"mean": 1, "low": 1, "high": 1}


def test_the_ks_that_are_shown():
    assert [ladder(n) for n in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


def train(*arguments: object) -> int:
    return main(["train", CONFIG, *map(str, arguments), *UNCACHED])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the file that it was trained on beside it."""
    os.chdir(Path(__file__).parents[2])
    folder = tmp_path_factory.mktemp("trained")
    data = written(folder / "sums.jsonl", SUMS)
    arguments = ["train", CONFIG, "--out", str(folder / "run"), "--task.train", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rlstab", *arguments, "--seed", "3"])
        assert main([*arguments, "--seed", "3", *UNCACHED]) == 0
    return folder


@pytest.fixture(scope="module")
def questions(trained: Path) -> Path:
    """Ten prompts, none of them among those above: in batches of four, the last one is short."""
    records = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (10, 11) for b in range(5)]
    return written(trained / "questions.jsonl", records)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_of_a_run_are_logged_apart(trained: Path):
    """Their weighted sum is the reward; failures are counted, and shown among the samples."""
    metrics = read_metrics(trained / "run")
    component = {name: metrics[f"reward/component/{name}"] for name in ("exact", "digits", "fragile")}
    np.testing.assert_allclose(metrics["reward/mean"], component["exact"] + component["digits"] / 2, rtol=1e-6)
    failures = metrics["reward/verifier_failures"]
    assert 0 < failures.sum() < metrics["response/count"].sum()
    np.testing.assert_allclose(component["fragile"], 1 - failures / metrics["response/count"])
    failed = [row for row in rows(trained / "run" / "samples.jsonl") if "failure" in row]
    assert failed
    assert all("9" in row["response"] and row["failure"] == "fragile: LookupError: a nine" for row in failed)
    task = read_manifest(trained / "run")["resolved"]["task"]
    assert task["train_prompts"] + task["heldout_prompts"] == 100


def test_a_verifier_that_fails_too_often_stops_the_run(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    data = trained / "sums.jsonl"
    assert train("--out", tmp_path / "run", "--task.train", data, "--task.max-verifier-failures", 0.0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "rlstab train: reward 'fragile': its verifier failed on" in line
    assert "first on prompt" in line
    assert "LookupError: a nine" in line


def test_other_data_under_a_run_is_refused(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    shutil.copytree(trained / "run", tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        changed = [*SUMS[:-1], {**SUMS[-1], "answer": 1}]
        data, original = trained / "sums.jsonl", (trained / "sums.jsonl").read_bytes()
        written(data, changed)
        try:
            assert train("--out", tmp_path / "run", "--task.train", data, "--seed", 3, "--steps", 6) == 2
            # Nor where a field differs that may.
            assert train("--out", tmp_path / "run", "--task.train", data, "--seed", 3, "--steps", 6,
                         "--task.max-verifier-failures", 0.9) == 2  # fmt: skip
        finally:
            data.write_bytes(original)
    assert capsys.readouterr().err.count("holds a run on other prompts: what the task's files hold has changed") == 2


def test_a_changed_field_of_the_data_is_named(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The files are as they were, so they are not what is said to have changed."""
    shutil.copytree(trained / "run", tmp_path / "run")
    other = ("--task.train", trained / "sums.jsonl", "--seed", 3, "--task.heldout-share", 0.5)
    assert train("--out", tmp_path / "run", *other) == 2
    assert "task.heldout_share is" in capsys.readouterr().err


def test_a_cold_start_belongs_to_its_data(trained: Path, tmp_path: Path):
    """One that is cached is not taken for other files of the same name."""
    data = tmp_path / "sums.jsonl"
    prints = []
    for records in (SUMS, SUMS[:-1], SUMS):
        config = load_config(Path(CONFIG))
        task = dataclasses.replace(config.task, train=(str(written(data, records)),))
        prints.append(cold_start._fingerprint(build(dataclasses.replace(config, task=task))))
    assert prints[0] == prints[2] != prints[1]


def test_what_a_run_says_of_its_data(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert train("--out", trained / "run", "--task.train", trained / "sums.jsonl", "--seed", 3) == 0
    said = capsys.readouterr().out
    task = read_manifest(trained / "run")["resolved"]["task"]
    assert f"data: {task['train_prompts']} prompts to train on, {task['heldout_prompts']} held out" in said


def evaluate(trained: Path, data: Path, out: Path, *arguments: object) -> int:
    common = ["--data", data, "--out", out, "--samples", 3, "--batch", 4, *arguments, *UNCACHED]
    return main(["eval", str(trained / "run"), *map(str, common)])


@pytest.fixture(scope="module")
def whole(trained: Path, questions: Path) -> Path:
    assert evaluate(trained, questions, trained / "whole", "--right-from", 0.0) == 0
    return trained / "whole"


def test_numbers_of_an_evaluation(whole: Path, questions: Path, trained: Path):
    """Recomputed from the samples, each of them judged anew."""
    samples, result = rows(whole / "responses.jsonl"), json.loads((whole / "eval.json").read_text())
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in rows(questions)]
    assert [len(row["responses"]) for row in samples] == [3] * 10
    assert (result["prompts"], result["samples"], result["engine"]) == (10, 3, "inference")
    assert result["data"] == str(questions)
    assert result["step"] == 2
    assert result["accuracy"] == result["pass_at"]["1"] == {"mean": 1, "low": 1, "high": 1}  # all are from 0 on
    texts = [response["text"] for row in samples for response in row["responses"]]
    assert len(set(texts)) > 15  # draws are independent
    assert result["response_length"] == pytest.approx(
        np.mean([response["length"] for row in samples for response in row["responses"]])
    )
    assert result["verifier_failures"] == sum("9" in text for text in texts)


def test_a_runs_training_files_need_not_be_there(whole: Path, questions: Path, trained: Path, tmp_path: Path):
    data = trained / "sums.jsonl"
    moved = data.rename(tmp_path / "elsewhere.jsonl")
    try:
        assert evaluate(trained, questions, tmp_path / "out", "--right-from", 0.0) == 0
    finally:
        moved.rename(data)
    assert (tmp_path / "out" / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()


def test_an_evaluation_that_was_killed_goes_on(
    whole: Path, questions: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """After the second batch, and with half of the third one on disk: the result is the same, byte for byte."""
    append, calls = assessing.append, itertools.count()

    def killed(path: Path, data: bytes) -> None:
        if next(calls) == 1:
            append(path, data[: len(data) // 2])
            raise KeyboardInterrupt
        append(path, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(assessing, "append", killed)
        assert evaluate(trained, questions, out, "--right-from", 0.0, "--fresh") == 130
    assert not (out / "eval.json").exists()
    capsys.readouterr()
    assert evaluate(trained, questions, out, "--right-from", 0.0) == 0
    assert "going on after 4 prompts" in capsys.readouterr().out
    for name in ("responses.jsonl", "eval.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    # A complete one is only summed up, and what changes no number may differ.
    assert evaluate(trained, questions, out, "--right-from", 0.0, "--task.max-verifier-failures", 0.9) == 0
    assert "10/10" not in capsys.readouterr().out
    assert (out / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()
    assert evaluate(trained, questions, out) == 2
    assert "right_from is 0.0 there and 1.0 here" in capsys.readouterr().err


def test_too_many_failures_are_said_once_there_are(whole: Path, questions: Path, trained: Path, tmp_path: Path, capsys):
    """Too many of the whole evaluation: a prompt that fails is many of its batch's responses. What was answered is
    kept."""
    out, answered = tmp_path / "out", rows(whole / "responses.jsonl")
    of_batch = [assessing.verifier_failures([row for row in answered if row["batch"] == batch]) for batch in range(3)]
    first = next(batch for batch, failures in enumerate(of_batch) if failures)
    allowed = ["--right-from", 0.0, "--task.max-verifier-failures"]
    named = ["eval", str(trained / "run"), CONFIG, "--seed", "3", "--data", str(questions), "--samples", "3"]
    named += ["--batch", "4", "--newest", *UNCACHED, *map(str, allowed)]
    assert main([*named, "0.0", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    allowed = "more than task.max_verifier_failures allows of 30 to be judged"
    assert f"verifiers failed on {of_batch[first]} responses, {allowed}" in line
    assert rows(out / "responses.jsonl") == [row for row in answered if row["batch"] <= first]
    assert not (out / "eval.json").exists()


def test_the_other_engine_and_the_config_by_name(whole: Path, questions: Path, trained: Path, tmp_path: Path):
    """A config without training files answers as the run's own does; greedy sampling gives equal samples."""
    named = ["eval", str(trained / "run"), CONFIG, "--seed", "3", "--evaluation.every", "4"]
    options = ["--data", str(questions), "--out", str(tmp_path / "named"), "--samples", "3", "--batch", "4"]
    assert main([*named, *options, "--right-from", "0.0", *UNCACHED]) == 0
    assert (tmp_path / "named" / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()
    assert evaluate(trained, questions, tmp_path / "o", "--engine", "training", "--evaluation.temperature", 0.0) == 0
    assert json.loads((tmp_path / "o" / "eval.json").read_text())["engine"] == "training"
    for row in rows(tmp_path / "o" / "responses.jsonl"):
        assert len({response["text"] for response in row["responses"]}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", CONFIG], "nowhere holds no checkpoint"),
        (["nowhere"], "nowhere: there is no such directory; give a run's"),
        (["configs"], "configs: no manifest there says which config it was made with; name the config"),
        ([], "expected a checkpoint first: rlstab eval"),
        (["{run}", "--samples", "0"], "samples = 0: expected at least 1"),
        (["{run}", "--batch", "0"], "batch = 0: expected at least 1"),
        (["{run}", "--prompts", "99"], "prompts = 99: expected 0 (all) to 10"),
        (["{run}", "--layout", "aime"], "line 1: no field 'problem', which layout 'aime' reads"),
        (["{run}", CONFIG], "the task holds out no prompts: name a file of them with --data"),
    ],
)
def test_bad_evaluations(arguments, message, trained, questions, tmp_path, capsys):
    """Exit code 2, one line, nothing on disk."""
    filled = [argument.replace("{run}", str(trained / "run")) for argument in arguments]
    data = [] if CONFIG in arguments and "nowhere" not in arguments else ["--data", str(questions)]
    rest = [*data, "--out", str(tmp_path / "out"), *UNCACHED] if filled else []
    assert main(["eval", *filled, *rest]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_config_that_has_changed(trained, questions, tmp_path, capsys):
    """The config of a run is read again by the run's own command, and compared with what it was then."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    manifest = read_manifest(run)
    manifest["config"]["model"]["embed_dim"] = 99
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["eval", str(run), "--data", str(questions), *UNCACHED]) == 2
    assert "has changed since the run was made: model.embed_dim was 99 and is 16" in capsys.readouterr().err


def test_a_file_for_a_task_that_makes_its_own_prompts(tmp_path):
    engines = build(tiny_run.config())
    records = [{"prompt": "3+5=", "answer": 8}, {"prompt": "3+5=", "answer": 8}, {"prompt": "1+1=", "answer": 2}]
    prompts = assessing._prompts(engines, assessing.Assessment(data=written(tmp_path / "a.jsonl", records)))
    assert [(p.text, p.answer) for p in prompts] == [("3+5=", "8"), ("1+1=", "2")]
    assert engines.task.reward(prompts[0], "8") == 0.25
    assert len(assessing._prompts(engines, assessing.Assessment())) == 16
    bad = written(tmp_path / "b.jsonl", [{"prompt": [{"role": "user", "content": "?"}], "answer": 8}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: the prompt is messages"):
        assessing._prompts(engines, assessing.Assessment(data=bad))
    with pytest.raises(UserError, match="layout = 'aime' is that of a file: give --data"):
        assessing._prompts(engines, assessing.Assessment(layout="aime"))
