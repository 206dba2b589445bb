"""A user's own code in a config: a run does not go on with another recipe, verifier or task of the same name."""

import dataclasses
import functools
import inspect
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np

# Values whose text is all that there is to them.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(config: Any) -> dict[str, str]:
    """A checksum of the source of each function in a config, and of each class of its parts, that is a user's own:
    `plain` knows names and fields alone. What it mentions of the user's functions, classes and data is in it.

    What a function finds while it runs (by ``getattr`` with a computed name, or by an import of its own that has not
    been made) is not.
    """
    found: dict[str, str] = {}
    for code in _parts(config):
        source = _Source()
        source.add("", code)
        if not source.lines:
            continue
        checksum, name = f"{zlib.crc32(b''.join(source.lines)):08x}", f"the code of {_name(code)}"
        same_name = [name, *(f"{name} ({number})" for number in range(2, len(found) + 2))]
        if checksum not in [found.get(name) for name in same_name]:
            found[next(name for name in same_name if name not in found)] = checksum
    return found


def _parts(config: Any) -> Iterator[FunctionType | type]:
    """The functions in a config, and the classes of its parts."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        yield from _parts([getattr(config, field.name) for field in dataclasses.fields(config)])
        yield type(config)
    elif isinstance(config, functools.partial):
        yield from _parts([config.func, config.args, config.keywords])
    elif isinstance(config, Mapping):
        yield from _parts(list(config.values()))
    elif isinstance(config, list | tuple):
        for item in config:
            yield from _parts(item)
    elif isinstance(config, FunctionType):
        yield config


class _Source:
    """All that a value depends on, as far as it is a user's own: ``lines`` of names and sources, or texts of data."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._seen: dict[int, Any] = {}  # objects by id, which they keep while they are here

    def add(self, name: str, value: Any) -> None:
        """``name`` is how the value is mentioned."""
        if isinstance(value, _PLAIN):
            self._line(name, repr(value))
        elif isinstance(value, np.ndarray | np.generic | jax.Array):
            self._line(name, _array(value))
        elif isinstance(value, FunctionType | type):
            if _is_own(value):
                self._line(name, _name(value))  # which of several it is
                self._once(value, self._function if isinstance(value, FunctionType) else self._class)
        elif not isinstance(value, ModuleType):
            self._once(value, functools.partial(self._object, name))
        if callable(value) and (wrapped := getattr(value, "__wrapped__", None)) is not None:
            self.add(name, wrapped)

    def _line(self, name: str, text: str) -> None:
        self.lines.append(f"{name}: {text}\n".encode())

    def _once(self, value: Any, add: Any) -> None:
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            add(value)

    def _object(self, name: str, value: Any) -> None:
        if isinstance(value, dict):  # not any mapping: os.environ is one
            self._all(name, value.items())
        elif isinstance(value, set | frozenset):
            self._all(name, enumerate(sorted(value, key=repr)))
        elif isinstance(value, list | tuple):
            self._all(name, enumerate(value))
        elif isinstance(value, functools.partial):
            self._all(name, {"func": value.func, "args": value.args, "keywords": value.keywords}.items())
        elif isinstance(value, MethodType):
            self._all(name, {"func": value.__func__, "self": value.__self__}.items())
        elif isinstance(value, property):
            self.add(name, value.fget)
        elif isinstance(value, staticmethod | classmethod):
            self.add(name, value.__func__)
        elif isinstance(value, functools.cached_property):
            self.add(name, value.func)
        elif dataclasses.is_dataclass(value):
            self.add(name, type(value))
            self._all(name, [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)])
        elif _is_own(type(value)) or isinstance(value, SimpleNamespace):
            self.add(name, type(value))
            self._all(name, getattr(value, "__dict__", {}).items())

    def _all(self, name: str, items: Any) -> None:
        for key, item in items:
            self.add(f"{name}.{key!r}" if isinstance(key, _PLAIN) else name, item)

    def _function(self, function: FunctionType) -> None:
        try:
            self._line(_name(function), inspect.getsource(function.__code__))  # of the code, not of what it wraps
        except (OSError, TypeError):  # it was typed into an interpreter, or made by a program
            self._line(_name(function), _compiled(function.__code__))
        self.add("defaults", [function.__defaults__, function.__kwdefaults__])
        for name, mentioned in sorted(_mentioned(function).items()):
            self.add(name, mentioned)

    def _class(self, cls: type) -> None:
        try:
            self._line(_name(cls), inspect.getsource(cls))
        except (OSError, TypeError):
            self._line(_name(cls), "")
        for name, member in vars(cls).items():
            if not name.startswith("__") or isinstance(member, FunctionType | staticmethod | classmethod):
                self.add(name, member)
        for base in cls.__bases__:
            self.add("base", base)


def _compiled(code: CodeType) -> str:
    """What a function without a source does: its instructions, and the constants and names that they speak of."""

    def constant(value: Any) -> str:
        if isinstance(value, frozenset):  # whose order is another one in each process
            return repr(sorted(map(repr, value)))
        return _compiled(value) if isinstance(value, CodeType) else repr(value)

    return f"{code.co_code.hex()} {[constant(one) for one in code.co_consts]} {code.co_names}"


def _array(value: Any) -> str:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return f"{value.dtype}{value.shape}"
    value = np.asarray(jax.random.key_data(value) if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else value)
    content = repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes()
    return f"{value.dtype}{value.shape} {zlib.crc32(content):08x}"


def _mentioned(function: FunctionType) -> dict[str, Any]:
    """What a function may read, by name: globals, what lies in a user's own modules among these or among what it
    imports, what it encloses."""
    names = {name for name in _names(function.__code__) if not name.startswith("__")}
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    modules = [*known.values(), *(sys.modules.get(name) for name in names)]
    for module in modules:
        if isinstance(module, ModuleType) and _is_own_module(module):
            known |= {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
    enclosed = [_content(cell) for cell in function.__closure__ or ()]
    return known | dict(zip(function.__code__.co_freevars, enclosed, strict=True))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> set[str]:
    """The global names that a function mentions, and those within it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _is_own(code: FunctionType | type) -> bool:
    return _is_own_module(sys.modules.get(code.__module__ or ""), code.__module__ or "")


def _is_own_module(module: ModuleType | None, name: str = "") -> bool:
    """Whether it is neither this package, nor Python's, nor an installed package."""
    root = (name or (module.__name__ if module else "")).partition(".")[0]
    file = getattr(module, "__file__", None) or ""
    return root not in (__package__, *(sys.stdlib_module_names - {"__main__"})) and "-packages" not in file


def place(error: BaseException) -> str:
    """Where a user's own code was at last when it failed, for a message: " (file.py, line 3)", or "" if it was not
    there at all."""
    here = {Path(__file__).parent, Path(sysconfig.get_paths()["stdlib"])}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not here & {*Path(frame.filename).parents}]
    own = [frame for frame in own if "-packages" not in frame.filename and not frame.filename.startswith("<frozen")]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _name(code: FunctionType | type) -> str:
    return f"{code.__module__}.{code.__qualname__}"
