"""Saves checkpoint after checkpoint until it is killed; prints each step that is on disk. Run by test_checkpoint.py."""

import sys

import jax
import jax.numpy as jnp

from rlstab_jax.training.checkpoint import Checkpoints


def state_of(step: int) -> dict[str, jax.Array]:
    """A state from which its step can be told."""
    leaves = {f"w{i}": jax.random.normal(jax.random.key(i), (100, 200)) + step for i in range(6)}
    return leaves | {"step": jnp.int32(step), "key": jax.random.key(step)}


if __name__ == "__main__":
    with Checkpoints(sys.argv[1]) as checkpoints:
        restored = checkpoints.restore(state_of(0))
        step = 0 if restored is None else restored[0] + 1
        while True:
            checkpoints.save(step, state_of(step), {"step": step}, metric=float(step % 7))
            checkpoints.wait()
            print(step, flush=True)
            step += 1
