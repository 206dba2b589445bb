"""What tests share: how programs are compiled, the folder that keeps them, and a bound on how many a process holds."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from rlstab_jax.parallel.process import round_as_written
from tests.xla import emit_quickly

MAPS = Path("/proc/self/maps")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_QUICK = "jax_disable_most_optimizations"
_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Workers, and the processes that tests start, inherit all of this: each program is compiled once in a session.

    Compiling is most of the suite's time, and about a fifth of all goes into optimising programs that run once. Modules
    and tests that are marked ``optimised`` do without that economy; JAX_DISABLE_MOST_OPTIMIZATIONS=0 is for all to do
    without.
    """
    round_as_written()  # as all commands do
    config.addinivalue_line("markers", "optimised: a module or test whose programs are compiled as a user's are")
    os.environ.setdefault(_QUICK.upper(), "1")
    if os.environ[_QUICK.upper()] == "1":
        emit_quickly()
    _compile_as_told()
    gc.set_threshold(50_000, 20, 100)  # walking over all that JAX traces and keeps would be a twentieth of the time
    if _CACHE not in os.environ:
        _made.append(tempfile.mkdtemp(prefix="rlstab_compiled_"))
        os.environ |= {_CACHE: _made[0], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        jax.config.update("jax_compilation_cache_dir", _made[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_unconfigure() -> None:
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _optimised_module(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from _optimised(request.node)


@pytest.fixture(autouse=True)
def _optimised_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from _optimised(request.node)


def _optimised(node: pytest.Item | pytest.Collector) -> Iterator[None]:
    """A function that is compiled is not compiled anew for other options: none is kept from before, or for later."""
    if not any(marker.name == "optimised" for marker in node.own_markers):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_QUICK.upper(), "0")
        _compile_as_told()
        yield
    _compile_as_told()


def _compile_as_told() -> None:
    jax.clear_caches()
    jax.config.update(_QUICK, os.environ[_QUICK.upper()] == "1")


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs() -> Iterator[None]:
    """A compiled program is several memory maps; Linux grants a process 65,530, and XLA crashes where none is left."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
