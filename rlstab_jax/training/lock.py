"""One process at a time works on a run: two that append to it, or cut it back to a checkpoint, would tear it.

A run under ``gs://`` is locked on each host by itself; of two hosts, the later one goes on (`home.Home.own`).
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rlstab_jax.parallel.distributed import first, together
from rlstab_jax.types import UserError


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps others from the run in ``path``. A process that is killed lets go of it, and leaves nothing in the way.

    The lock is a file beside the directory, which may be moved aside meanwhile; process 0 holds it. Where the system or
    the file system has no locks, nothing is held.

    Raises:
      UserError: another process holds it.
    """
    there = path.resolve()  # the same for all names of a run
    file = there.with_name(f".{there.name}.lock")
    lock = together(lambda: _lock(file, path) if first() else None)
    try:
        yield
    finally:
        if lock is not None:
            file.unlink(missing_ok=True)
            lock.close()


def _lock(file: Path, path: Path) -> TextIO | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a+")
        except OSError:  # the directory cannot be made: whoever begins the run there says so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read() or "another process"
            handle.close()
            raise UserError(
                f"{path}: {holder} is at work on this run: wait for it, stop it, or give another --out"
            ) from None
        except OSError:  # a file system without locks
            handle.close()
            file.unlink(missing_ok=True)
            return None
        if file.exists() and os.path.samestat(file.stat(), os.fstat(handle.fileno())):
            break
        handle.close()  # who held it has just removed it
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle
