"""A run that is killed and resumed leaves what an uninterrupted one leaves, bit for bit on CPU."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.test_rundir import events

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).parents[2]
TIMING = ("time/", "throughput/")


class Command:
    """``rlstab train tiny_run.py`` in processes of their own, each of them with the programs of those before it."""

    def __init__(self, folder: Path):
        self.cache = folder / "cache"

    def start(self, out: Path) -> subprocess.Popen[str]:
        # The pause makes a run long enough to be hit in the middle.
        command = [sys.executable, "-m", "rlstab_jax.cli", "train", "tests/training/tiny_run.py"]
        command += ["--out", str(out), "--compilation-cache", str(self.cache), "--task.pause", "0.01"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)

    def complete(self, out: Path) -> str:
        """Runs to the end, without a word on standard error."""
        printed, errors = self.start(out).communicate(timeout=300)
        assert errors == ""
        assert "done: " in printed
        return printed

    def stop(self, out: Path, moment: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
        """Starts or resumes the run, sends the signal at that moment, and returns the exit code and the output."""
        process, deadline = self.start(out), time.monotonic() + 120
        while True:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            if moment():
                process.send_signal(signal.SIGSTOP)  # so that the moment has not passed when it is looked at again
                if moment():
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
        answer = f"\n{number.name}: stopping at the next safe moment; Ctrl-C stops at once\n"
        assert errors == ("" if number == signal.SIGKILL else answer)
        return process.returncode, printed


def steps(out: Path) -> list[int]:
    """The global steps of metrics.jsonl."""
    return [row["progress/global_steps"] for row in rows(out / "metrics.jsonl", whole_file=False)]


def rows(path: Path, whole_file: bool = True) -> list[dict[str, Any]]:
    lines = path.read_text().split("\n") if path.exists() else [""]
    assert lines[-1] == "" or not whole_file
    return [json.loads(line) for line in lines[:-1]]


def measured(out: Path) -> list[dict[str, Any]]:
    """All metrics but those that measure the machine."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows(out / "metrics.jsonl")]


def last_checkpoint(out: Path) -> tuple[int, dict[str, bytes]]:
    """The newest step on disk, and the bytes of every array: parameters, optimiser state and gradient steps."""
    step = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    with warnings.catch_warnings(action="ignore"):  # Orbax would rather be told where to put the arrays
        state = ocp.PyTreeCheckpointer().restore(out / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def progressed(out: Path, by: int, delay: float) -> Callable[[], bool]:
    """True once the run has made so many steps more than before, and so many seconds have passed since."""
    before, since = max(steps(out), default=0), 0.0  # a restart begins by cutting some of these

    def moment() -> bool:
        nonlocal since
        if not since and max(steps(out), default=0) >= before + by:
            since = time.monotonic()
        return bool(since) and time.monotonic() >= since + delay

    return moment


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    command, rng = Command(tmp_path), random.Random(0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command.complete(whole)
    checkpoints = broken / "checkpoints"

    # While the first checkpoint is being written: nothing but lines that must go is left of this one.
    code, _ = command.stop(broken, lambda: any(checkpoints.glob("*tmp*")), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert any(checkpoints.glob("*tmp*"))

    code, printed = command.stop(broken, progressed(broken, 3, rng.uniform(0, 0.1)), signal.SIGTERM)
    assert code == 143
    assert "resuming" not in printed
    assert "stopped by SIGTERM" in printed
    saved, _ = last_checkpoint(broken)
    assert steps(broken)[-1] == saved

    code, printed = command.stop(broken, progressed(broken, 2, rng.uniform(0, 0.1)), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert f"resuming after global step {saved}" in printed

    code, printed = command.stop(broken, progressed(broken, 1, rng.uniform(0, 0.1)), signal.SIGINT)
    assert code == 130
    saved, _ = last_checkpoint(broken)
    assert f"resuming after global step {saved}" in command.complete(broken)

    assert steps(broken) == list(range(13))
    assert measured(broken) == measured(whole)
    assert (broken / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert last_checkpoint(broken) == last_checkpoint(whole)
    assert [step for step, _ in events(broken)] == list(range(13))
    assert not [path for path in checkpoints.iterdir() if not path.name.isdigit()]
    assert (broken / "report.png").stat().st_size > 10_000
