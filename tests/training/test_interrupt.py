"""Signals become a flag, which ends a step that has learnt nothing yet; a second Ctrl-C still interrupts; handlers are
given back."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab_jax.rundir import read_metrics
from rlstab_jax.training import loop, passes
from rlstab_jax.training.interrupt import stop_on_signal
from rlstab_jax.training.run import train
from tests.training.test_loop import configured


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_first_signal_is_a_request(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = handlers()
    with stop_on_signal() as stop:
        assert not stop.requested
        assert stop.reason is None
        signal.raise_signal(signal.Signals[name])
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == name
    assert capfd.readouterr().err == f"\n{name}: stopping at the next safe moment; Ctrl-C stops at once\n"
    assert handlers() == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_interrupts_at_once(first: signal.Signals) -> None:
    before = handlers()
    with stop_on_signal():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_handlers_return_after_an_error() -> None:
    before = handlers()
    with pytest.raises(RuntimeError, match="boom"), stop_on_signal():
        raise RuntimeError("boom")
    assert handlers() == before


def test_harmless_outside_the_main_thread() -> None:
    seen: list[bool] = []

    def work() -> None:
        with stop_on_signal() as stop:
            seen.append(stop.requested)

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert handlers() == before


@pytest.mark.parametrize(
    ("rollout", "polls"), [({"slots": 4}, 2), ({"waves": 2, "attempts": 2}, 1), ({"waves": 2, "lag": 1}, 1)]
)
def test_a_step_is_given_up_before_its_first_update(
    rollout: dict[str, Any], polls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between rounds of slots, waves or attempts. What was learnt is saved, and the run that goes on is the one that
    nobody stopped."""
    config = configured(gradient_steps=6, rollout={"response_length": 20, **rollout}, evaluation={"every": 0})
    sample, learn, learnt, polled = passes.sample_responses, loop.learn, [], []
    lag = config.rollout.lag

    def told_in_step_2(*arguments: Any, poll: Any) -> Any:
        step = arguments[3] - lag

        def told() -> None:
            polled.append(step)
            if step == 2 and polled.count(2) == polls:
                signal.raise_signal(signal.SIGTERM)
            poll()

        return sample(*arguments, poll=told)

    monkeypatch.setattr(loop, "learn", lambda *arguments: learnt.append(arguments[3]) or learn(*arguments))
    assert train(config, tmp_path / "whole", say=lambda line: None) is None
    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_responses", told_in_step_2)
        assert train(config, tmp_path / "broken", say=lambda line: None) == "SIGTERM"
    assert polled.count(2) == polls
    assert learnt == [1, 2, 3, 1]
    assert train(config, tmp_path / "broken", say=lambda line: None) is None
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    for name in whole:
        if not name.startswith(("time/", "throughput/")):
            np.testing.assert_array_equal(broken[name], whole[name], err_msg=name)


LOST = """
import gc, signal, time
from rlstab_jax.training.interrupt import keep_interrupts
keep_interrupts()
first = iter([True])
gc.callbacks.append(lambda *_: next(first, False) and signal.raise_signal(signal.SIGINT))
try:
    gc.collect()
    print("collected", flush=True)
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_what_the_garbage_collector_swallows_is_sent_again() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["collected", "interrupted"]
    assert done.stderr == ""
