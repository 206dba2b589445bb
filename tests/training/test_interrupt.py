"""Signals become a flag; a second Ctrl-C still interrupts; handlers are given back."""

import signal
import subprocess
import sys
import threading

import pytest

from rlstab_jax.training.interrupt import stop_on_signal


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
    assert capfd.readouterr().err == f"\n{name}: stopping after the step at work; Ctrl-C stops at once\n"
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
