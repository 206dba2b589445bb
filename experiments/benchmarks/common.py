"""What the benchmarks share: interleaved repetitions, paired ratios, peak memory, held threads, tables on disk.

Speeds of two programs are compared inside one process: each repetition runs every contender once, and the ratio is
taken within a repetition, so that a machine that is slow for a while is slow for both. Numbers travel as plain
dictionaries, as they stand in the JSON file; tables and pictures are made from that file alone.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.provenance import commit, processor
from rlstab_jax.types import UserError

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "tokamax", "torch", "transformers", "google-tunix")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program to be timed."""

    name: str
    """What the tables call it."""
    run: Callable[[], object]
    """Runs it once, to its end: nothing is still being computed when it returns."""
    amount: float
    """What one run gets done, such as its number of tokens."""


@dataclasses.dataclass(frozen=True)
class Missing:
    """A contender that could not be had here. The tables name it, with the reason."""

    name: str
    reason: str
    """One line, with what to do about it."""


class Spread(NamedTuple):
    """Median and quartiles of repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    def text(self, form: str = ".2f") -> str:
        """The median and the quartiles, these unless they are one number, as of a single repetition."""
        if self.low == self.high:
            return f"{self.median:{form}}"
        return f"{self.median:{form}} [{self.low:{form}}, {self.high:{form}}]"


def measure(contenders: Sequence[Contender | Missing], repetitions: int, memory: bool = True) -> list[dict[str, Any]]:
    """Times all contenders, interleaved. Each runs once before, untimed, which compiles it.

    The order turns by one from repetition to repetition, so that none always follows the same other.

    Args:
      contenders: those that are missing are passed on as such.
      repetitions: timed runs of each.
      memory: whether to run each once more, for its peak memory.

    Returns:
      for each contender name, amount, seconds [repetitions] and peak_bytes (None if not measured); or name and missing.
    """
    present = [c for c in contenders if isinstance(c, Contender)]
    for contender in present:
        contender.run()
    seconds: dict[str, list[float]] = {c.name: [] for c in present}
    for repetition in range(repetitions):
        turn = repetition % max(len(present), 1)
        for contender in [*present[turn:], *present[:turn]]:
            start = time.perf_counter()
            contender.run()
            seconds[contender.name].append(time.perf_counter() - start)
    return [
        {"name": c.name, "missing": c.reason}
        if isinstance(c, Missing)
        else {
            "name": c.name,
            "amount": c.amount,
            "seconds": seconds[c.name],
            "peak_bytes": peak_bytes(c.run) if memory else None,
        }
        for c in contenders
    ]


def rates(result: dict[str, Any]) -> np.ndarray:
    """Amount per second of each repetition."""
    return result["amount"] / np.asarray(result["seconds"])


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> Spread:
    """How many times as fast ours is as the peer, paired by repetition."""
    return Spread.of(rates(ours) / rates(peer))


def fastest(results: Sequence[dict[str, Any]], of: str) -> dict[str, Any] | None:
    """That of the highest median rate whose name begins with ``of``, or None where all of these are missing."""
    present = [r for r in results if "missing" not in r and r["name"].startswith(of)]
    return max(present, key=lambda r: float(np.median(rates(r))), default=None)


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Memory that ``run`` needs at its peak, beyond what its process held before.

    On Linux the peak of resident memory, which the kernel lets a process reset, after freed pages went back to it. An
    accelerator's peak cannot be reset, so that there it is that of the whole process. None on other systems.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        run()
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    if sys.platform != "linux":
        return None
    gc.collect()
    # Freed pages that the allocator keeps would hide what the run needs. Only glibc has this function.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident()["VmRSS"]
    run()
    return _resident()["VmHWM"] - before


def _resident() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts[0] in ("VmRSS:", "VmHWM:")}


def environment() -> dict[str, Any]:
    """The day, the commit ("+" if the code is not the commit's), the machine, the versions of installed libraries."""
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    device = jax.local_devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "device": f"{device.platform}: {processor() if device.platform == 'cpu' else device.device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def held_to(threads: int, module: str, arguments: Sequence[str], devices: int = 1) -> Any:
    """Runs ``python -m module arguments --worker FILE`` on so many CPU cores; returns what it wrote to FILE as JSON.

    A process of its own, since XLA sizes its thread pool when it starts: by the cores that the process may use, and
    makes its ``devices`` then. Linux. For all libraries alike, large arrays lie in huge pages, and the child is to keep
    memory that is freed for the next run (`prepare_jax`), as `rlstab train` does: clearing new pages in each run takes
    longer than some of the work.
    """
    if sys.platform != "linux":
        raise UserError("holding a process to some cores needs Linux: use --quick, which holds none")
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f"--threads {threads}: this process may use {len(cores)} cores")
    alone = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    variables["JAX_PLATFORMS"] = "cpu"
    virtual = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    variables["XLA_FLAGS"] = " ".join(f"{os.environ.get('XLA_FLAGS', '')} {alone} {virtual}".split())
    variables["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--worker", str(file)]
        os.sched_setaffinity(0, cores[:threads])  # a child inherits it
        try:
            subprocess.run(command, env=os.environ | variables, check=True)
        finally:
            os.sched_setaffinity(0, cores)
        return json.loads(file.read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Saves aside and renames, so that a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}{path.suffix}")
    save(aside)
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    write(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))
