"""What all tests share: the folder of compiled programs, and a bound on how many of them a process holds."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

MAPS = Path("/proc/self/maps")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made: list[str] = []


def pytest_configure() -> None:
    """Workers, and the processes that tests start, inherit the folder: each program is compiled once in a session."""
    if _CACHE not in os.environ:
        _made.append(tempfile.mkdtemp(prefix="rlstab_compiled_"))
        os.environ |= {_CACHE: _made[0], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        jax.config.update("jax_compilation_cache_dir", _made[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_unconfigure() -> None:
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs() -> Iterator[None]:
    """A compiled program is several memory maps; Linux grants a process 65,530, and XLA crashes where none is left."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
