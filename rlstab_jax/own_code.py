"""A user's own code in a config: a run does not go on with another recipe, verifier or task of the same name."""

import dataclasses
import functools
import inspect
import sys
import zlib
from collections.abc import Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

# Values whose text is all that there is to them.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def code_of(config: Any) -> dict[str, str]:
    """A checksum of the source of each function in a config, and of each class of its parts, that is a user's own:
    `plain` knows names and fields alone. The user's functions and classes that it mentions are in it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = code_of([getattr(config, f.name) for f in dataclasses.fields(config)])
        return fields | _checksum(type(config))
    if isinstance(config, functools.partial):
        return code_of([config.func, *config.args, *config.keywords.values()])
    if isinstance(config, Mapping):
        return code_of(list(config.values()))
    if isinstance(config, list | tuple):
        return {name: code for item in config for name, code in code_of(item).items()}
    return _checksum(config) if isinstance(config, FunctionType) else {}


def _checksum(code: FunctionType | type) -> dict[str, str]:
    sources: dict[str, bytes] = {}
    _gather(code, sources)
    joined = b"".join(source for _, source in sorted(sources.items()))
    return {f"the code of {_name(code)}": f"{zlib.crc32(joined):08x}"} if sources else {}


def _gather(code: Any, sources: dict[str, bytes]) -> None:
    """The sources of a function or class and of those that it mentions, as far as they are a user's own."""
    if isinstance(code, functools.partial):
        _gather_value(f"what {_name(code.func)} is given", [code.args, code.keywords], sources)
        code = code.func
    code = inspect.unwrap(code)
    if not isinstance(code, FunctionType | type) or _name(code) in sources or not _is_own(code):
        return
    try:
        sources[_name(code)] = inspect.getsource(code).encode()
    except (OSError, TypeError):  # it was typed into an interpreter
        sources[_name(code)] = code.__code__.co_code if isinstance(code, FunctionType) else b""
    members = [code] if isinstance(code, FunctionType) else [getattr(x, "__func__", x) for x in vars(code).values()]
    for function in members:
        if isinstance(function, FunctionType):
            for name, mentioned in _mentioned(function).items():
                if callable(mentioned):
                    _gather(mentioned, sources)
                _gather_value(f"{_name(function)}: {name}", mentioned, sources)
    for base in code.__bases__ if isinstance(code, type) else ():
        _gather(base, sources)


def _gather_value(name: str, value: Any, sources: dict[str, bytes]) -> None:
    """Data, and what an object of a user's own class holds."""
    if not isinstance(value, type) and _is_own(type(value)):
        _gather(type(value), sources)
        value = getattr(value, "__dict__", None)
    if (text := _text(value)) is not None:
        sources[name] = text.encode()


def _text(value: Any) -> str | None:
    """All that there is to data: plain values, arrays, and collections of these; None for anything else."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return f"{value.dtype}{value.shape} {zlib.crc32(np.ascontiguousarray(value).tobytes()):08x}"
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    elif isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    elif not isinstance(value, list | tuple):
        return None
    texts = [_text(item) for item in value]
    return None if None in texts else f"[{', '.join(map(str, texts))}]"


def _mentioned(function: FunctionType) -> dict[str, Any]:
    """What a function may read, by name: globals, what lies in a user's own modules among these, what it encloses."""
    names = {name for name in _names(function.__code__) if not name.startswith("__")}
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for value in list(known.values()):
        if isinstance(value, ModuleType) and _is_own_module(value):
            known |= {f"{value.__name__}.{name}": vars(value)[name] for name in names if name in vars(value)}
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
    return _is_own_module(sys.modules.get(code.__module__), code.__module__)


def _is_own_module(module: ModuleType | None, name: str = "") -> bool:
    """Whether it is neither this package, nor Python's, nor an installed package."""
    root = (name or (module.__name__ if module else "")).partition(".")[0]
    file = getattr(module, "__file__", None) or ""
    return root not in (__package__, *(sys.stdlib_module_names - {"__main__"})) and "-packages" not in file


def _name(code: Any) -> str:
    return f"{code.__module__}.{getattr(code, '__qualname__', type(code).__qualname__)}"
