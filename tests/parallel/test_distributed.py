"""Processes find each other or say in one line why not, agree, and leave one line when one of them is gone."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlstab_jax.parallel import last_words
from rlstab_jax.parallel.distributed import DistributedOptions, _alone, start
from rlstab_jax.tasks import Failure, Rewards
from rlstab_jax.types import UserError
from tests.xla import virtual

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | virtual(4) | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def ends(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit codes and standard errors of processes that run at once."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, "cwd": ROOT}
    running = [subprocess.Popen([sys.executable, "-m", *command], text=True, **pipes) for command in commands]
    return [(process.communicate(timeout=200)[1], process.returncode)[::-1] for process in running]


def train(at: str, process: int, *arguments: str) -> list[str]:
    flags = ["--distributed.coordinator", at, "--distributed.processes", "2", "--distributed.process", str(process)]
    return ["rlstab_jax.cli", "train", "tests/training/tiny_run.py", *flags, *arguments]


def test_two_processes_agree() -> None:
    at = address()
    first, second = ends(*(["tests.parallel.two_processes", str(i), at] for i in range(2)))
    assert first == (0, "")
    assert second == (0, "\nSIGTERM: stopping at the next safe moment; Ctrl-C stops at once\n")  # it alone was told to


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_does_not_come_up(process: int, tmp_path: Path) -> None:
    at, began = address(), time.monotonic()
    [(code, error)] = ends(train(at, process, "--distributed.timeout", "3", "--out", str(tmp_path / "run")))
    assert code == 2
    assert error.startswith("rlstab train: not all of 2 processes came up within 3 s")
    assert f"the coordinator {at}" in error
    assert error.count("\n") == 1
    assert time.monotonic() - began < 60  # imports are slow on a busy machine
    assert not (tmp_path / "run").exists()


def test_processes_of_different_configs(tmp_path: Path) -> None:
    at, out = address(), ["--out", str(tmp_path / "run")]
    line = (
        "rlstab train: the processes differ: seed is 0 on process 0 and 1 on process 1: start all with one command, "
        "one config, one installation and the same files\n"
    )
    assert ends(train(at, 0, *out), train(at, 1, *out, "--seed", "1")) == [(2, line)] * 2
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_all_make_is_one_line_on_each(tmp_path: Path) -> None:
    at, arguments = address(), ["--out", str(tmp_path / "run"), "--mesh.data", "16"]
    for code, error in ends(train(at, 0, *arguments), train(at, 1, *arguments)):
        assert code == 2
        assert error.startswith("rlstab train: mesh (data = 16, fsdp = 1, expert = 1, tensor = 1) needs 16 devices")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "10.0.0.1"}, "--distributed.coordinator 10.0.0.1: expected HOST:PORT"),
        ({"coordinator": "10.0.0.1:99999"}, "expected HOST:PORT"),
        ({"coordinator": "10.0.0.1:8²"}, "expected HOST:PORT"),
        ({"processes": 2, "process": 2}, "processes are numbered from 0 to 1"),
        ({"timeout": 0}, "at least 1 second"),
        ({"processes": -1}, "at least 1 process"),
    ],
)
def test_flags_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(DistributedOptions(**options))


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, True),
        ({"SLURM_NTASKS": "8"}, False),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "4"}, False),  # mpirun within a batch job
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0", "MEGASCALE_NUM_SLICES": "2"}, False),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": ""}, True),
    ],
)
def test_one_machine_stays_alone(environment: dict, alone: bool) -> None:
    assert _alone(environment) is alone


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"])
@pytest.mark.parametrize("value", [" ", "two", "0", "2²"])
def test_a_launcher_that_names_no_number(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"environment variable {name} = '{value}': expected a whole number"):
        _alone({"TPU_WORKER_HOSTNAMES": "t1v-0", name: value})


def test_an_empty_number_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "")
    with pytest.raises(UserError, match="SLURM_NTASKS = '': expected a whole number, at least 1"):
        start(DistributedOptions())
    assert start(DistributedOptions(processes=1)) is False


def test_alone_by_flag() -> None:
    assert start(DistributedOptions(processes=1)) is False


# As jaxlib prints it, with the stack trace cut.
END = b"""\
E1121 06:07:29.376997    3584 coordination_service_agent.cc:289] Polled an error from coordination service.
F1121 06:07:29.377133    3584 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. Disable Python buffering, i.e. `python -u`. absl::Status: UNAVAILABLE: Failed to send RPC
*** Check failure stack trace: ***
    @     0x7f8af4240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"a warning\n" + END, b"a warning\nrlstab: gone (UNAVAILABLE: Failed to send RPC)\n"),
        (b"rlstab: the disk is full\n" + END, b"rlstab: the disk is full\n"),  # its own reason is enough
        (END.splitlines(keepends=True)[0] + b"on it goes\n", END.splitlines(keepends=True)[0] + b"on it goes\n"),
        (b"Traceback:\n  no end of line", b"Traceback:\n  no end of line"),
        (b"F1121 06:07:29.377133 35 xla.cc:80] Check failed\n", b"F1121 06:07:29.377133 35 xla.cc:80] Check failed\n"),
    ],
)
def test_last_words(said: bytes, shown: bytes) -> None:
    command = [sys.executable, last_words.__file__, "rlstab", "gone ({})"]
    assert subprocess.run(command, input=said, stderr=subprocess.PIPE, check=True).stderr == shown


def test_rewards_of_parts() -> None:
    def part(*values: float, failed: int) -> Rewards:
        return Rewards(np.array(values), {"right": np.array(values) > 1}, (Failure("right", failed, "boom"),), 1)

    whole = Rewards.joined([part(1.0, 2.0, failed=1), part(3.0, failed=0)])
    assert whole.total.tolist() == [1.0, 2.0, 3.0]
    assert whole.components["right"].tolist() == [False, True, True]
    assert [failure.row for failure in whole.failures] == [1, 2]
    assert whole.gave_up == 2
