"""A run of two processes is the run of one, whatever happens to them, to the tolerance of sums in another order."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.run import train
from tests.training.two_process_run import config
from tests.xla import virtual

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | virtual(4)
ENVIRONMENT |= {
    # Programs in flight together starve each other's collectives of threads where there are fewer cores than devices.
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}


class TwoProcesses:
    """``rlstab train`` in two processes of 4 devices each, neither of which holds a whole layer."""

    def __init__(self, out: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "rlstab_jax.cli", "train", "tests/training/two_process_run.py"]
        command += ["--out", str(out), "--compilation-cache", str(out.parent / "cache")]
        command += ["--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.expert", "2"]  # fsdp spans the processes
        command += ["--distributed.coordinator", address, "--distributed.processes", "2"]
        command += ["--distributed.timeout", "60", "--distributed.process"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
        self.processes = [subprocess.Popen([*command, i], cwd=ROOT, text=True, **pipes) for i in "01"]

    def send(self, number: signal.Signals, process: int, moment: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not moment():
            assert all(p.poll() is None for p in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.processes[process].send_signal(number)

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, and what went to standard output and standard error."""
        texts = [process.communicate(timeout=120) for process in self.processes]
        return [p.returncode for p in self.processes], [out for out, _ in texts], [errors for _, errors in texts]


def steps(out: Path) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_killed_resumed_and_stopped(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(config(), one, say=lambda line: None)

    # The process that the others found each other by is killed: the other one ends, and says so in a line.
    run = TwoProcesses(two)
    run.send(signal.SIGKILL, 0, lambda: steps(two) >= 1)
    killed = time.monotonic()
    codes, _, errors = run.end()
    assert time.monotonic() - killed < 60
    assert codes[0] == -signal.SIGKILL
    assert codes[1] in (1, -signal.SIGABRT)
    assert errors[1].startswith("rlstab train: lost contact with another process (")
    assert errors[1].count("\n") == 1

    # Rerun, they go on; a signal to one of them stops both after a save.
    run = TwoProcesses(two)
    run.send(signal.SIGTERM, 1, lambda: steps(two) >= 2)
    codes, printed, errors = run.end()
    assert codes == [143, 143], errors
    assert errors == ["", "\nSIGTERM: stopping at the next safe moment; Ctrl-C stops at once\n"]
    assert "stopped by SIGTERM" in printed[0]
    assert "step" not in printed[1]  # one process speaks
    saved = max(int(path.name) for path in (two / "checkpoints").iterdir() if path.name.isdigit())
    assert 2 <= saved == steps(two) < 4

    # What they have saved goes on in one process on another mesh, and ends where the uninterrupted run does.
    said: list[str] = []
    train(config(), two, say=said.append)
    assert f"resuming after global step {saved}" in said
    first, second = read_metrics(one), read_metrics(two)
    assert first.keys() == second.keys()
    for name in first:
        if not name.startswith(("time/", "throughput/")):
            np.testing.assert_allclose(second[name], first[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
