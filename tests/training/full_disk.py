"""A limit on the size of files stands in for a full disk: errors take the same path. Run by test_checkpoint.py."""

import pathlib
import resource
import sys

import jax
import pytest

from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.types import UserError


def state_of(seed: int, size: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(seed), (size,))}


if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state_of(1, 1000), {})
        checkpoints.save(2, state_of(2, 1_000_000), {})  # written in the background
        with pytest.raises(UserError, match=rf"cannot write a checkpoint into {directory} \(.*File too large"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(state_of(0, 1000))
        assert restored is not None
        assert restored[0] == 1
        assert (restored[1]["w"] == state_of(1, 1000)["w"]).all()
        checkpoints.save(2, state_of(2, 1000), {})
        assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
