"""What is saved comes back bit for bit; what is damaged is found, set aside and passed over."""

import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from rlstab_jax.training.checkpoint import Checkpoints, parameters
from rlstab_jax.training.checksum import checksums
from rlstab_jax.types import UserError
from tests.xla import virtual

ROOT = pathlib.Path(__file__).parents[2]
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "uint16", "int32")


@struct.dataclass
class State:
    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    key: jax.Array


def make_state(seed: int, width: int = 48) -> State:
    params = {"layer": {"w": jax.random.normal(jax.random.key(seed), (64, width)), "b": jnp.arange(3.0)}}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(params, optimiser.init(params), jnp.int32(seed), jax.random.key(seed + 1))


def template(width: int = 48) -> State:
    return jax.eval_shape(lambda: make_state(0, width))


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def run(module: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.training.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def three(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with the checkpoints 1, 2 and 3."""
    with Checkpoints(tmp_path / "run", keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"position": step})
    return tmp_path / "run"


def test_round_trip_of_a_training_state(tmp_path: pathlib.Path) -> None:
    state, progress = make_state(7), {"position": [3, 4], "rate": 0.1, "nested": {"name": "ü"}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, progress)
        restored = checkpoints.restore(template())
    assert restored is not None
    assert restored[0] == 5
    assert_equal(restored[1], state)
    assert restored[2] == progress


def test_every_dtype_comes_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    bits = jax.random.bits(jax.random.key(0), (5, 7))  # all patterns, NaN with payload and -0 among them
    patterns = {name: bits.astype(f"uint{jnp.dtype(name).itemsize * 8}") for name in DTYPES}
    state = {name: jax.lax.bitcast_convert_type(pattern, name) for name, pattern in patterns.items()}
    state |= {"bool": bits % 2 == 0, "keys": jax.random.split(jax.random.key(1), 4)}
    state |= {"rbg": jax.random.key(2, impl="rbg"), "scalar": jnp.bfloat16(1.5)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))
    assert restored is not None
    assert_equal(restored[1], state)


def test_what_lies_in_the_host_s_memory_returns_there(tmp_path: pathlib.Path) -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    there = here.with_memory_kind("pinned_host")
    state = {"device": jax.device_put(jnp.arange(9.0), here), "host": jax.device_put(jnp.arange(8.0), there)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored = checkpoints.restore(state)
    assert restored is not None
    assert_equal(restored[1], state)
    assert {name: leaf.sharding for name, leaf in restored[1].items()} == {"device": here, "host": there}


def test_arrays_may_be_donated_once_save_returns(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        state = {"w": jnp.arange(100_000.0)}
        checkpoints.save(0, state, {})
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state)["w"].block_until_ready()
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((100_000,), jnp.float32)})
    assert restored is not None
    np.testing.assert_array_equal(restored[1]["w"], np.arange(100_000.0, dtype=np.float32))


@pytest.mark.parametrize(
    ("metrics", "keep_best", "kept", "best"),
    [
        ([0.1, 0.9, 0.5, 0.2, 0.3], True, [1, 3, 4], 1),
        ([0.1, 0.9, 0.5, 0.9, 0.3], True, [1, 3, 4], 1),  # of equals, the earliest
        ([0.1, 0.9, 0.5, 0.2, 1.0], True, [3, 4], 4),
        ([0.1, 0.9, float("nan"), None, None], True, [1, 3, 4], 1),
        ([0.1, 0.9, 0.5, 0.2, 0.3], False, [3, 4], 4),
        ([None] * 5, True, [3, 4], 4),
    ],
)
def test_keeps_the_last_and_the_best(
    tmp_path: pathlib.Path, metrics: list[float | None], keep_best: bool, kept: list[int], best: int
) -> None:
    state = {"w": jnp.zeros(4)}
    for step, metric in enumerate(metrics):  # reopened each time: metrics survive a restart
        with Checkpoints(tmp_path, keep_best=keep_best) as checkpoints:
            checkpoints.save(step, state, {}, metric)
    with Checkpoints(tmp_path, keep_best=keep_best) as checkpoints:
        assert checkpoints.steps() == kept
        restored = checkpoints.restore_best(state)
    assert restored is not None
    assert restored[0] == best


def test_a_best_that_was_never_written_displaces_nothing(tmp_path: pathlib.Path) -> None:
    state = {"w": jnp.zeros(4)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(0, state, {}, 0.5)
        checkpoints.save(1, state, {}, 0.9)
        checkpoints.wait()
        (tmp_path / "1").rename(tmp_path / "lost")  # as if its writing had failed
        checkpoints.save(2, state, {}, 0.7)
        checkpoints.save(3, state, {}, 0.6)
        assert checkpoints.steps() == [2, 3]


def test_nothing_saved_yet(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(template()) is None
        with pytest.raises(UserError, match="no checkpoint of step 3"):
            checkpoints.restore(template(), step=3)
    with pytest.raises(UserError, match="absent holds no checkpoint"):
        parameters(tmp_path / "absent", template().params)
    assert not (tmp_path / "absent").exists()


def test_a_step_is_saved_once_and_steps_ascend(three: pathlib.Path) -> None:
    with Checkpoints(three, keep_last=3) as checkpoints:
        restored = checkpoints.restore(template(), step=2)
        assert restored is not None
        assert restored[0] == 2
        checkpoints.save(2, restored[1], {})  # what was just restored: nothing to do
        with pytest.raises(UserError, match="already holds step 3"):
            checkpoints.save(1, restored[1], {})
        assert checkpoints.steps() == [1, 2, 3]


def test_parameters_alone(three: pathlib.Path) -> None:
    step, params = parameters(three, template().params)
    assert step == 3
    assert_equal(params, make_state(3).params)
    with pytest.raises(UserError, match=r"params/layer/w is float32\[64, 48\] in the checkpoint and float32\[64, 40\]"):
        parameters(three, template(width=40).params)


def largest(step: pathlib.Path) -> pathlib.Path:
    return max((step / "state").rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, pathlib.Path.unlink])
@pytest.mark.parametrize("file", ["arrays", "state/manifest.ocdbt", "state/_METADATA", "header/metadata"])
def test_falls_back_to_the_checkpoint_before(
    three: pathlib.Path, lines: list[str], file: str, damage: Callable[[pathlib.Path], None], capfd: Any
) -> None:
    damage(largest(three / "3") if file == "arrays" else three / "3" / file)
    content = sorted(path.name for path in (three / "3").rglob("*"))
    with Checkpoints(three, keep_last=3, notify=lines.append) as checkpoints:
        restored = checkpoints.restore(template())
        assert restored is not None
        assert restored[0] == 2
        assert_equal(restored[1], make_state(2))
        assert restored[2] == {"position": 2}
        checkpoints.save(3, make_state(3), {})  # the step is free again
        assert checkpoints.steps() == [1, 2, 3]
    assert len(lines) == 1
    assert f"{three / '3'} is damaged" in lines[0]
    assert sorted(path.name for path in (three / "bad" / "3-0").rglob("*")) == content
    assert capfd.readouterr() == ("", "")


def test_the_one_before_is_kept_until_the_last_is_known_to_be_good(three: pathlib.Path, lines: list[str]) -> None:
    flip(largest(three / "3"))
    with Checkpoints(three, keep_last=1, keep_best=False, notify=lines.append) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        restored = checkpoints.restore(template())
        assert restored is not None
        assert restored[0] == 2
        assert checkpoints.steps() == [2]


def test_a_checkpoint_under_another_number(three: pathlib.Path, lines: list[str]) -> None:
    (three / "3").rename(three / "9")
    with Checkpoints(three, keep_last=3, notify=lines.append) as checkpoints:
        restored = checkpoints.restore(template())
    assert restored is not None
    assert restored[0] == 2
    assert "9 is damaged (it was saved as step 3)" in lines[0]


def test_a_bit_that_only_the_checksum_sees(three: pathlib.Path, lines: list[str]) -> None:
    flip(largest(three / "3"))
    with Checkpoints(three, notify=lines.append) as checkpoints:
        checkpoints.restore(template())
    assert "is not what was saved" in lines[0]


def test_no_good_checkpoint(three: pathlib.Path, lines: list[str]) -> None:
    for step in (1, 2, 3):
        (three / str(step) / "header" / "metadata").unlink()
    with Checkpoints(three, keep_last=3, notify=lines.append) as checkpoints:
        with pytest.raises(UserError, match=rf"{three}: no good checkpoint among steps \[3, 2, 1\]"):
            checkpoints.restore(template())
        assert checkpoints.restore(template()) is None
    assert len(lines) == 3
    assert sorted(path.name for path in (three / "bad").iterdir()) == ["1-0", "2-0", "3-0"]


def test_a_reader_moves_nothing(three: pathlib.Path, lines: list[str]) -> None:
    (three / "3" / "header" / "metadata").unlink()
    step, params = parameters(three, template().params, notify=lines.append)
    assert step == 2
    assert_equal(params, make_state(2).params)
    assert len(lines) == 1
    assert (three / "3").exists()


def test_a_reader_goes_after_a_run_that_trains_meanwhile(
    three: pathlib.Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which deletes what the reader has seen, and saves more."""
    listed = Checkpoints.steps

    def steps(self: Checkpoints) -> list[int]:
        seen = listed(self)
        if self._read_only:
            with Checkpoints(three, keep_last=1, keep_best=False) as writer:
                writer.restore(template())
                writer.save(4, make_state(4), {})
        return seen

    monkeypatch.setattr(Checkpoints, "steps", steps)
    step, params = parameters(three, template().params, notify=lines.append)
    assert step == 4
    assert_equal(params, make_state(4).params)
    assert lines == []


def test_a_reader_of_the_best_finds_the_one_that_has_become_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best that it had seen is gone, the second of them is there still, and a later one is better."""
    state, accuracies = {"w": jnp.zeros(4)}, {1: 0.5, 2: 0.9, 3: 0.6}
    with Checkpoints(tmp_path, keep_last=9) as writer:
        for step, accuracy in accuracies.items():
            writer.save(step, state, {}, accuracy)
    read = Checkpoints._read

    def read_meanwhile(self: Checkpoints, step: int, *arguments: Any) -> Any:
        if (tmp_path / "2").exists():
            shutil.rmtree(tmp_path / "2")
            with Checkpoints(tmp_path, keep_last=9) as writer:
                monkeypatch.setattr(Checkpoints, "_read", read)
                writer.restore(state)
                writer.save(4, state, {}, 0.8)
                writer.save(5, state, {}, 0.7)
        return read(self, step, *arguments)

    with Checkpoints(tmp_path, read_only=True) as reader:
        monkeypatch.setattr(Checkpoints, "_read", read_meanwhile)
        restored = reader.restore_best(state)
    assert restored is not None
    assert restored[0] == 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            template(width=40),
            r"params/layer/w is float32\[64, 48\] in the checkpoint and float32\[64, 40\] in this run",
        ),
        (template().replace(key=jax.ShapeDtypeStruct((2,), jnp.uint32)), r"key is key<fry>\[\] in .* uint32\[2\]"),
        (template().replace(step={"a": template().step}), r"step/a is not there in the checkpoint and int32\[\] in"),
        (template().replace(step=None), r"step is int32\[\] in the checkpoint and not there in this run"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_damaged(three: pathlib.Path, other: State, message: str) -> None:
    with Checkpoints(three, keep_last=3) as checkpoints:
        with pytest.raises(UserError, match=message):
            checkpoints.restore(other)
        assert checkpoints.steps() == [1, 2, 3]


def test_a_full_disk(tmp_path: pathlib.Path) -> None:
    done = run("full_disk", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_directory_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write a checkpoint into .*file/run"):
        Checkpoints(tmp_path / "file" / "run")


def test_saved_on_one_mesh_restored_on_another(tmp_path: pathlib.Path) -> None:
    done = run("other_mesh", tmp_path, **virtual(8))
    assert done.returncode == 0, done.stderr


def test_killed_at_random_moments(tmp_path: pathlib.Path, lines: list[str]) -> None:
    """SIGKILL during a loop of saves: what is there afterwards is always good, matches its step, and is not older."""
    state_of = runpy.run_path(str(ROOT / "tests/training/save_loop.py"))["state_of"]
    rng, last = random.Random(0), -1
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.save_loop", str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seen = int(process.stdout.readline())  # a step that is on disk
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        seen = max([seen, *map(int, process.stdout.read().split("\n")[:-1])])  # the last line may be cut
        process.wait()
        with Checkpoints(tmp_path, notify=lines.append) as checkpoints:
            restored = checkpoints.restore(state_of(0))
        assert restored is not None
        step, state, progress = restored
        assert step >= seen > last
        assert progress == {"step": step}
        assert_equal(state, state_of(step))
        last = step
    assert lines == []


def test_checksums_see_what_sums_do_not() -> None:
    x = jnp.ones((32, 32))
    others = [x.at[3, 4].set(0), x.at[:1].set(0), jnp.zeros_like(x), x.at[0, 0].set(-1), x.reshape(16, 64).at[5].set(2)]
    assert len({checksums(y)[""] for y in [x, *others]}) == 6
    y = jnp.arange(6)
    assert checksums(y) != checksums(y[::-1])
    assert checksums({"a": {"b": jnp.float32(0)}}) != checksums({"a": {"b": jnp.float32(-0.0)}})
