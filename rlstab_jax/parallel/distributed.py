"""Several processes that make one run: how they find each other, agree, and end together.

Each process drives its own devices and runs the same program, so that all of them must take every decision alike.
What they do not all know (a signal, a reward, a time, a mistake in the input) goes through `together` or `exchange`.
On a single process all of these are plain calls.
"""

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from rlstab_jax.types import UserError

T = TypeVar("T")
LOST_CONTACT = (
    "lost contact with another process ({}); what that one printed says why. The same command on all hosts goes on "
    "from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How the processes of a run find each other. On Cloud TPU, under Slurm's srun, Open MPI's mpirun and Kubernetes
    jobs nothing need be given."""

    coordinator: str = ""
    """HOST:PORT of process 0, the same on all; or the environment variable JAX_COORDINATOR_ADDRESS."""
    processes: int = 0
    """Number of processes; 0 asks the cluster, 1 stays alone whatever JAX detects."""
    process: int = -1
    """Number of this process, from 0; -1 asks the cluster."""
    timeout: int = 300
    """Seconds to wait for a process that does not come up, or that is not heard of any more, before all others end."""


def start(options: DistributedOptions, command: str = "rlstab") -> bool:
    """Joins the other processes, if there are any: by flags, or where JAX detects a cluster. Call it before JAX
    computes anything. Returns whether there are others.

    Where one of them does not come up within ``options.timeout``, this process ends with one line and exit code 2. The
    same holds until `agree_on` has returned.

    Raises:
      UserError: flags that contradict each other, an address that is none, a launcher's variable that is no number, or
        a cluster that JAX cannot make out.
    """
    asked = bool(options.coordinator or options.processes or options.process >= 0)
    _check(options)
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if options.processes == 1 or (not asked and _alone(os.environ)):
        return False
    if asked or _launched(os.environ):
        _one_last_line(command)
    _guard.watch(options, command)
    # SIGTERM is agreed on by `rlstab_jax.training.interrupt`, together with Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with warnings.catch_warnings(action="ignore"):  # that a package for detecting some cluster is not there
            jax.distributed.initialize(
                options.coordinator or None,
                options.processes or None,
                options.process if options.process >= 0 else None,
                initialization_timeout=2 * options.timeout,  # the guard is earlier, and says more
                heartbeat_timeout_seconds=options.timeout,
            )
    except Exception as error:
        _guard.rest()
        if not asked and any(words in str(error) for words in _NO_CLUSTER):
            return False
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"the processes of this run cannot be started ({words}): give all of --distributed.coordinator HOST:PORT, "
            "--distributed.processes N and --distributed.process I, or --distributed.processes 1 to stay alone"
        ) from error
    if jax.process_count() == 1:
        _guard.rest()
        return False
    _one_last_line(command)
    return True


def agree_on(facts: Mapping[str, Any]) -> None:
    """Compares what must be equal on all processes, such as config and versions. All processes call it after `start`.

    Raises:
      UserError: the first fact that differs, the same line on all processes.
    """
    if jax.process_count() == 1:
        return
    local = [sum(device.process_index == i for device in jax.devices()) for i in range(jax.process_count())]
    if len(set(local)) > 1:
        odd = next(i for i, count in enumerate(local) if count != local[0])
        raise UserError(f"process {odd} has {local[odd]} devices, but process 0 has {local[0]}: give all hosts as many")
    everywhere = exchange(dict(facts))
    _guard.rest()
    for number, there in enumerate(everywhere):
        for name in {**everywhere[0], **there}:
            if (one := everywhere[0].get(name, "absent")) != (other := there.get(name, "absent")):
                raise UserError(
                    f"the processes differ: {name} is {one!r} on process 0 and {other!r} on process {number}: "
                    "start all with one command, one config, one installation and the same files"
                )


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def exchange(value: T) -> list[T]:
    """What each process passed, in the order of the processes. All processes call it; values are pickled."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = process_allgather(np.int32(data.size))
    room = 1 << int(sizes.max() - 1).bit_length()  # few sizes, so few programs
    rows = process_allgather(np.pad(data, (0, room - data.size)))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_first(value: T) -> T:
    """What process 0 passed, on all processes: for clocks, and for sums that need not be equal to the last bit."""
    return exchange(value)[0]


def together(work: Callable[[], T]) -> T:
    """Runs ``work`` on each process and returns its result there.

    Raises:
      UserError: it failed on some process with a mistake of the user's or an `OSError`; one line on all of them.
    """
    if jax.process_count() == 1:
        return work()
    mistake = None
    try:
        result = work()
    except (UserError, OSError) as error:
        mistake = str(error)
    mistakes = exchange(mistake)
    if mistake is not None and set(mistakes) == {mistake}:
        raise UserError(mistake)
    for number, words in enumerate(mistakes):
        if words is not None:
            raise UserError(f"on process {number}: {words}")
    return result


def by_first(work: Callable[[], T]) -> T:
    """Runs ``work`` on process 0 alone and returns its result on all. Raises as `together`."""
    return of_first(together(work if first() else lambda: None))  # type: ignore[return-value]


def share(count: int) -> slice:
    """This process's share of so many things: contiguous, in the order of the processes, sizes equal to 1."""
    index, processes = jax.process_index(), jax.process_count()
    return slice(count * index // processes, count * (index + 1) // processes)


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` for arrays that all processes hold whole (NumPy, or on their own devices), or all of them
    together (global arrays). Nothing travels between processes for the former."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def on_host(tree: Any) -> Any:
    """Each array of ``tree`` whole, as NumPy, on every process. All processes call it."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


# What the collectives of the backends say when the other end is gone.
_LOST = ("Gloo", "NCCL", "nccl", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "ABORTED", "arrier")


@contextlib.contextmanager
def ending_together(command: str) -> Iterator[None]:
    """Of several processes, ends this one where the block fails, so that none waits for it in vain.

    A lost connection becomes one line, with exit code 1.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or isinstance(error, SystemExit | UserError | OSError):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in _LOST):
            words = " ".join(str(error).split())[:160]
            # In one piece: JAX may end this process at any moment, between a line and its end too.
            sys.stderr.write(f"{command}: {LOST_CONTACT.format(words)}\n")
        elif not isinstance(error, KeyboardInterrupt):
            sys.excepthook(type(error), error, error.__traceback__)
        leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def failed(code: int) -> int:
    """The exit code of a failure whose line has been printed; one of several processes ends here."""
    return leave(code) if jax.distributed.is_initialized() else code


def leave(code: int) -> NoReturn:
    """Ends one of several processes after a failure: with the others if they fail too, else without them."""
    sys.stdout.flush()
    sys.stderr.flush()
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(_FAREWELL)
    os._exit(code)


_FAREWELL = 5.0  # seconds; a process 0 that goes first takes the others down before they have printed their own line


# What JAX says where it detects no cluster, and in a session that has computed something already, such as a notebook.
_NO_CLUSTER = ("coordinator_address should be defined", "must be called before any JAX calls")


class _Guard:
    """Ends the process with one line if it is not told to rest in time: no thread of JAX's start can be interrupted."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def watch(self, options: DistributedOptions, command: str) -> None:
        self._timer = threading.Timer(options.timeout, self._end, (options, command))
        self._timer.daemon = True
        self._timer.start()

    def rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, options: DistributedOptions, command: str) -> None:
        of = f" of {options.processes}" if options.processes else ""
        address = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or "that the cluster names"
        print(
            f"{command}: not all{of} processes came up within {options.timeout} s: see what the others printed, and "
            f"whether all hosts reach the coordinator {address}; --distributed.timeout waits longer",
            file=sys.stderr,
        )
        os._exit(2)


_guard = _Guard()
_stderr_is_watched = False


def _one_last_line(command: str) -> None:
    """Puts ``last_words.py`` between standard error and the terminal, once."""
    global _stderr_is_watched
    if _stderr_is_watched:
        return
    _stderr_is_watched = True
    script = Path(__file__).with_name("last_words.py")
    reader = subprocess.Popen([sys.executable, "-S", "-E", str(script), command, LOST_CONTACT], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()


def _check(options: DistributedOptions) -> None:
    host, _, port = options.coordinator.rpartition(":")
    if options.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--distributed.coordinator {options.coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
    if options.processes < 0 or options.timeout < 1:
        raise UserError(
            f"--distributed.processes {options.processes}, --distributed.timeout {options.timeout}: expected at least "
            "1 process (0 asks the cluster), and at least 1 second"
        )
    if options.process >= 0 and options.processes and options.process >= options.processes:
        raise UserError(
            f"--distributed.process {options.process} of --distributed.processes {options.processes}: processes are "
            f"numbered from 0 to {options.processes - 1}"
        )


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether a launcher says that there is one process. JAX would wait for a name service, or take one GPU of many.

    Raises UserError for a launcher's number that is none.
    """
    sizes = [_number(environment, name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if name in environment]
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = "MEGASCALE_NUM_SLICES"
    if hosts is not None and (not environment.get(slices) or _number(environment, slices) == 1):
        sizes.append(hosts.count(",") + 1)
    return bool(sizes) and max(sizes) == 1


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"environment variable {name} = {environment[name]!r}: expected a whole number, at least 1: set it as the "
            "launcher does, or unset it, or give --distributed.processes 1 to stay alone"
        )
    return int(text)


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables say that there are several processes."""
    return any(
        name in environment for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")
    )
