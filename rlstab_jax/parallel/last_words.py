"""A small process between this one's standard error and the terminal, for what JAX says when it ends a process.

When a process of a run is gone, JAX's coordination service ends all others from a thread of its own, with a stack
trace and without giving Python a chance. This file is run as a script, reads what its parent writes to standard error
and passes it on; in the place of that stack trace it writes one line.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Iterator

# Records of the coordination service come before the end, or are harmless; which of both shows within `PATIENCE`.
HELD = re.compile(rb"[IWE]\d{4} [\d:.]+ +\d+ coordination_service")
END = re.compile(
    rb"F\d{4} [\d:.]+ +\d+ client\.h.*JAX distributed service detected fatal errors.*?(?:absl::Status: (.*))?$"
)
PATIENCE = 1.0  # seconds


def main(name: str, message: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the parent, whose last words are to come
        signal.signal(number, signal.SIG_IGN)
    held: list[bytes] = []
    spoken = False  # whether the parent has said itself why it ends
    for line in lines():
        if end := END.match(line):
            status = (end[1] or b"no heartbeat").decode(errors="replace").strip()[:200]
            write(b"" if spoken else f"{name}: {message.format(status)}\n".encode())
            return
        spoken |= line.startswith(name.encode() + b": ")
        held = [*held, line] if held or HELD.match(line) else held
        if not held:
            write(line)
        if not line:
            write(b"".join(held))
            held = []
    write(b"".join(held))


def lines() -> Iterator[bytes]:
    """Lines of standard input as they come, and an empty one after each pause."""
    rest, paused = b"", True
    while True:
        if not select.select([0], [], [], None if paused else PATIENCE)[0]:
            paused = True
            yield b""
            continue
        paused = False
        if not (data := os.read(0, 1 << 16)):
            break
        *whole, rest = (rest + data).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if rest and not re.match(rb"[IWEF]\d", rest):  # a prompt or a progress bar waits for no end of its line
            yield rest
            rest = b""
    if rest:
        yield rest


def write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]


if __name__ == "__main__":
    main(*sys.argv[1:])
