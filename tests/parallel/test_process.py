"""What a process is told before it computes: where it will compute, and that it keeps freed memory."""

import os
import subprocess
import sys

import jax
import pytest

from rlstab_jax.parallel import process

# Allocates and frees 128 MiB over and over, in another thread as XLA does, and counts page faults after the first time.
# Without huge pages (PR_SET_THP_DISABLE), which would make the faults few in either case.
FAULTS = """
import ctypes, resource, sys, threading
import numpy as np
from rlstab_jax.parallel.process import keep_freed_memory
assert ctypes.CDLL(None).prctl(41, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def work():
    np.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(process.platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these options")
def test_freed_memory_is_used_again():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 4 * 2**27 // os.sysconf("SC_PAGE_SIZE")
    assert faults("mapped") > 0.9 * pages
    assert faults("kept") < 0.01 * pages


@pytest.mark.parametrize(
    ("platforms", "libtpu", "plugins", "expected"),
    [
        ("cpu", True, True, True),
        ("cpu,cuda", True, True, True),
        ("tpu,cpu", False, False, False),
        (None, False, False, True),
        (None, True, False, False),
        (None, False, True, False),
    ],
)
def test_memory_is_kept_where_nothing_but_the_cpu_can_be_meant(monkeypatch, platforms, libtpu, plugins, expected):
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: libtpu or None)
    monkeypatch.setattr(process, "entry_points", lambda group: [group] if plugins else [])
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert process.on_cpu() is expected
    finally:
        jax.config.update("jax_platforms", before)


def test_an_accelerators_host_gives_memory_back(monkeypatch):
    called = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    process.prepare_jax()
    assert called == []
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    process.prepare_jax()
    assert called == [True]
