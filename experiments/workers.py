"""Runs the jobs of a study: ordinary run directories, several in one process so that each program is compiled once."""

import dataclasses
import math
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.provenance import commit, processor
from rlstab_jax.parallel.process import prepare_jax
from rlstab_jax.rundir import read_manifest, read_metrics
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.run import train

Row = dict[str, Any]
# What is kept of a run's metrics; those with max in their name by their maximum, the others by their mean.
KEPT = (
    "discrepancy/f2",
    "discrepancy/k1",
    "discrepancy/k3",
    "discrepancy/max_ratio",
    "discrepancy_live/k3",
    "eval/accuracy_rollout",
    "eval/accuracy_training",
    "eval/response_length",
    "first_order/sequence_gap",
    "first_order/token_gap",
    "learner/broken",
    "learner/grad_norm",
    "policy/entropy",
    "predictor/kl",
    "predictor/kl_unpredicted",
    "predictor/missed",
    "response/length",
    "response/truncated",
    "reward/mean",
    "routing/old_vs_target",
    "routing/rollout_vs_old",
    "staleness/k3",
    "staleness/max_ratio",
    "trust/masked",
    "weight/ess",
    "weight/truncated",
)
STEP = "progress/gradient_steps"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to do."""

    cell: str
    pair: int
    key: str
    """What it is known by; see `study.key_of`."""
    config: RunConfig
    differences: Mapping[str, Any]
    """Of the config from the defaults."""

    @property
    def name(self) -> str:
        return f"{self.cell}-pair{self.pair:02d}"


def condense(metrics: Mapping[str, np.ndarray], every: int) -> dict[str, list[float | None]]:
    """Columns of one value for each ``every`` gradient steps, the first one for step 0, to five significant digits."""
    steps = metrics[STEP]
    place = np.ceil(steps / every).astype(int)
    columns: dict[str, list[float | None]] = {STEP: [float(i * every) for i in range(place.max() + 1)]}
    for name in (name for name in KEPT if name in metrics):
        reduce = np.max if "max" in name else np.mean
        parts = [metrics[name][(place == i) & np.isfinite(metrics[name])] for i in range(place.max() + 1)]
        columns[name] = [float(f"{reduce(part):.5g}") if len(part) else None for part in parts]
    return columns


def first_broken(metrics: Mapping[str, np.ndarray]) -> float | None:
    """The gradient step of the first gradient that was not finite, or None."""
    trained = np.isfinite(metrics["reward/mean"])
    broken = metrics[STEP][trained & ~np.isfinite(metrics["learner/grad_norm"])]
    return float(broken[0]) if len(broken) else None


def do(job: Job, runs: Path, deadline: float = math.inf) -> Row | None:
    """Runs a job, or goes on with it. None if it was stopped, by a signal or by the deadline (of `time.time`).

    The row's ``seconds`` and ``cpu_seconds`` (of all threads) hold start-up, compilation, evaluation and, where none
    was there, the cold start; they are NaN if the run was done in several pieces.
    """
    path, begun, begun_cpu = runs / f"{job.name}-{job.key}", time.perf_counter(), time.process_time()
    whole = not (path / "metrics.jsonl").exists()

    def watch(metrics: Mapping[str, float]) -> None:
        if time.time() > deadline:
            signal.raise_signal(signal.SIGTERM)  # as a scheduler would: the run saves a checkpoint and returns

    if train(job.config, path, say=lambda line: None, watch=watch) is not None:
        return None
    metrics, manifest = read_metrics(path), read_manifest(path)
    versions = {name: manifest["versions"][name] for name in ("python", "jax", "numpy", "rlstab_jax")}
    return {
        "cell": job.cell,
        "pair": job.pair,
        "key": job.key,
        "config": dict(job.differences),
        "versions": versions,
        "commit": commit(),
        "device": manifest["devices"]["kind"],
        "processor": processor(),
        "seconds": round(time.perf_counter() - begun, 1) if whole else math.nan,
        "cpu_seconds": round(time.process_time() - begun_cpu, 1) if whole else math.nan,
        "broken": first_broken(metrics),
        "metrics": condense(metrics, job.config.evaluation.every),
    }


def work(
    jobs: Sequence[Job],
    runs: Path,
    keep: Callable[[Row], None],
    *,
    processes: int = 2,
    hours: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Does the jobs in their order, as many at a time as there are processes.

    Args:
      keep: is given the row of each finished run, in this process.
      processes: each has its share of the cores; 0 for this process itself.
      hours: after so long, runs save themselves and stop; the same call goes on with them.

    Returns:
      The names of the jobs that ended in an error; the others are done all the same.

    Raises:
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the runs have saved themselves.
    """
    deadline, counts, failed = time.time() + 3600 * hours, {"done": 0}, list[str]()

    def take(job: str, row: Row | None, error: str) -> None:
        if error:
            failed.append(job)
            say(f"{job} failed: {error}")
        elif row is not None:
            keep(row)
            counts["done"] += 1
            final = next(x for x in reversed(row["metrics"]["eval/accuracy_training"]) if x is not None)
            time_taken = f" after {row['seconds']:.0f} s" if math.isfinite(row["seconds"]) else ""
            say(f"{counts['done']}/{len(jobs)} {job}: accuracy {final:.2f}{time_taken}")

    if not jobs:
        return failed
    if processes == 0:
        for job in jobs:
            if time.time() >= deadline:
                break
            row, error = _attempt(job, runs, deadline)
            take(job.name, row, error)
            if row is None and not error and time.time() < deadline:  # the run has answered a signal
                raise KeyboardInterrupt
    else:
        _in_processes(jobs, runs, take, processes, deadline)
    if (left := len(jobs) - counts["done"] - len(failed)) > 0:
        say(f"{left} runs are left; the same command goes on")
    return failed


def _attempt(job: Job, runs: Path, deadline: float) -> tuple[Row | None, str]:
    try:
        return do(job, runs, deadline), ""
    except Exception as error:  # a run that fails must not take the other ones with it
        return None, f"{type(error).__name__}: {error}"


def _in_processes(
    jobs: Sequence[Job], runs: Path, take: Callable[[str, Row | None, str], None], processes: int, deadline: float
) -> None:
    context = multiprocessing.get_context("spawn")
    done, halt, begun = context.Queue(), context.Event(), context.Value("i", 0)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [set(cores[i::processes]) or set(cores) for i in range(processes)]
    arguments = [(jobs, begun, done, halt, runs, deadline, share) for share in shares]
    children = [context.Process(target=_serve, args=given, daemon=True) for given in arguments]

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        for child in children:
            child.start()
        while any(child.is_alive() for child in children) or not done.empty():
            try:
                take(*done.get(timeout=1))
            except queue.Empty:
                continue
    finally:
        halt.set()
        for child in children:
            if child.is_alive():
                child.terminate()  # SIGTERM: a run in progress saves a checkpoint
        for child in children:
            child.join()
        signal.signal(signal.SIGTERM, before)


def prepare(runs: Path) -> None:
    """What a process that computes is told first: compiled programs stay beside the runs, unless JAX has a place."""
    prepare_jax(None if jax.config.jax_compilation_cache_dir else (runs / "compiled").resolve())


def _serve(jobs: Sequence[Job], begun: Any, done: Any, halt: Any, runs: Path, deadline: float, cores: set[int]) -> None:
    """One process: the next job that no process has begun, until none is left, time is up, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one is told by its parent
    if cores:
        os.sched_setaffinity(0, cores)
    prepare(runs)
    parent = os.getppid()
    while not halt.is_set() and time.time() < deadline and os.getppid() == parent:
        with begun.get_lock():
            number, begun.value = begun.value, begun.value + 1
        if number >= len(jobs):
            return
        done.put((jobs[number].name, *_attempt(jobs[number], runs, deadline)))
