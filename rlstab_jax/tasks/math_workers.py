"""math-verify in processes of their own: an answer that explodes costs a worker, not the run."""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("math_worker.py")


class MathWorkers:
    """Workers that compare answers, started when they are first needed and ended with this object.

    Args:
      count: processes.
      seconds: of CPU time for one comparison; ten times as much wall-clock time.
      memory: bytes of each process.
    """

    def __init__(self, count: int, seconds: float, memory: int):
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(_Worker(seconds, memory))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="math-verify")

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """For each (reference, answer): ``{"right": bool}``; ``{"gave_up": cause}`` for an answer that used up time or
        memory; ``{"error": message}`` for a reference that cannot be read, or a worker that does not work."""
        return list(self._threads.map(self._compare, pairs))

    def _compare(self, pair: tuple[str, str]) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.ask(pair)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, replaced when it has died."""

    def __init__(self, seconds: float, memory: int):
        # -P: the script's own folder holds modules of common names.
        self._command = [sys.executable, "-P", str(_SCRIPT), str(seconds), str(memory)]
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize | None = None

    def ask(self, pair: tuple[str, str]) -> dict[str, Any]:
        if self._process is not None and self._process.poll() is not None:
            self._let_go(self._process)  # it was killed while it had nothing to do: no answer is to blame
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        reply = ""
        try:
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            pass
        if reply.endswith("\n"):
            return json.loads(reply)
        self._let_go(process)
        code = process.wait()
        if code < 0:  # killed: by its own timers, or by a system that is short of memory
            return {"gave_up": signal.Signals(-code).name}
        return {"error": f"a math-verify worker ended with exit code {code}: does `import math_verify` work?"}

    def _let_go(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        if self._finalizer is not None:  # it would hold the dead process, and so its pipes
            self._finalizer.detach()
        for pipe in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a signal for the whole foreground group is the run's to handle
        )
        self._finalizer = weakref.finalize(self, process.kill)
        return process
