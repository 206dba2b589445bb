"""The command line: what it refuses, with one line each, and what it survives."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rlstab_jax import rundir
from rlstab_jax.cli import load_config, main
from rlstab_jax.progress import progress
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training import loop

CONFIG = "tests/training/tiny_run.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


def command(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "rlstab train CONFIG --help" in capsys.readouterr().out
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: rlstab COMMAND")
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert command() == 2
    assert "expected the path of a config file: rlstab train configs" in capsys.readouterr().err
    assert command(CONFIG, "--out", "") == 2
    assert "--out is empty: give a directory" in capsys.readouterr().err
    assert main(["diagnose", "runs/x"]) == 2
    assert "rlstab diagnose: runs/x: there is no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "sft", "plan", "diagnose", "eval"])
def test_help_without_a_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    given = "CHECKPOINT [CONFIG]" if name in ("diagnose", "eval") else "CONFIG"
    assert f"usage: rlstab {name} {given}" in shown
    assert "Fields and defaults are those of RunConfig" in shown


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(CONFIG, "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "--learner.learning-rate FLOAT Step size of Adam after the warm-up. (default: 0.003)",
        "--model.experts-per-token INT k of the router's top-k. (default: 2)",
        "--task.pause FLOAT Seconds that judging a response takes",
        "--profile {None}|INT Global step of which to leave a profiler trace",
        "--fresh",
        "--no-resume refuses a directory",
    ):
        assert text in shown, text


def test_sft_puts_the_cold_start_where_train_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Path] = []
    monkeypatch.setattr("rlstab_jax.training.cold_start.cold_start", lambda engines, cache, stop: caches.append(cache))
    for out in (("--out", str(tmp_path / "run")), ()):
        assert main(["sft", CONFIG, *out, "--compilation-cache", "None", "--cold-start.max-steps", "1"]) == 0
    assert caches == [tmp_path / "cold_start", Path("runs") / "cold_start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.experts-per-token 9", "model.experts_per_token = 9 exceeds model.num_experts = 4"),
        ("--model.num-kv-heads 3", "model.num_kv_heads = 3 does not divide"),
        ("--model.vocab-size 5", "model.vocab_size = 5 is below the tokeniser's"),
        ("--samples-per-prompt 1", "samples_per_prompt = 1, but objective 'minirl' compares"),
        ("--minibatches 0", "minibatches = 0: expected at least 1"),
        ("--seed 4294967296", "seed = 4294967296: expected 0 or more and below 2**32"),
        ("--cold-start.seed -2", "cold_start.seed = -2: expected 0 or more and below 2**32 - 1"),
        ("--learner.micro-batches 3", "learner.micro_batches = 3: expected a divisor of the mini-batch, 8 responses"),
        ("--learner.packing --kernels.attention cudnn", "kernels.attention = 'cudnn', which takes one sequence a row"),
        ("--learner.unroll 0", "learner.unroll = 0: expected at least 1"),
        ("--learner.score-micro-batches 5", "learner.score_micro_batches = 5: expected a divisor of the global batch"),
        ("--rollout.prompt-length 3", "rollout.prompt_length = 3, but the task's prompts have up to 6 tokens"),
        ("--rollout.temperature 0", "rollout.temperature = 0.0: expected at least 1e-06"),
        ("--model.num-experts 0", "learner.replay = 'r3', but the model is dense: use replay = 'live'"),
        ("--learner.replay pr2 --minibatches 1", "there is nothing to foretell; use 'r2', which is the same then"),
        (
            "--learner.replay pr2 --rollout.lag 2 --rollout.partial 2",
            "learner.replay = 'pr2' with rollout.partial = 2 and rollout.log_probs = 'decode': routes are foretold",
        ),
        (
            "--model.num-experts 0 --learner.replay live --learner.router-z 1",
            "learner.router_z: the model is dense and has no router",
        ),
        (
            "--model.num-experts 0 --learner.replay live --objective.name rspo",
            "objective 'rspo' reads the routers' log probabilities, but the model is dense: use another objective",
        ),
        ("--kernels.attention cudnn", "kernels.attention = 'cudnn' needs an NVIDIA GPU, but this is 'cpu'"),
        ("--learner.precision.scales block", "learner.precision.scales = 'block', but neither weights nor activations"),
        ("--rollout.precision.block 0", "rollout.precision.block = 0: expected at least 1"),
        (
            "--rollout.precision.products native --rollout.precision.activations none",
            "rollout.precision.products = 'native' with weights in float8_e4m3fn and activations in none",
        ),
        ("--objective.delta 0.1", "objective.delta: minirl has no such number; it takes:"),
        ("--objective.name nonesuch", "invalid choice 'nonesuch'"),
        ("--task.modulus 99", "modulus = 99: expected at most base ** digits = 16"),
        (
            "--evaluation.prompts 99",
            "evaluation.prompts = 99 and cold_start.check_prompts = 16, but the task",
        ),
        ("--mesh.data 3", "mesh (data = 3, fsdp = 1, expert = 1, tensor = 1) needs 3 devices, but there are 1"),
        ("--cold-start.batch-size 0", "cold_start.batch_size = 0: expected at least 1"),
        ("--learner.learnign-rate 3", "Perhaps you meant: --learner.learning-rate FLOAT"),
        ("--learner.learning-rate fast", "Error parsing --learner.learning-rate: could not convert string to float"),
        ("--steps", "--steps"),
        ("stray", "Unrecognized options: stray"),
    ],
)
def test_bad_options(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at once: exit code 2, a message that says what to do, no traceback, and nothing on disk."""
    assert command(CONFIG, "--out", tmp_path / "run", *arguments.split()) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").replace("─", " ").split())
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("def config(:", "the config does not run: SyntaxError"),
        (
            "\nimport nonesuch",
            "the config does not run (mine.py, line 2): ModuleNotFoundError: No module named 'nonesuch'",
        ),
        ("run = 3", "expected a function config() that returns a RunConfig"),
        ("def config(): return 1 / 0", "config() failed (mine.py, line 1): ZeroDivisionError"),
        ("import sys\nsys.exit('no data here')", "the config does not run (mine.py, line 2): SystemExit: no data here"),
        ("def config(): return {}", "config() returned dict, expected a RunConfig"),
    ],
)
def test_bad_config_files(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert command(path, "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith(f"rlstab train: {path}: {message}")
    assert not (tmp_path / "run").exists()


def test_a_config_may_import_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder hides nothing: configs/math.py is a config, and jax needs Python's math."""
    (tmp_path / "beside_a_config.py").write_text("STEPS = 7\n")
    (tmp_path / "math.py").write_text("raise AssertionError\n")
    (tmp_path / "mine.py").write_text(
        "import math\nfrom beside_a_config import STEPS\nfrom rlstab_jax.training.config import RunConfig\n\n"
        "def config():\n    return RunConfig(gradient_steps=STEPS + int(math.sqrt(1)))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_config(tmp_path / "mine.py").gradient_steps == 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 gradient steps, which is 2 global steps with a checkpoint each."""
    os.chdir(Path(__file__).parents[1])
    out = tmp_path_factory.mktemp("finished") / "run"
    assert command(CONFIG, "--out", out, *SHORT, "--profile", 2) == 0
    return out


SHORT = ("--steps", 4, "--checkpoint-every", 2, "--evaluation.every", 0, "--compilation-cache", "None")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(out: Path, *arguments: object) -> int:
    return command(CONFIG, "--out", out, *SHORT, *arguments)


def test_what_is_left_and_the_same_command_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A complete run is left as it is; more steps go on with it, a plain line a step."""
    assert any((run / "profile").rglob("*.xplane.pb"))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["resolved"]["kernels"] == {
        "attention": "reference",
        "experts": "tiles",
        "decode_attention": "reference",
        "decode_experts": "grouped",
        "expert_chunk": 0,
    }
    assert {"config", "versions", "devices", "mesh", "seed", "command"} <= set(manifest)
    before = (run / "metrics.jsonl").read_bytes()
    assert again(run, "--profile", 2) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    for step in (0, 5):
        assert again(run, "--steps", 8, "--profile", step) == 2
        assert f"profile = {step}: expected a global step of the run, from 1 to 4" in capsys.readouterr().err
    assert again(run, "--steps", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run: {run}"
    assert "resuming after global step 2" in lines
    assert [line.split()[:3] for line in lines if line.startswith("step ")] == [
        ["step", "6", "reward"],
        ["step", "8", "reward"],
    ]
    assert lines[-1].startswith(f"done: {run}")


def test_a_directory_of_another_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert again(run, "--learner.learning-rate", 1) == 2
    assert f"{run} holds a run of another config: learner.learning_rate is 0.003 there and 1.0 here" in (
        capsys.readouterr().err
    )
    assert again(run, "--no-resume") == 2
    assert f"{run} holds a run already: give another --out, --fresh to begin anew" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_fresh_moves_the_old_run_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_metrics(run)
    assert again(run, "--fresh", "--seed", 1) == 0
    assert f"{run} is kept as {run}.old-1" in capsys.readouterr().out
    assert (read_metrics(f"{run}.old-1")["learner/loss"] == before["learner/loss"]).all()
    assert (read_metrics(run)["learner/loss"] != before["learner/loss"]).any()


def test_damaged_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before a damaged one is taken, and leads to the same end; where all are damaged, the run says so."""
    before = (run / "samples.jsonl").read_bytes()
    (run / "checkpoints" / "2" / "header" / "metadata").unlink()
    assert again(run) == 0
    shown = capsys.readouterr().out
    assert f"checkpoint {run}/checkpoints/2 is damaged" in shown
    assert "trying the one before it" in shown
    assert "resuming after global step 1" in shown
    assert (run / "samples.jsonl").read_bytes() == before
    for step in (1, 2):
        (run / "checkpoints" / str(step) / "header" / "metadata").unlink()
    assert again(run) == 1
    assert "no good checkpoint among steps [2, 1]: start afresh elsewhere" in capsys.readouterr().err
    assert (run / "samples.jsonl").read_bytes() == before
    # The damaged ones are moved aside: given again, the command begins anew, and nothing is lost.
    assert again(run) == 0
    assert f"begins anew; what it has logged is kept in {run}.old-1" in capsys.readouterr().out
    assert Path(f"{run}.old-1", "samples.jsonl").read_bytes() == before


def test_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 1; what was saved is there, and with space again the run goes on."""

    def full(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "open", full, raising=False)
        assert again(run, "--steps", 8) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the disk is full; free some space and give the same command again to resume" in error
    assert again(run, "--steps", 8) == 0
    assert "resuming after global step 2" in capsys.readouterr().out
    assert list(read_metrics(run)["progress/global_steps"]) == [1, 2, 3, 4]


def test_routes_that_are_missing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = loop.sample_responses
    monkeypatch.setattr(
        loop, "sample_responses", lambda *given, **how: dataclasses.replace(original(*given, **how), routes=None)
    )
    assert again(run, "--steps", 8) == 1
    assert "replay 'r3' needs recorded routes, but the rollout has none" in capsys.readouterr().err
    assert list(read_metrics(run)["progress/global_steps"]) == [1, 2]


def test_a_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command(CONFIG, "--out", tmp_path / "file" / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/file/run" in error


def test_a_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    with open(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        with progress(8) as (say, watch):
            say("kernels: these")
            watch({"progress/gradient_steps": 4, "reward/mean": 0.25, "discrepancy/k3": 1e-3})
    shown = ""
    with contextlib.suppress(OSError):  # what comes after the terminal's last word
        while part := os.read(leader, 1 << 16):
            shown += part.decode(errors="replace")
    os.close(leader)
    assert "kernels: these" in shown
    assert "4/8" in shown
    assert "reward 0.250  KL mu|old 1.0e-03" in shown
