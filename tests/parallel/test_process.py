"""What a process is told before it computes: where it will compute, and that it keeps freed memory."""

import os
import subprocess
import sys

import jax
import pytest

from rlstab_jax.parallel import process
from rlstab_jax.types import UserError

# Allocates and frees 128 MiB over and over, where programs would run, and counts page faults after the first time.
# Without huge pages (PR_SET_THP_DISABLE), which would make the faults few in either case.
FAULTS = """
import ctypes, resource, sys, threading
import numpy as np
from rlstab_jax.parallel.process import keep_freed_memory
assert ctypes.CDLL(None).prctl(41, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0
memory, place = sys.argv[1:]
if memory == "kept":
    assert keep_freed_memory(threads_allocate=place == "thread")
def work():
    np.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        np.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if place == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(process.platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these options")
@pytest.mark.parametrize("place", ["main", "thread"])
def test_freed_memory_is_used_again(place):
    def faults(memory: str) -> int:
        command = [sys.executable, "-c", FAULTS, memory, place]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 4 * 2**27 // os.sysconf("SC_PAGE_SIZE")
    assert faults("mapped") > 0.9 * pages
    assert faults("kept") < 0.01 * pages


@pytest.mark.skipif(process.platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has arenas")
@pytest.mark.parametrize(("virtual", "arenas"), [(1, "several"), (2, "one")])
def test_the_compilers_threads_have_memory_of_their_own(virtual, arenas):
    """The arenas of glibc, as many as its report of them names, after something was compiled in other threads."""
    report = """
import ctypes, jax, jax.numpy as jnp, sys
from rlstab_jax.parallel.process import prepare_jax
prepare_jax()
jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((64, 64))).block_until_ready()
c = ctypes.CDLL(None)
c.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(c.fopen(b"/dev/stdout", b"w"))
assert c.malloc_info(0, file) == 0
c.fclose(file)
"""
    variables = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={virtual}" * (virtual > 1),
    }
    command = [sys.executable, "-c", report]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
    assert ("one" if done.stdout.count("<heap nr=") == 1 else "several") == arenas


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
    monkeypatch.setattr(process, "keep_freed_memory", lambda threads_allocate: called.append(True))
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    process.prepare_jax()
    assert called == []
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    process.prepare_jax()
    assert called == [True]


def test_a_platform_without_a_device_is_said_in_a_line(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu': no such device\nand more")

    process.check_devices()
    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(
        UserError, match=r"JAX finds no device for JAX_PLATFORMS = .*no such device and more\): unset it"
    ):
        process.check_devices()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (None, "--xla_allow_excess_precision=false"),
        ("--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math=true --xla_allow_excess_precision=false"),
        ("--xla_allow_excess_precision=true", "--xla_allow_excess_precision=true"),
        ("flags.txt", "flags.txt"),
    ],
)
def test_what_a_program_rounds_is_rounded(monkeypatch, flags, expected):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    process.round_as_written()
    process.round_as_written()
    assert process.os.environ["XLA_FLAGS"] == expected
