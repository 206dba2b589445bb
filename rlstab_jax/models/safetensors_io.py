"""Safetensors files, read and written tensor by tensor: no file is ever mapped or held as a whole.

A file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype, shape and the
range of its bytes), and the bytes. A checkpoint of several files has an index, JSON as well: which tensor is where.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from rlstab_jax.models.hf_config import read_json
from rlstab_jax.types import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor at rest: contiguous bytes of a file, row-major."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file at which it begins

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, parts: int) -> list["Tensor"]:
        """``parts`` equal parts along the first dimension. Raises ValueError where they do not fit."""
        if not self.shape or self.shape[0] % parts:
            raise ValueError(f"{self.shape} does not split into {parts}")
        shape = (self.shape[0] // parts, *self.shape[1:])
        step = self.size // parts
        return [dataclasses.replace(self, shape=shape, start=self.start + i * step) for i in range(parts)]

    def unstack(self) -> list["Tensor"]:
        """The entries along the first dimension, without it."""
        return [dataclasses.replace(part, shape=part.shape[1:]) for part in self.split(self.shape[0])]

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows ``first`` to ``last`` of the first dimension, all by default. Raises UserError where bytes are missing.

        A scalar has no rows: it is read whole.
        """
        rows = self.shape[0] if self.shape else 1
        last = rows if last is None else last
        step = self.size // max(rows, 1)
        values = np.empty(((last - first) * step,), np.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start + first * step)
            if file.readinto(values.data) != values.size:
                raise UserError(f"{self.file}: the file ends within {self.name}: it is truncated, fetch it again")
        return values.view(self.dtype).reshape((last - first, *self.shape[1:]) if self.shape else ())


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of all files of its index, or of its single file.

    Raises:
      UserError: no safetensors there, a file that is missing, truncated or malformed, a tensor that is in no file, in
        another one than the index says, or of a dtype that is no float of 16 or 32 bits. It names file and tensor.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            raise UserError(f"{directory}: neither {SINGLE} nor {INDEX} is there: give a checkpoint in safetensors")
        return read_header(directory / SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: expected the names of files by tensor under weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        file = directory / name
        if Path(name).name != name or not file.exists():
            raise UserError(f"{file}, named in {INDEX}, is not there: fetch the checkpoint again")
        found = read_header(file)
        listed = {tensor for tensor, where in weight_map.items() if where == name}
        for tensor in sorted(listed ^ found.keys()):
            problem = "is not in it, but in the index" if tensor in listed else "is in it, but not so in the index"
            raise UserError(f"{file}: tensor {tensor} {problem}: fetch the checkpoint again")
        tensors |= found
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError, as `read_checkpoint`, without reading more than the header."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{file} is no safetensors file, or truncated in its header: fetch it again")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is no JSON ({error}): fetch it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: its header is no JSON object: fetch it again")
    header.pop("__metadata__", None)
    return {name: _tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(file: Path, name: str, entry: object, base: int, size: int) -> Tensor:
    try:
        dtype, shape, (first, last) = (entry[key] for key in ("dtype", "shape", "data_offsets"))  # type: ignore[index]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, first, last)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{file}: tensor {name} has a malformed entry in the header: {entry!r}") from None
    if dtype not in DTYPES:
        raise UserError(f"{file}: tensor {name} has the dtype {dtype}, expected one of {', '.join(DTYPES)}")
    tensor = Tensor(file, name, DTYPES[dtype], tuple(shape), base + first)
    if tensor.size != last - first:
        raise UserError(f"{file}: tensor {name} of {dtype}{shape} has {last - first} bytes, expected {tensor.size}")
    if base + last > size:
        raise UserError(
            f"{file}: tensor {name} ends at byte {base + last}, but the file at {size}: it is truncated, fetch it again"
        )
    return tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor to write: ``fetch()`` gives its values, once, when its turn has come."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(directory: Path, sources: Sequence[Source], shard_bytes: int) -> list[Path]:
    """Writes a checkpoint: one file, or several of at most ``shard_bytes`` (or one tensor) each and their index.

    Values are cast to each source's dtype. One tensor at a time is in memory. Returns the files.
    """
    shards = list(_shards(sources, shard_bytes))
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            _write_file(file, shard)
    if count > 1:
        weight_map = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
        index = {"metadata": {"total_size": sum(source.size for source in sources)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        names.append(INDEX)
    return [directory / name for name in names]


def _shards(sources: Sequence[Source], shard_bytes: int) -> Iterator[list[Source]]:
    shard: list[Source] = []
    for source in sources:
        if shard and sum(s.size for s in shard) + source.size > shard_bytes:
            yield shard
            shard = []
        shard.append(source)
    yield shard


def _write_file(file: BinaryIO, sources: Sequence[Source]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        offsets = [end, end := end + source.size]
        header[source.name] = {"dtype": NAMES[source.dtype], "shape": list(source.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for source in sources:
        values = np.ascontiguousarray(source.fetch(), dtype=source.dtype)
        if values.shape != source.shape:
            raise ValueError(f"{source.name} has shape {values.shape}, expected {source.shape}")
        file.write(values.reshape(-1).view(np.uint8).data)
