"""Records of data sets: read from JSON lines, Parquet or ArrayRecord, in the layouts that data sets are published in.

A record becomes a `Question`. What is wrong with one raises a `UserError` that names the file, the line and the field.
"""

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rlstab_jax.tasks.extract import after_hashes, last_boxed
from rlstab_jax.types import UserError

Layout = Literal["plain", "gsm8k", "math", "dapo", "aime"]
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """What one record says.

    Attributes:
      asked: the question as text, or as the messages of a conversation whose last one is the user's.
      answer: the reference answer.
      demonstration: how to answer in full, or "" where the record does not show it.
      where: file and line, for messages to the user.
    """

    asked: str | tuple[Message, ...]
    answer: str
    demonstration: str
    where: str


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields of a ``plain`` record; in the other layouts they are given."""

    prompt: str = "prompt"
    """Question: text, or messages with role and content. Where it is missing, ``messages`` is read."""
    answer: str = "answer"
    """Reference answer: text, or a number, which is taken as JSON writes it (72, 0.5)."""
    demonstration: str = ""
    """A full answer, for a cold start; empty for none."""


def read_questions(path: str | Path, layout: Layout, fields: Fields = Fields()) -> Iterator[Question]:
    """The questions of a file, in its order.

    Args:
      path: ``.jsonl`` (a JSON object a line; empty lines are passed over), ``.parquet``, or ``.array_record`` of JSON
        objects.
      layout: ``plain`` by ``fields``; ``gsm8k`` question, answer (its last line ``#### 72``); ``math`` problem,
        solution (the answer is in its last \\boxed, unless there is a field answer); ``dapo`` prompt (messages),
        reward_model.ground_truth; ``aime`` problem, answer (an integer 0 to 999), also with capitals.

    Raises:
      UserError: no such file, another kind of file, a malformed record, a missing field, a value of the wrong kind.
    """
    for where, record in read_records(path):
        try:
            yield _LAYOUTS[layout](_Record(where, record), fields)
        except _Missing as error:
            there = ", ".join(record) or "none"
            raise UserError(
                f"{where}: no field {error.args[0]!r}, which layout {layout!r} reads; its fields are: {there}. "
                "Choose another layout, or name the fields"
            ) from None


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place, ``<file>, line <number>`` (``row`` or ``record`` in binary files, from 1)."""
    path = Path(path)
    readers = {".jsonl": _json_lines, ".parquet": _parquet, ".array_record": _array_record}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a file that ends in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    yield from readers[path.suffix](path)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield (where := f"{path}, line {number}"), _json_object(where, line)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _require("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError(f"{path}: no Parquet file, or a damaged one: {error}") from error


def _array_record(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _require("array_record", path)
    import grain

    try:
        source = grain.sources.ArrayRecordDataSource([str(path)])
        count = len(source)
    except Exception as error:
        raise UserError(f"{path}: no ArrayRecord file, or a damaged one: {error}") from error
    for number in range(count):
        where = f"{path}, record {number + 1}"
        yield where, _json_object(where, source[number])


def _require(package: str, path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{path}: reading it needs {package}: pip install 'rlstab_jax[data]'")


def _json_object(where: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise UserError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


class _Missing(Exception):
    """A record lacks the field of that name."""


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record that knows its place."""

    where: str
    values: dict[str, Any]

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of these fields that is there, with its name; ``a.b`` is field b of the object a."""
        for name in names:
            value: Any = self.values
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return name, value
        raise _Missing(names[0])

    def text(self, *names: str) -> str:
        """A text that is not empty."""
        name, value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: field {name!r} is {_shown(value)}, expected a text that is not empty")
        return value

    def answer(self, *names: str) -> str:
        """A text that is not empty, or a number, which becomes the text that JSON writes for it."""
        name, value = self.get(*names)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (isinstance(value, int) or math.isfinite(value)):  # an int may be too large for a float
            return json.dumps(value)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: answer {name!r} is {_shown(value)}, expected a text or a number")
        return value.strip()

    def asked(self, *names: str) -> str | tuple[Message, ...]:
        """A question: text or messages."""
        name, value = self.get(*names)
        if not isinstance(value, list):
            return self.text(name)
        for message in value:
            good = isinstance(message, dict) and all(isinstance(message.get(x), str) for x in ("role", "content"))
            if not good:
                raise UserError(
                    f"{self.where}: field {name!r} holds {_shown(message)}, expected messages with role and content"
                )
        if not value or value[-1]["role"] != "user":
            raise UserError(f"{self.where}: field {name!r}: expected messages of which the last one is the user's")
        return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:40] + '...'} ({type(value).__name__})"


def _plain(record: _Record, fields: Fields) -> Question:
    demonstration = record.text(fields.demonstration) if fields.demonstration else ""
    return Question(record.asked(fields.prompt, "messages"), record.answer(fields.answer), demonstration, record.where)


def _gsm8k(record: _Record, fields: Fields) -> Question:
    asked, solution = record.text("question"), record.text("answer")
    answer = after_hashes(solution)
    if answer is None:
        raise UserError(f"{record.where}: field 'answer' has no line '#### <number>', which layout 'gsm8k' ends with")
    return Question(asked, answer.replace(",", ""), solution, record.where)


def _math(record: _Record, fields: Fields) -> Question:
    asked, solution = record.text("problem"), record.text("solution")
    if record.values.get("answer") is not None:
        return Question(asked, record.answer("answer"), solution, record.where)
    answer = last_boxed(solution)
    if not answer:
        raise UserError(f"{record.where}: field 'solution' has no \\boxed{{...}}, which layout 'math' reads")
    return Question(asked, answer, solution, record.where)


def _dapo(record: _Record, fields: Fields) -> Question:
    return Question(record.asked("prompt"), record.answer("reward_model.ground_truth"), "", record.where)


def _aime(record: _Record, fields: Fields) -> Question:
    asked, answer = record.text("problem", "Problem"), record.answer("answer", "Answer")
    if not re.fullmatch(r"\d{1,3}", answer):
        raise UserError(f"{record.where}: answer {answer!r}, expected an integer from 0 to 999 in layout 'aime'")
    solution = record.values.get("solution") or record.values.get("Solution") or ""
    return Question(asked, str(int(answer)), str(solution), record.where)


_LAYOUTS = {"plain": _plain, "gsm8k": _gsm8k, "math": _math, "dapo": _dapo, "aime": _aime}
