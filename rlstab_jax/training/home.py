"""Where a run lives: a directory, or a bucket (``--out gs://bucket/path``).

Orbax writes checkpoints into the bucket itself. All else (manifest, metrics, samples, events, report) is appended to in
a directory of this machine, and copied into the bucket before each checkpoint is saved and at the end, so that what is
logged there is never behind the newest checkpoint. A run that goes on fetches it first, on whatever machine.

A bucket has no locks, and a machine that was taken away cannot let go of one. So whoever goes on with a run owns it
from then on, and an earlier process that is still at work stops before it writes there again.
"""

import dataclasses
import importlib.util
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from etils import epath

from rlstab_jax.types import UserError, one_line

OWNER = "owner.txt"
COPIES = Path.home() / ".cache" / "rlstab_jax" / "runs"
SCHEME = "gs://"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Home:
    """Attributes:
    path: the directory on this machine.
    bucket: what ``path`` is a copy of, or None.
    name: of the process that works on the run, as it stands in the bucket.
    """

    path: Path
    bucket: epath.Path | None = None
    name: str = dataclasses.field(
        default_factory=lambda: f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
    )

    @property
    def checkpoints(self) -> Path | epath.Path:
        return (self.bucket or self.path) / "checkpoints"

    @property
    def begun(self) -> bool:
        """Whether there is a run already."""
        return self._talk("read", (self.bucket or self.path).joinpath("manifest.json").exists)

    def fetch(self) -> None:
        """Makes the local directory what the bucket holds besides checkpoints; all that it held is gone."""
        if self.bucket is not None:
            self._talk("read", self._fetch)

    def own(self) -> None:
        """From now on the run in the bucket is this process's: others do not `store` there any more."""
        if (bucket := self.bucket) is not None:
            self._talk("written", lambda: (bucket / OWNER).write_text(self.name))

    def store(self) -> None:
        """Copies all that the local directory holds into the bucket. Raises UserError where another process owns it."""
        if self.bucket is not None:
            self._talk("written", self._store)

    def _fetch(self) -> None:
        assert self.bucket is not None
        shutil.rmtree(self.path, ignore_errors=True)
        for name, file in _files(self.bucket):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    def _store(self) -> None:
        assert self.bucket is not None
        if (owner := (self.bucket / OWNER).read_text()) != self.name:
            raise UserError(
                f"{self.bucket}: {owner} has taken over this run; this process stops, and leaves what is there as it is"
            )
        for name, file in _files(self.path):
            target = self.bucket / name
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
            target.write_bytes(file.read_bytes())

    def _talk(self, what: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            if self.bucket is None or isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.bucket} cannot be {what} ({one_line(error)}): check the bucket's name, this "
                "machine's credentials (gcloud auth application-default login) and the network"
            ) from error


def home_of(out: str) -> Home:
    """The home of a run by the value of ``--out``. Raises UserError for a bucket without what it takes to reach it."""
    if not out.startswith(SCHEME):
        if "://" in out:
            raise UserError(f"--out {out}: expected a directory, or a bucket as gs://bucket/path; no other is known")
        return Home(Path(out))
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{out}: a bucket needs pip install 'rlstab_jax[gcs]'")
    inside = out.removeprefix(SCHEME).strip("/")
    if "/" not in inside:
        raise UserError(f"{out}: expected a path in a bucket, such as gs://my-bucket/runs/first")
    # All copies lie two levels deep, so that none is inside another's, whose fetching would remove it.
    above, name = inside.rsplit("/", 1)
    return Home(COPIES / quote(above, safe="") / name, epath.Path(SCHEME + inside))


def _files(root: Path | epath.Path, prefix: str = "") -> Iterator[tuple[str, Path | epath.Path]]:
    """All files below ``root`` with their names, but checkpoints, what is being written, and runs below this one."""
    for file in sorted(root.iterdir()) if root.exists() else ():
        if file.is_dir():
            if file.name != "checkpoints" and not (file / "manifest.json").exists():
                yield from _files(file, f"{prefix}{file.name}/")
        elif not file.name.endswith(".tmp") and file.name != OWNER:
            yield prefix + file.name, file
