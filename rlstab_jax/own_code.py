"""A user's own code in a config: a run does not go on with another recipe, verifier or task of the same name."""

import dataclasses
import functools
import inspect
import sys
import zlib
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any


def code_of(config: Any) -> dict[str, str]:
    """A checksum of the source of each function in a config, and of each class of its parts, that is a user's own:
    `plain` knows names and fields alone. The user's functions and classes that it mentions are in it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = code_of([getattr(config, f.name) for f in dataclasses.fields(config)])
        return fields | _checksum(type(config))
    if isinstance(config, functools.partial):
        return code_of(config.func)
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
    code = inspect.unwrap(code.func if isinstance(code, functools.partial) else code)
    if not isinstance(code, FunctionType | type) or _name(code) in sources or not _is_own(code):
        return
    try:
        sources[_name(code)] = inspect.getsource(code).encode()
    except (OSError, TypeError):  # it was typed into an interpreter
        sources[_name(code)] = code.__code__.co_code if isinstance(code, FunctionType) else b""
    members = [code] if isinstance(code, FunctionType) else [getattr(x, "__func__", x) for x in vars(code).values()]
    for function in members:
        if isinstance(function, FunctionType):
            enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
            for mentioned in [*(function.__globals__.get(name) for name in _names(function.__code__)), *enclosed]:
                if callable(mentioned):
                    _gather(mentioned, sources)
    for base in code.__bases__ if isinstance(code, type) else ():
        _gather(base, sources)


def _names(code: CodeType) -> set[str]:
    """The global names that a function mentions, and those within it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _is_own(code: FunctionType | type) -> bool:
    """Whether it is neither this package's, nor Python's, nor an installed package's."""
    root = code.__module__.partition(".")[0]
    file = getattr(sys.modules.get(code.__module__), "__file__", None) or ""
    return root not in (__package__, *(sys.stdlib_module_names - {"__main__"})) and "-packages" not in file


def _name(code: FunctionType | type) -> str:
    return f"{code.__module__}.{code.__qualname__}"
