"""Checkpoints of a run, by Orbax: the last few and the best, each verified as it is read.

A checkpoint ``<directory>/<step>/`` has two items: ``state``, the arrays, and ``header``, a JSON object with the step,
the caller's progress, the metric, and the shape, dtype and checksum of each array. Orbax writes into a temporary
directory and renames it when all is on disk, so what is named by its step is complete.

Arrays are written in the background: ``save`` returns when they are copied to the host (a fifth of the time for a small
model, nearly nothing of it for a large one), and the caller may donate them at once. The next ``save``, ``wait`` or
``close`` waits for the end of the writing and reports its errors.

Checksums (``checksum.py``) are computed on the devices, and compared with the header's as a checkpoint is restored.
"""

import contextlib
import gc
import json
import logging
import math
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from rlstab_jax.parallel.distributed import by_first, exchange, together
from rlstab_jax.training.checksum import checksums, leaf_name
from rlstab_jax.types import UserError

Tree = Any  # a pytree of arrays or of ShapeDtypeStruct
Restored = tuple[int, Tree, dict[str, Any]]  # step, state, progress


_Bucket = type(epath.Path("gs://bucket"))
_log = logging.getLogger("absl")


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each error that it raises, several times and with tracebacks; it reaches the caller as one line."""
    return "orbax" not in record.pathname


class _Damaged(Exception):
    """A checkpoint is not what was written."""


@contextlib.contextmanager
def _quiet_readers() -> Iterator[None]:
    """Drops what parallel readers print when one of them has met an error: each of the others complains, at length."""
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, log.disabled = lambda event: None, True
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            gc.collect()  # abandoned reads complain when they are collected
        sys.unraisablehook, log.disabled = hook, False


class Checkpoints:
    """The checkpoints in one directory.

    Args:
      directory: created if it is not there, unless ``read_only``.
      keep_last: how many of the newest stay on disk (one more while a save is under way).
      keep_best: whether the one with the highest metric stays too; of equals, the earliest.
      read_only: never writes, cleans up or moves anything: for readers of a run that may be training right now.
      notify: is given one line for each damaged checkpoint that is passed over.
    """

    def __init__(
        self,
        directory: str | Path | epath.Path,
        keep_last: int = 2,
        keep_best: bool = True,
        *,
        read_only: bool = False,
        notify: Callable[[str], None] = print,
    ):
        self.directory = directory if isinstance(directory, _Bucket) else Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._read_only, self._notify = read_only, notify
        self._current: int | None = None  # the step last saved or restored here
        self._writes = not read_only and jax.process_index() == 0
        self._filter = lambda record: _not_orbax(record)  # its own, since another one may be open meanwhile
        _log.addFilter(self._filter)
        with _write_errors(self.directory):
            self._manager = self._open()
        self._metrics = self._metrics_on_disk()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint on disk, in ascending order, once the last save has ended."""
        self.wait()
        return by_first(self._on_disk)

    def save(self, step: int, state: Tree, progress: dict[str, Any], metric: float | None = None) -> None:
        """Saves ``state`` as ``step``, after the save before it has ended. Saving the current step again does nothing.

        Args:
          step: above every step on disk.
          state: arrays of any dtype, typed PRNG keys among them; none of size zero, which Orbax cannot write.
          progress: whatever else a resumed run must know, as JSON.
          metric: how good the parameters are, higher is better; None or NaN where it was not measured.

        Raises:
          UserError: this save or the one before it could not be written (a full disk), or a later step is on disk.
        """
        assert not self._read_only
        steps = self.steps()
        if step == self._current:
            return
        if steps and step <= steps[-1]:
            raise UserError(
                f"{self.directory} already holds step {steps[-1]}, so step {step} cannot be added: "
                "resume from the last step, or choose another directory"
            )
        sums, kinds = checksums(state), _kinds(state)
        metric = None if metric is None or math.isnan(metric) else float(metric)
        leaves = {name: [*kind, sums[name]] for name, kind in kinds.items()}
        header = {"step": step, "progress": progress, "metric": metric, "leaves": leaves}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), header=ocp.args.JsonSave(_sealed(header)))
        self._try_to_write(lambda: self._manager.save(step, args=args, force=True))
        self._current, self._metrics[step] = step, metric

    def restore(self, template: Tree, step: int | None = None, *, partial: bool = False) -> Restored | None:
        """The newest good checkpoint as ``(step, state, progress)``, or that of ``step``; None if there is none at all.

        A damaged checkpoint is moved to ``<directory>/bad/`` and reported by one line, and the one before it is tried.

        Args:
          template: arrays or ``ShapeDtypeStruct`` with the structure, shapes and dtypes of the state. Each array is
            placed by its template's sharding, whatever it was saved from; on the first device if that has none.
          partial: permits a ``template`` that is only a part of the state, and reads no more than that.

        Raises:
          UserError: all are damaged, ``step`` is not there or damaged, or the checkpoint does not fit ``template``.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}; there are {steps}")
        order = steps[::-1] if step is None else [step]
        return self._first_good(order, template, partial, lambda: self.restore(template, partial=partial))

    def restore_best(self, template: Tree, *, partial: bool = False) -> Restored | None:
        """As ``restore``, but of the good checkpoint with the highest metric; the newest if none has a metric."""
        steps = self.steps()
        best = self._by_metric(steps)
        if best and steps[-1] > max(best):
            self._notify(f"{self.directory}: step {best[0]} is the best of those evaluated; later ones were not")
        order = best + [step for step in reversed(steps) if step not in best]
        return self._first_good(order, template, partial, lambda: self.restore_best(template, partial=partial))

    def wait(self) -> None:
        """Waits until the last save is on disk, then deletes what need not be kept. Raises as ``save``."""
        if not self._read_only:
            self._try_to_write(self._finish)

    def close(self) -> None:
        """Waits for the last save and releases the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            _log.removeFilter(self._filter)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or jax.process_count() == 1:  # else the other processes may not be here to wait with
            self.close()

    def _open(self) -> ocp.CheckpointManager:
        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            for trash in self.directory.glob("deleted-*"):
                epath.Path(trash).rmtree()
        options = ocp.CheckpointManagerOptions(
            create=not self._read_only,
            cleanup_tmp_directories=not self._read_only,  # what a killed process left half-written
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _on_disk(self) -> list[int]:
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def _try_to_write(self, write: Callable[[], Any]) -> None:
        try:
            with _write_errors(self.directory):
                write()
        except UserError:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()  # forgets the step that failed and removes its temporary directory
            self._current = None
            raise

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        if not self._writes or self._current is None:  # until one is known to be good, the one before it may be needed
            return
        steps = self._on_disk()
        keep = {*steps[-self._keep_last :], *(self._by_metric(steps)[:1] if self._keep_best else [])}
        for step in set(steps) - keep:
            # Not left half-deleted under the name of a step, should this be killed in between.
            old = self.directory / str(step)
            if isinstance(old, _Bucket):
                (
                    old / "commit_success.txt"
                ).unlink()  # without it Orbax takes a step for unfinished; no copies are made
                old.rmtree()
            else:
                shutil.rmtree(old.rename(self.directory / f"deleted-{step}"))

    def _by_metric(self, steps: list[int]) -> list[int]:
        """Those of ``steps`` that have a metric, best first; of equals, the earliest first."""
        metrics = {step: metric for step in steps if (metric := self._metrics.get(step)) is not None}
        return sorted(metrics, key=lambda step: (-metrics[step], step))

    def _metrics_on_disk(self) -> dict[int, float | None]:
        return by_first(lambda: {step: self._metric_on_disk(step) for step in self._on_disk()})

    def _metric_on_disk(self, step: int) -> float | None:
        try:
            return self._header(step)["metric"]
        except _Damaged:
            return None  # reported when it is restored

    @_quiet_readers()
    def _first_good(
        self,
        steps: Iterable[int],
        template: Tree,
        partial: bool,
        again: Callable[[], Restored | None],
    ) -> Restored | None:
        """The first of ``steps`` that is whole; ``again`` where the run that trains beside this has deleted one, since
        it has saved another then."""
        damaged = []
        for step in steps:
            try:
                restored = self._read(step, template, partial)
            except _Damaged as error:
                if self._read_only and step not in by_first(self._on_disk):
                    self._metrics = self._metrics_on_disk()
                    return again()
                damaged.append(step)
                self._set_aside(step, error)
            else:
                self._current = step
                return restored
        if damaged:
            raise UserError(f"{self.directory}: no good checkpoint among steps {damaged}: start afresh elsewhere")
        return None

    def _read(self, step: int, template: Tree, partial: bool) -> Restored:
        header = _on_all(lambda: self._header(step), by_first)
        saved = header["leaves"]
        _check_fits(
            {name: tuple(kind) for name, (*kind, _) in saved.items()}, template, self.directory / str(step), partial
        )
        target = jax.tree.map(_target, template)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        # The leaves have been compared; a field that is None here and unknown to the code that saved is no difference.
        item = ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True)

        def read() -> Tree:
            with _read_errors():
                return self._manager.restore(step, args=ocp.args.Composite(state=item))["state"]

        state = _on_all(read, together)
        for name, checksum in checksums(state).items():
            if checksum != saved[name][-1]:
                raise _Damaged(f"{name} is not what was saved")
        return step, state, header["progress"]

    def _header(self, step: int) -> dict[str, Any]:
        with _read_errors():
            header = json.loads((self.directory / str(step) / "header" / "metadata").read_text())
            if header.pop("crc32") != _crc32(header):
                raise _Damaged("its header is not what was saved")
        if header["step"] != step:
            raise _Damaged(f"it was saved as step {header['step']}")
        return header

    def _set_aside(self, step: int, error: _Damaged) -> None:
        line = f"checkpoint {self.directory / str(step)} is damaged ({error})"
        if self._writes:
            bad = self.directory / "bad"
            bad.mkdir(exist_ok=True)
            number = sum(1 for _ in bad.glob(f"{step}-*"))
            line += f"; moved to {(self.directory / str(step)).rename(bad / f'{step}-{number}')}"
        self._metrics.pop(step, None)
        self._notify(f"{line}; trying the one before it")


def parameters(
    directory: str | Path,
    template: Tree,
    *,
    field: str = "params",
    best: bool = True,
    notify: Callable[[str], None] = print,
) -> tuple[int, Tree]:
    """The parameters alone of a run's best checkpoint (its newest if none has a metric), as ``(step, parameters)``.

    Reads nothing else of the state and changes nothing on disk, so that it is safe beside a run that is training.

    Args:
      directory: the run's checkpoints.
      template: as in ``Checkpoints.restore``.
      field: where the parameters are in the saved state.
      best: if not, those of the newest checkpoint.

    Raises:
      UserError: there is no good checkpoint, or it does not fit ``template``.
    """
    with Checkpoints(directory, read_only=True, notify=notify) as checkpoints:
        restore = checkpoints.restore_best if best else checkpoints.restore
        restored = restore({field: template}, partial=True)
    if restored is None:
        raise UserError(f"{directory} holds no checkpoint")
    return restored[0], restored[1][field]


def _on_all(read: Callable[[], Any], how: Callable[[Callable[[], Any]], Any]) -> Any:
    """Reads by `by_first` or `together`, so that what one process finds damaged all take for damaged."""

    def attempt() -> tuple[Any, str]:
        try:
            return read(), ""
        except _Damaged as error:
            return None, str(error)

    result, damage = how(attempt)
    if damage := next(filter(None, exchange(damage)), ""):
        raise _Damaged(damage)
    return result


def _kinds(tree: Tree) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each leaf by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): (list(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fits(saved: dict[str, Any], template: Tree, where: Any, partial: bool) -> None:
    """Raises ``UserError`` that names the first leaf in which checkpoint and template differ."""

    def text(kind: tuple[list[int], str] | None) -> str:
        return "not there" if kind is None else f"{kind[1]}{kind[0]}"

    wanted = _kinds(template)
    for name in wanted if partial else {**wanted, **saved}:
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{where} is of another model or optimiser: {name} is {text(saved.get(name))} in the checkpoint and "
                f"{text(wanted.get(name))} in this run: use the configuration that it was saved with"
            )


def _sealed(header: dict[str, Any]) -> dict[str, Any]:
    header = json.loads(json.dumps(header))
    return {**header, "crc32": _crc32(header)}


def _crc32(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    """Turns whatever a reader may meet in a damaged file into ``_Damaged``; not what is no fault of the file."""
    try:
        yield
    except (_Damaged, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if any(fault in str(error) for fault in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED")):
            raise
        raise _Damaged(_last_words(error)) from error


def _last_words(error: Exception) -> str:
    """One line with the cause in TensorStore's long messages: it stands before the dump of the settings."""
    text = re.split(r" \[[\w ]+=|\. See full", " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {text if len(text) <= 160 else '...' + text[-160:]}"


@contextlib.contextmanager
def _write_errors(directory: Any) -> Iterator[None]:
    """Turns errors of the operating system, also those that TensorStore reports as text, into ``UserError``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "OS error" in str(error) or "os_error_code" in str(error):
            raise UserError(
                f"cannot write a checkpoint into {directory} ({_last_words(error)}): make room or choose another "
                "directory; the checkpoints before it are untouched"
            ) from error
        raise
