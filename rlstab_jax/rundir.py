"""What a run leaves on disk.

A run directory holds ``manifest.json``, ``metrics.jsonl`` (one object a global step), ``samples.jsonl``, TensorBoard
events with the same names, ``checkpoints/`` and ``report.png`` (and ``report.html``, once it is asked for). Lines are
appended whole; all else is written aside and renamed. So a run can be killed at any moment: what is torn then is the
last line, which readers skip and the next opening removes.
"""

import contextlib
import dataclasses
import enum
import errno
import functools
import json
import math
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from rlstab_jax.metrics import STEP, describe
from rlstab_jax.types import UserError

# Fields of a config that may differ when a run goes on, and between runs that a report takes together: how long it is,
# what it costs and shows, never what it computes but for the order of sums.
MAY_CHANGE = (
    "gradient_steps", "checkpoint_every", "keep_checkpoints", "logged_samples", "task.max_verifier_failures",
    "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor", "rollout.waves", "kernels.expert_chunk",
    "learner.micro_batches", "learner.score_micro_batches", "learner.logits_per_chunk", "learner.remat",
    "learner.unroll", "learner.offload_optimizer", "learner.live_gap",
)  # fmt: skip


def plain(value: Any, nonfinite: Callable[[float], Any] = str) -> Any:
    """``value`` as JSON knows it: dataclasses become dicts, enums their values, tuples lists, arrays numbers or lists,
    functions their names.

    Args:
      nonfinite: what becomes of NaN and infinities, which strict JSON does not have; by default "nan", "inf", "-inf".

    Raises:
      TypeError: something that has no plain form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), nonfinite) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return plain(value.value, nonfinite)
    if isinstance(value, Mapping):
        return {str(key): plain(item, nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, nonfinite) for item in (value if isinstance(value, list | tuple) else sorted(value))]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else nonfinite(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), nonfinite)
    if isinstance(value, FunctionType):  # a recipe of one's own in a config
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return plain({"function": value.func, "arguments": value.args, **value.keywords}, nonfinite)
    raise TypeError(f"{value!r} of type {type(value).__name__} has no plain form for JSON")


def config_difference(
    first: Mapping[str, Any], second: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """The fields in which two nested configs differ: (dotted name, first value, second value), "absent" where missing.

    What the first one does not have has the value in ``defaults`` there, by dotted names: a run's config was written by
    a version that did not know the field.

    >>> config_difference({"n": 4, "learner": {"rate": 0.1}}, {"n": 4, "learner": {"rate": 0.2}})
    [('learner.rate', 0.1, 0.2)]
    """
    one, other = dict(leaves(plain(first))), dict(leaves(plain(second)))
    names = [*one, *(name for name in other if name not in one)]
    one = {**{name: value for name, value in (defaults or {}).items() if name in other}, **one}
    pairs = ((name, one.get(name, "absent"), other.get(name, "absent")) for name in names)
    return [(name, a, b) for name, a, b in pairs if a != b]


def open_run(
    path: str | os.PathLike,
    manifest: Mapping[str, Any],
    fresh: bool = False,
    may_change: Collection[str] = (),
    say: Callable[[str], None] = print,
    defaults: Mapping[str, Any] | None = None,
    accept_code: bool | None = None,
) -> "RunDir":
    """Opens the run in ``path`` to go on with it, or begins one there.

    Args:
      manifest: ``config`` and whatever else describes the run (versions, devices, kernels, seed); see `plain`. ``code``
        is compared as the config is, if a run that is there has it.
      fresh: begin anew. What is there is not lost: it is renamed to ``<path>.old-1`` (the next free number).
      may_change: dotted names of config fields that may differ when a run goes on, e.g. how many steps to take.
      say: where a message for the user goes.
      defaults: of config fields, see `config_difference`.
      accept_code: go on though ``code`` is another one than the run's; the manifest keeps both, the former in
        ``earlier_code``. None where the user is given no such choice.

    Raises:
      UserError: the directory holds a run of another config, or something that is no run.
    """
    path = Path(path)
    if fresh and path.exists():
        say(f"{path} is kept as {set_aside(path)}")
    manifest, file = plain(manifest), path / "manifest.json"
    if file.exists():
        before = read_manifest(path)
        if "config" not in before:
            raise UserError(f"{file} is not that of a run: give another --out, or --fresh to move {path} aside")
        if begun(path):
            code = manifest.get("code", {})
            earlier = before.get("code", code)  # a run of before it was kept is not asked for it
            if accept_code and earlier != code:
                say(f"{path} goes on with code of your own that has changed; its manifest keeps both checksums")
                before, earlier = {**before, "earlier_code": [*before.get("earlier_code", []), earlier]}, code
            there = {**before.get("config", {}), **earlier}
            _same_config(
                path, config_difference(there, {**manifest["config"], **code}, defaults), may_change, accept_code
            )
            manifest = {**before, **{name: manifest[name] for name in ("config", "code") if name in manifest}}
    elif path.exists() and (not path.is_dir() or any((path / name).exists() for name in _OF_A_RUN)):
        raise UserError(f"{path} is there but holds no manifest.json: give another --out, or --fresh to move it aside")
    with _disk(path):
        path.mkdir(parents=True, exist_ok=True)
    write_aside(file, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    return RunDir(path)


# What would be written over, or taken for the run's.
_OF_A_RUN = ("metrics.jsonl", "samples.jsonl", "responses.jsonl", "report.png", "eval.json", "checkpoints")


def begun(path: Path) -> bool:
    """Whether a directory holds anything of a run but its manifest: one that failed before its first step does not."""
    return any((path / name).exists() for name in ("metrics.jsonl", "responses.jsonl")) or any(
        path.glob("checkpoints/*")
    )


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that is named by itself or by the ``checkpoints`` in it."""
    return checkpoint.parent if checkpoint.name == "checkpoints" else checkpoint


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the run directory ``path``. Raises UserError where there is none or it cannot be read."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        parts = ("config", "code")
        if not isinstance(manifest, dict) or not all(isinstance(manifest.get(part, {}), dict) for part in parts):
            raise ValueError("expected a JSON object, and objects as its config and code")
        return manifest
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its manifest.json cannot be read ({error}); is it the directory of a run?") from error


def read_metrics(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The metrics of a run (its directory, or the file itself) as float64 columns [global_step], NaN where absent.

    A torn last line is left out. Raises UserError for a missing file, for a torn line in the middle, and for what
    is no number.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: give the directory of a run")
    rows = [row for _, row in _complete_lines(path)]
    names = sorted({name for row in rows for name in row})
    try:
        return {name: np.array([row.get(name) for row in rows], np.float64) for name in names}
    except (TypeError, ValueError) as error:
        each = ((number, *item) for number, row in enumerate(rows, start=1) for item in row.items())
        number, name, value = next(one for one in each if not isinstance(one[2], int | float | None))
        raise UserError(f"{path}, line {number}: {name} is {value!r}, expected a number: mend or remove it") from error


def read_samples(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What a run's samples.jsonl holds, in its order; empty where there is none. A torn last line is left out.

    Each object has ``global_step``, ``prompt``, ``answer``, ``response`` and ``reward``, and ``failure`` where a
    verdict failed. Raises UserError for a torn line in the middle.
    """
    return [row for _, row in _complete_lines(Path(path) / "samples.jsonl")]


class RunDir:
    """The writer of a run directory that exists. One process writes it; no file stays open between two calls.

    Methods raise UserError when the disk is full; what was on disk before stays good.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.report_path = self.path / "report.png"
        self._last_step, self._events = self._cut(math.inf)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds one global step: a line of metrics.jsonl with sorted names (NaN and infinity as null), and an event.

        Raises ValueError for a name that METRICS does not define, and for a step that is not after the last one.
        """
        for name in metrics:
            describe(name)
        row = {name: np.asarray(metrics[name]).item() for name in sorted(metrics)}
        if not row[STEP] > self._last_step:
            raise ValueError(f"global step {row[STEP]} after {self._last_step}: call truncate_after on resuming")
        append(self.metrics_path, json_line(row))
        if not self._events.exists():
            append(self._events, _event(file_version="brain.Event:2"))
        append(self._events, _event(step=row[STEP], values=row))
        self._last_step = row[STEP]

    def append_samples(self, global_step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds responses to samples.jsonl, one object each, with their ``global_step``."""
        lines = [json_line({"global_step": global_step, **sample}) for sample in samples]
        append(self.samples_path, b"".join(lines))

    @property
    def last_step(self) -> float:
        """The last global step that is logged; -inf for none."""
        return self._last_step

    def keep_copy(self) -> Path:
        """Copies all but checkpoints to the next free ``<path>.old-<number>``."""
        target = _free(self.path)
        with _disk(target):
            shutil.copytree(self.path, target, ignore=shutil.ignore_patterns("checkpoints"))
        return target

    def truncate_after(self, global_step: int) -> None:
        """Cuts all that comes after ``global_step`` (the restored one) from the metrics, the samples and the events."""
        self._last_step, self._events = self._cut(global_step)

    def _cut(self, last: float) -> tuple[float, Path]:
        """Cuts, and returns the last step that is left and the event file to go on with."""
        rows = cut_lines(self.metrics_path, STEP, last)
        cut_lines(self.samples_path, "global_step", last)
        events = sorted(self.path.glob("events.out.tfevents.*"))
        for file in events:
            _cut_events(file, last)
        # A new file each time: a TensorBoard that is watching never comes back to one that was replaced. It reads
        # them in the order of their names, so time comes first; the count tells apart those of one second.
        name = f"events.out.tfevents.{int(time.time())}.{len(events):04d}.{socket.gethostname()}"
        return rows[-1][STEP] if rows else -math.inf, self.path / name


class Bystander(RunDir):
    """The run directory as processes hold it that do not write it: the same paths, and nothing is read or written."""

    def _cut(self, last: float) -> tuple[float, Path]:
        return last, self.path

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        pass

    def append_samples(self, global_step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        pass


def _same_config(
    path: Path, differences: Iterable[tuple[str, Any, Any]], may_change: Collection[str], accept_code: bool | None
) -> None:
    differences = [item for item in differences if item[0] not in may_change]
    if differences:
        choice = accept_code is not None and differences[0][0].startswith("the code of ")
        mended = "; --accept-code goes on if you have mended it" if choice else ""
        shown = ", ".join(f"{name} is {a!r} there and {b!r} here" for name, a, b in differences[:3])
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise UserError(
            f"{path} holds a run of another config: {shown}{more}. Give another --out, or --fresh to begin anew "
            f"(the old run is moved aside){mended}"
        )


def set_aside(path: Path) -> Path:
    """Renames ``path`` to the next free ``<path>.old-<number>``, and returns that."""
    return path.rename(_free(path))


def _free(path: Path) -> Path:
    """The next free name for what was in ``path``."""
    path, number = path.absolute(), 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return target


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested dicts with their dotted names.

    >>> list(leaves({"n": 4, "learner": {"rate": 0.1}}))
    [('n', 4), ('learner.rate', 0.1)]
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON with sorted names; floats by `repr`, so that equal runs leave equal bytes."""
    return (json.dumps(plain(row, nonfinite=lambda _: None), sort_keys=True, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{path}: the disk is full; free some space and give the same command again to resume"
        ) from error


def append(path: Path, data: bytes) -> None:
    """One write a call, complete in the kernel when it returns: a killed process tears at most the last record."""
    with _disk(path), open(path, "ab") as file:
        file.write(data)


def write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    with _disk(path), open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a JSON-lines file with what they say, without a torn last one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                return
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            yield line, row
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number} is no JSON object: mend or remove it") from error


def cut_lines(path: Path, key: str, last: float) -> list[dict[str, Any]]:
    """Leaves the complete lines whose ``key`` is at most ``last``, and returns what they say."""
    kept = []
    for number, (line, row) in enumerate(_complete_lines(path), start=1):
        if not isinstance(row.get(key), int | float):
            raise UserError(f"{path}, line {number}: {key} is {row.get(key)!r}, expected a number: mend or remove it")
        if row[key] <= last:
            kept.append((line, row))
    if path.exists() and path.stat().st_size != sum(len(line) for line, _ in kept):
        write_aside(path, b"".join(line for line, _ in kept))
    return [row for _, row in kept]


def _event(values: Mapping[str, float] | None = None, **fields: Any) -> bytes:
    """A TensorBoard event in its record frame: length, checksum of it, event, checksum of that."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c

    event = Event(wall_time=time.time(), **fields)
    if values is not None:
        event.summary.CopyFrom(Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]))
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])


def _cut_events(path: Path, last: float) -> None:
    """Leaves the complete records of an event file whose step is at most ``last``."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, kept, start = path.read_bytes(), [], 0
    while start + 12 <= len(data):
        if struct.unpack_from("<I", data, start + 8)[0] != masked_crc32c(data[start : start + 8]):
            break
        end = start + 12 + struct.unpack_from("<Q", data, start)[0] + 4
        if end > len(data):
            break
        if Event.FromString(data[start + 12 : end - 4]).step <= last:
            kept.append(data[start:end])
        start = end
    if sum(map(len, kept)) != len(data):
        write_aside(path, b"".join(kept))
