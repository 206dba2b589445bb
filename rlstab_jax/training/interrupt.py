"""Ctrl-C and SIGTERM as a flag that the training loop polls, so that it can save a checkpoint and leave."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rlstab_jax.parallel.distributed import exchange


class StepGivenUp(Exception):
    """A global step ends before its first update, since the run is to stop; resumed, it is made again, the same."""


@dataclasses.dataclass
class Stop:
    """Whether someone asked the loop to stop, and how.

    Attributes:
      reason: ``"SIGINT"`` or ``"SIGTERM"``, or what the loop itself stopped for; the first that came, None before.
    """

    reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def agreed(self) -> bool:
        """Whether any process of the run was asked to stop. All processes call it and get the same answer; then
        ``reason`` is the same on all as well."""
        reason = next((reason for reason in exchange(self.reason) if reason is not None), None)
        self.reason = reason or self.reason
        return reason is not None

    def give_up(self) -> None:
        """Raises `StepGivenUp` where any process was asked to stop. All processes call it."""
        if self.agreed():
            raise StepGivenUp


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yields a ``Stop`` that the first SIGINT (Ctrl-C) or SIGTERM sets, with a line on standard error. A Ctrl-C after
    it raises ``KeyboardInterrupt``.

    The handlers from before are back on exit. Outside the main thread, where Python permits no handlers, nothing is
    ever requested.

    Example::

        with stop_on_signal() as stop:
            while not stop.requested:
                step()
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    signalled = False  # by a signal: the loop may stop for a reason of its own

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        if signalled:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # schedulers repeat SIGTERM
        signalled, name = True, signal.Signals(number).name
        stop.reason = stop.reason or name
        # By the system alone: a signal may come within a print, which does not take another.
        os.write(2, f"\n{name}: stopping at the next safe moment; Ctrl-C stops at once\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_interrupts() -> None:
    """A Ctrl-C that comes within a callback of the garbage collector's, as JAX has them, is not lost: Python prints and
    forgets what is raised there, so it is sent once more."""
    before = sys.unraisablehook

    def again(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    def hook(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt) and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            before(lost)

    sys.unraisablehook = hook
