"""What a process of JAX is told before it computes anything."""

import contextlib
import ctypes
import importlib.util
import os
import platform
from importlib.metadata import entry_points
from pathlib import Path

import jax

from rlstab_jax.types import UserError, one_line

# Numbers of the options of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
EXCESS = "xla_allow_excess_precision"


def prepare_jax(compilation_cache: Path | None = None) -> None:
    """Keeps compiled programs in ``compilation_cache`` between runs, and on CPU memory between programs; rounds to
    bfloat16 wherever a model does (`round_as_written`).

    Call it before the first array is made: later it has less effect, or none.
    """
    round_as_written()
    # Virtual CPU devices: programs in flight together can starve each other's collectives of threads, for ever.
    virtual = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if virtual or on_cpu():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if on_cpu():
        keep_freed_memory(threads_allocate=virtual)
    if compilation_cache is None:
        return
    with contextlib.suppress(OSError):
        compilation_cache.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the many small ones take seconds as well


def round_as_written() -> None:
    """Tells XLA to round to bfloat16 wherever a program does, unless XLA_FLAGS says otherwise.

    By default it keeps float32 between operations that it fuses, and fuses others in each program: then what a sampler
    drew from is not what the training engine scores, at equal weights and precision. To be called before JAX's backends
    start, which read the flags.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    a_file = bool(flags) and not flags.startswith("-")
    if EXCESS not in flags and not a_file:
        os.environ["XLA_FLAGS"] = f"{flags} --{EXCESS}=false".strip()


def check_devices() -> None:
    """Raises UserError where JAX finds none of the devices that it is told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS = {_platforms()!r} ({one_line(error)}): unset it, or use cpu"
        ) from error


def on_cpu() -> bool:
    """Whether JAX will compute on the CPU, as far as it can be told before its backends start: it is told to, or
    nothing else is installed."""
    if platforms := _platforms():
        return platforms.split(",")[0] == "cpu"
    return importlib.util.find_spec("libtpu") is None and not entry_points(group="jax_plugins")


def _platforms() -> str:
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def keep_freed_memory(threads_allocate: bool) -> bool:
    """Tells glibc to keep what is freed for the next allocation, whatever its size, instead of giving it back.

    XLA on CPU allocates a program's temporary memory as one block, in each call. By default blocks above 32 MiB are
    mapped and unmapped each time, and the kernel clears them page by page, which takes a good part of an update. The
    process keeps the memory of its peak. To be called before JAX's backends start, whose threads choose their arenas.

    Args:
      threads_allocate: that block is allocated by another thread than the main one, as under asynchronous dispatch or
        with virtual devices. Then all threads share an arena, since those of other threads cannot hold large blocks.
        Otherwise each has its own: what the compiler keeps leaves thousands of holes in an arena, and a product that
        asks for a little memory would search them, in a sixth of a small update's time.

    Returns:
      whether this system's allocator has these options, and took them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    arenas = [mallopt(M_ARENA_MAX, 1)] if threads_allocate else []
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), *arenas])
