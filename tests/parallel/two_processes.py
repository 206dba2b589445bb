"""One of two processes of 4 devices each; run by test_distributed.py with its number and the coordinator's address."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlstab_jax.parallel import distributed
from rlstab_jax.parallel.mesh import MeshConfig, make_mesh
from rlstab_jax.tasks import Prompt, Rewards
from rlstab_jax.training.collect import judge
from rlstab_jax.training.interrupt import stop_on_signal
from rlstab_jax.types import Rollout, UserError


def check_agreement(number: int) -> None:
    assert distributed.exchange(["a"] * (1 + 300 * number)) == [["a"], ["a"] * 301]
    assert distributed.exchange(None) == [None, None]
    assert distributed.of_first(0.1 + number) == 0.1  # all bits of a double
    assert distributed.by_first(lambda: f"written by {number}") == "written by 0"
    assert distributed.together(lambda: 2 * number) == 2 * number
    assert [*range(7)[distributed.share(7)]] == ([0, 1, 2], [3, 4, 5, 6])[number]

    def fails(on: tuple[int, ...]) -> None:
        if number in on:
            raise UserError("too few prompts")

    with pytest.raises(UserError, match=r"^on process 1: too few prompts$"):
        distributed.together(lambda: fails((1,)))
    with pytest.raises(UserError, match=r"^too few prompts$"):
        distributed.together(lambda: fails((0, 1)))
    distributed.agree_on({"seed": 1})
    with pytest.raises(UserError, match="the processes differ: rate is 0 on process 0 and 1 on process 1: "):
        distributed.agree_on({"seed": 1, "rate": number})


def check_arrays() -> None:
    mesh = make_mesh(MeshConfig())
    whole = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    by_row, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    for held in (whole, jnp.asarray(whole)):
        placed = distributed.put({"x": held}, {"x": by_row})["x"]
        assert [shard.data.shape for shard in placed.addressable_shards] == [(1, 2)] * 4
        np.testing.assert_array_equal(distributed.on_host(placed), whole)
        np.testing.assert_array_equal(distributed.on_host(distributed.put(placed, everywhere)), whole)
    np.testing.assert_array_equal(distributed.on_host(jax.jit(lambda x: x.sum(1))(placed)), whole.sum(1))


class Digits:
    """A task whose every response earns its own text, and which tells what it was shown."""

    class tokenizer:
        stop_ids = (9,)

        @staticmethod
        def decode(ids: list[int]) -> str:
            return "".join(map(str, ids))

    def __init__(self) -> None:
        self.shown: list[str] = []

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        self.shown.append(f"{prompt.text}:{response}")
        return float(response)


def check_judging(number: int) -> None:
    by_row = NamedSharding(make_mesh(MeshConfig()), PartitionSpec("data"))
    tokens = np.stack([np.zeros(8), np.arange(8), np.full(8, 9)], 1).astype(np.int32)
    mask = np.ones((8, 2), bool)
    tokens, mask, zeros = distributed.put((tokens, mask, np.zeros((8, 2))), (by_row,) * 3)
    rollout = Rollout(tokens, mask[:, :1], mask, zeros, mask[:, 0], None, zeros[:, 0])
    task, prompts = Digits(), [Prompt(i, "abcd"[i], "") for i in range(4)]
    texts, rewards = judge(task, prompts, rollout)
    assert texts == list("01234567")
    np.testing.assert_array_equal(rewards.total, np.arange(8, dtype=np.float32))
    assert task.shown == (["a:0", "a:1", "b:2", "b:3"], ["c:4", "c:5", "d:6", "d:7"])[number]
    assert isinstance(rewards, Rewards)


def check_signals(number: int) -> None:
    with stop_on_signal() as stop:
        assert not stop.agreed()
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler for it must not be in the way
        assert stop.agreed()
        assert stop.reason == "SIGTERM"


if __name__ == "__main__":
    number = int(sys.argv[1])
    options = distributed.DistributedOptions(sys.argv[2], processes=2, process=number, timeout=60)
    assert distributed.start(options)
    assert (jax.process_index(), jax.device_count(), jax.local_device_count()) == (number, 8, 4)
    assert distributed.first() == (number == 0)
    check_agreement(number)
    check_arrays()
    check_judging(number)
    check_signals(number)
