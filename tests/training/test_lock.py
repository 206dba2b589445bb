"""One process at a time works on a run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlstab_jax.training.lock import held
from rlstab_jax.types import UserError

HOLD = """
import sys, pathlib
from rlstab_jax.training.lock import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    run, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    refused = pytest.raises(UserError, match=rf"{re.escape(str(run))}: process \d+ on .* is at work on this run")
    with held(run), held(other), refused, held(run):
        pass
    run.mkdir(parents=True)
    other.symlink_to(run)
    with held(run), pytest.raises(UserError, match="is at work on this run"), held(other):
        pass
    other.unlink()
    run.rmdir()
    with held(run):
        assert not run.exists()
    assert list((tmp_path / "runs").iterdir()) == []


def test_one_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on"), held(run):
            pass
        other.kill()
    assert (tmp_path / ".run.lock").exists()
    with held(run):
        pass
    assert not (tmp_path / ".run.lock").exists()
