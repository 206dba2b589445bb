"""A whole run: cold start or resume, global steps, evaluation, checkpoints, what it leaves on disk."""

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlstab_jax.models.config import dense_remark
from rlstab_jax.own_code import code_of
from rlstab_jax.parallel.distributed import agree_on, by_first, first, of_first, together
from rlstab_jax.report import draw_run
from rlstab_jax.rundir import MAY_CHANGE, Bystander, RunDir, open_run, plain, read_manifest, read_metrics
from rlstab_jax.stability.monitor import Monitor
from rlstab_jax.tasks import DescribedTask, prompt_iterator
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.cold_start import cold_start
from rlstab_jax.training.collect import try_task
from rlstab_jax.training.config import RunConfig, defaults, may_change
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.evaluate import evaluate
from rlstab_jax.training.home import Home, home_of
from rlstab_jax.training.interrupt import StepGivenUp, Stop, stop_on_signal
from rlstab_jax.training.lock import held
from rlstab_jax.training.loop import Metrics, RunState, first_train_state, global_step
from rlstab_jax.training.pretrained import keep_card
from rlstab_jax.training.queue import Queue, annotated, blank, notes
from rlstab_jax.types import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "rlstab_jax")


@dataclasses.dataclass
class Progress:
    """Counters of a run, saved with each checkpoint."""

    global_steps: int = 0
    gradient_steps: int = 0
    responses: int = 0
    tokens: int = 0
    prompts: dict[str, Any] = dataclasses.field(default_factory=dict)  # the prompt iterator's position
    monitor: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the monitor remembers
    queue: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # what waits, besides its arrays

    def advance(self, config: RunConfig, metrics: Metrics, prompts: dict[str, Any], queue: Queue) -> None:
        """Counts one global step, with its metrics, and the prompt iterator's position and the queue after it."""
        self.global_steps += 1
        self.gradient_steps += config.minibatches
        self.responses += int(metrics["response/count"])
        self.tokens += round(metrics["response/length"] * metrics["response/count"])
        self.prompts, self.queue = prompts, notes(queue)

    def metrics(self) -> Metrics:
        names = ("global_steps", "gradient_steps", "responses", "tokens")
        return {f"progress/{name}": getattr(self, name) for name in names}


def train(
    config: RunConfig,
    out: Path | str,
    *,
    fresh: bool = False,
    accept_code: bool = False,
    profile: int | None = None,
    say: Callable[[str], None] = print,
    watch: Callable[[Metrics], None] = lambda metrics: None,
    begin: Callable[[], None] = lambda: None,
) -> str | None:
    """Runs ``config`` in the directory ``out``, or goes on with the run that is there.

    Args:
      out: a directory, or ``gs://bucket/path``; see `home`.
      fresh: begin anew; what is in ``out`` is moved aside.
      accept_code: go on though code of the user's own has changed since; see `open_run`.
      profile: the global step of which to leave a profiler trace in ``out/profile``.
      say: where one-line messages go.
      watch: is given the metrics of each global step, e.g. for a progress bar.
      begin: is called when all that can be checked beforehand has been, and the work begins.

    Returns:
      None when the run is complete, or what stopped it: the name of a signal, or "monitor". A checkpoint was saved in
      either case.

    Raises:
      UserError: a mistake in the config, the directory, a checkpoint, or a full disk; or another process is at work in
        the directory.
    """
    engines = together(lambda: build(config))
    last = -(-config.gradient_steps // config.minibatches)
    if profile is not None and not 1 <= profile <= last:  # one that is made already is none: the same command goes on
        raise UserError(f"profile = {profile}: expected a global step of the run, from 1 to {last}")
    if not len(engines.task.split("train")):
        raise UserError("the task has no prompts to train on: give task.train")
    if isinstance(engines.task, DescribedTask):  # each process reads its own files
        agree_on({f"the task's {name}": value for name, value in engines.task.description.items()})
    rollout = engines.config.rollout
    together(lambda: try_task(engines.task, rollout.prompt_length, kept=bool(rollout.partial)))
    with held(home_of(str(out)).path):
        home, run = open_home(engines, config, str(out), fresh, accept_code, say)
        begin()
        return _work(engines, home, run, str(out), profile, say, watch)


def _work(
    engines: Engines,
    home: Home,
    run: RunDir,
    out: str,
    profile: int | None,
    say: Callable[[str], None],
    watch: Callable[[Metrics], None],
) -> str | None:
    """The opened run, from where it is to its end or a stop; see `train`."""
    config = engines.config
    if home.bucket is not None:
        say(f"logs are written to {run.path}, and copied to {out} with each checkpoint")
    kernels = config.kernels
    for line in engines.task.remarks() if isinstance(engines.task, DescribedTask) else ():
        say(line)
    aside = f", and {dict(engines.rollout_mesh.shape)} makes batches" if engines.rollout_mesh else ""
    say(f"kernels: attention {kernels.attention}, experts {kernels.experts}; mesh {dict(engines.mesh.shape)}{aside}")
    if remark := dense_remark(kernels, jax.default_backend(), config.model):
        say(remark)
    with (
        stop_on_signal() as stop,
        Checkpoints(home.checkpoints, keep_last=config.keep_checkpoints, notify=say) as checkpoints,
    ):

        def save(step: int, *state: Any) -> None:
            by_first(home.store)  # first: what is logged shall never be behind the newest checkpoint
            checkpoints.save(step, *state)

        cache = run.path.parent / "cold_start" if home.bucket is None else None
        begun = resume_or_begin(engines, run, checkpoints, cache, say, stop)
        complete = begun is not None and _train(engines, run, save, *begun, stop, profile, say, watch)
        stopped = not complete and stop.agreed()
    if first() and run.metrics_path.exists():  # a run may have been stopped before its first step
        draw_run(read_metrics(run.path), run.report_path, title=run.path.name)
    by_first(home.store)
    if stopped:
        say(f"stopped by {stop.reason}; the same command goes on from here")
    return stop.reason if stopped else None


def open_home(
    engines: Engines, config: RunConfig, out: str, fresh: bool, accept_code: bool, say: Callable[[str], None]
) -> tuple[Home, RunDir]:
    """Where the run is, begun or found there; process 0 writes it. Raises UserError as `train`."""
    home = home_of(out)
    path = home.path
    if config.initial and Path(config.initial).resolve() == path.resolve():
        raise UserError(
            f"initial = {config.initial} is --out itself: give the run that begins from there another --out"
        )

    def opened() -> bytes:
        if home.bucket is not None and fresh and home.begun:
            raise UserError(f"{out} holds a run already, and nothing is moved aside in a bucket: give another --out")
        home.fetch()
        if not fresh:
            _check_content(engines, path)
        open_run(path, manifest(engines, config), fresh, may_change(config), say, defaults(), accept_code)
        keep_card(path, config.initial, engines.task.tokenizer)
        home.own()
        home.store()
        return (path / "manifest.json").read_bytes()

    written = by_first(opened)
    if home.bucket is None:
        together(lambda: _check_shared(path, written))
    return home, RunDir(path) if first() else Bystander(path)


def resume_or_begin(
    engines: Engines,
    run: RunDir,
    checkpoints: Checkpoints,
    cache: Path | None,
    say: Callable[[str], None],
    stop: Stop,
) -> tuple[RunState, Progress] | None:
    """The newest good checkpoint, or a cold start (see `cold_start` for its cache), or None if the latter was stopped.

    Cuts metrics, samples and events after the restored step. Where a run has lost its checkpoints, a copy is kept.
    """
    needs_reference = engines.config.needs_reference

    def fresh() -> RunState:
        params = initial_params(engines.training, 0)
        reference = params if needs_reference else None
        return RunState(first_train_state(engines, params), reference, blank(engines))

    restored = checkpoints.restore(engines.placed_like(fresh))
    if restored is not None:
        step, state, saved = restored
        run.truncate_after(step)
        say(f"resuming after global step {step}")
        state, progress = engines.place(state), Progress(**saved)
        return dataclasses.replace(state, queue=annotated(state.queue, progress.queue)), progress
    config = engines.config
    due = min(config.checkpoint_every, config.gradient_steps)
    if first() and run.last_step * config.minibatches >= due:
        say(
            f"{checkpoints.directory} holds no checkpoint of the run any more: it begins anew; what it has logged is "
            f"kept in {run.keep_copy()}"
        )
    run.truncate_after(-1)
    started = cold_start(engines, cache, say, stop)
    if started is None:
        return None
    # Copied: an update donates its state, and the reference must outlive it.
    reference = jax.tree.map(lambda x: x.copy(), started.params) if needs_reference else None
    state = engines.begin(partial(first_train_state, engines), started.params)
    return engines.place(RunState(state, reference)), Progress()


def _train(
    engines: Engines,
    run: RunDir,
    save: Callable[..., None],
    state: RunState,
    progress: Progress,
    stop: Stop,
    profile: int | None,
    say: Callable[[str], None],
    watch: Callable[[Metrics], None],
) -> bool:
    """From ``state`` to the run's end, or to a stop; returns whether it is complete."""
    config = engines.config
    state = dataclasses.replace(state, reference=engines.making.place(state.reference))  # once
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=config.seed)
    if progress.prompts:
        data.set_state(progress.prompts)
    evaluation_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    accuracy = math.nan
    monitor = Monitor(config.monitor, progress.monitor)
    if progress.global_steps == 0 and config.evaluation.every:
        metrics = of_first(evaluate(engines, state.train.params, evaluation_key)) | progress.metrics()
        run.truncate_after(-1)
        run.append_metrics(metrics)
        watch(metrics)
        monitor.observe(metrics)
    while progress.gradient_steps < config.gradient_steps and not stop.agreed():
        step = progress.global_steps + 1
        with _profiled(run, step == profile, say):
            previous = jax.tree.map(lambda x: x.copy(), state.train) if monitor.may_discard else None
            lowered = _at_rate(engines, monitor.learning_rate_scale)
            try:
                state, metrics, samples = global_step(lowered, state, data, step, stop.give_up)
            except StepGivenUp:
                break
        metrics = of_first(metrics)
        if previous is not None:
            discards = monitor.discards(metrics)
            metrics["learner/discarded"] = config.minibatches * discards
            if discards:
                state = dataclasses.replace(state, train=previous)
                say(f"monitor: the updates of global step {step} are discarded")
        before = progress.gradient_steps
        progress.advance(config, metrics, data.get_state(), state.queue)
        accuracy = math.nan
        if _due(before, progress.gradient_steps, config.evaluation.every):
            evaluated = of_first(evaluate(engines, state.train.params, evaluation_key))
            accuracy = evaluated["eval/accuracy_training"]
            metrics |= evaluated
        metrics |= progress.metrics()
        run.append_metrics(metrics)
        run.append_samples(step, samples)
        watch(metrics)
        for remark in monitor.observe(metrics):
            say(remark.line())
            if remark.action == "stop":
                stop.reason = stop.reason or "monitor"
        progress.monitor = monitor.saved()
        for line in alarms(metrics):
            say(f"global step {step}: {line}")
        if _due(before, progress.gradient_steps, config.checkpoint_every):
            save(step, state, dataclasses.asdict(progress), accuracy)
    if progress.global_steps:
        save(progress.global_steps, state, dataclasses.asdict(progress), accuracy)
    return progress.gradient_steps >= config.gradient_steps


def alarms(metrics: Metrics) -> Iterator[str]:
    """A line for each thing that went wrong in a step and was survived."""
    if metrics["learner/broken"] > 0:
        yield (
            f"{metrics['learner/broken']:.2%} of the tokens had a log-prob or an advantage that is no finite number; "
            "they counted as 0"
        )
    if not metrics["learner/rejected"] < 1:
        yield "no token was trained on: the objective rejected all, or all responses were truncated and dropped"
    if failures := metrics.get("reward/verifier_failures"):
        yield f"{failures:.0f} verdicts failed and their rewards are 0; samples.jsonl shows the first of them"
    if not np.isfinite(metrics["learner/grad_norm"]):
        yield "a gradient was not finite; those updates changed nothing"


def _check_content(engines: Engines, out: Path) -> None:
    """Raises UserError if the run in ``out`` was begun on other prompts, or with another tokeniser, than the task's
    files hold now."""
    if not isinstance(engines.task, DescribedTask) or not (out / "manifest.json").exists():
        return
    manifest = read_manifest(out)

    def fixed(task: dict[str, Any] | None) -> dict[str, Any]:
        return {name: value for name, value in (task or {}).items() if f"task.{name}" not in MAY_CHANGE}

    if fixed(plain(engines.config.task)) != fixed(manifest.get("config", {}).get("task")):
        return  # which field it is, `open_run` says
    before, now = manifest.get("resolved", {}).get("task", {}), engines.task.description
    for name, what in (("fingerprint", "on other prompts"), ("tokenizer", "with another tokeniser")):
        if name in before and before[name] != now.get(name):
            raise UserError(
                f"{out} holds a run {what}: what the task's files hold has changed since. Put back the files, give "
                "another --out, or --fresh to begin anew (the old run is moved aside)"
            )


def _check_shared(out: Path, manifest: bytes, patience: float = 10.0) -> None:
    """Raises UserError where this process does not see the directory that process 0 has just written. Some file systems
    show a file to other hosts after seconds."""
    file, deadline = out / "manifest.json", time.monotonic() + patience
    while not (file.exists() and file.read_bytes() == manifest):
        if time.monotonic() < deadline:
            time.sleep(0.2)
            continue
        raise UserError(
            f"{out} is not the directory that process 0 writes: give --out on a file system that all hosts share, or "
            "gs://"
        )


def _at_rate(engines: Engines, scale: float) -> Engines:
    """The engines with a learning rate that the monitor has lowered; numbers are traced, so nothing is recompiled."""
    learner = engines.config.learner
    numbers = dataclasses.replace(learner, learning_rate=learner.learning_rate * scale).numbers()
    return dataclasses.replace(engines, numbers=numbers)


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` was passed; gradient steps come N at a time."""
    return bool(every) and before // every < now // every


@contextlib.contextmanager
def _profiled(run: RunDir, wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    if not (wanted and first()):
        yield
        return
    path = run.path / "profile"
    with jax.profiler.trace(str(path)):
        yield
    say(f"profile: {path}")


def manifest(engines: Engines, config: RunConfig) -> dict[str, Any]:
    """What describes a run besides its metrics: the config as given, and what it was resolved to and ran on."""
    devices = jax.devices()
    return {
        "config": config,
        "code": code_of(config),
        "resolved": {
            "kernels": engines.config.kernels,
            "vocab_size": engines.config.model.vocab_size,
            "prompt_length": engines.config.rollout.prompt_length,
            "response_length": engines.config.rollout.response_length,
            **({"task": engines.task.description} if isinstance(engines.task, DescribedTask) else {}),
        },
        "seed": config.seed,
        "versions": versions(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "mesh": dict(engines.mesh.shape),
        **({"rollout_mesh": dict(engines.rollout_mesh.shape)} if engines.rollout_mesh else {}),
        "command": sys.argv,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
