"""Puts this folder on the path, so that every test can import the shared builders of `tiny`."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs() -> Iterator[None]:
    """A compiled program is several memory maps; Linux grants a process 65,530, and XLA crashes where none is left."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
