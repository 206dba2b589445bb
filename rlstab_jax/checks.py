"""Checks of a config: its fields are of their declared types, its numbers inside ranges that a table gives."""

import dataclasses
import inspect
import numbers
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from rlstab_jax.types import UserError

# Beyond what any number is meant to be, so that inclusive bounds say "above 0" and "finite".
TINY, HUGE = 1e-30, 1e30
BELOW_1, ABOVE_1 = 1 - 1e-9, 1 + 1e-9
INT32_MAX = 2**31 - 1

Range = tuple[float, float, str]  # inclusive bounds, and what is expected in words


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Raises UserError if a number, or one of an array's, is outside its range. NaN is outside of all."""
    low, high, expected = allowed
    values = np.atleast_1d(value)
    wrong = values[~((values >= low) & (values <= high))]
    if wrong.size:
        raise UserError(f"{name} = {wrong[0]}: expected {expected}")


def check_ranges(owner: object, ranges: Mapping[str, Range], where: str = "") -> None:
    """`check_range` of the attributes of ``owner`` that a table names; one that is None is not set, and passes."""
    for name, allowed in ranges.items():
        if (value := getattr(owner, name)) is not None:
            check_range(_path(where, name), value, allowed)


def check_fields(config: Any, where: str = "") -> None:
    """Raises UserError on the first field of a dataclass, or of one inside it, that is not of its declared type.

    That is a word that is none of a Literal's, or what is no number, whole number, bool, text, None, tuple of these or
    dataclass where one is declared. The command line's parser holds to the types; a config file may say anything.
    """
    hints = get_type_hints(type(config))
    named = {field.name for field in dataclasses.fields(config)}
    for cls in type(config).__mro__:
        if "__dataclass_fields__" not in vars(cls) and (lost := sorted(inspect.get_annotations(cls).keys() - named)):
            raise UserError(
                f"{cls.__name__}.{lost[0]} is no field of {_path(where, 'the config')}, and would be read by nobody: "
                f"write @dataclasses.dataclass(frozen=True) above the class {cls.__name__}"
            )
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), _path(where, field.name)
        if not _fits(value, hints[field.name]):
            raise UserError(f"{name} = {value!r}: expected {_expected(hints[field.name])}")
        if dataclasses.is_dataclass(value):
            check_fields(value, name)


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):  # a list has no hash, which compiled functions need
            return False
        parts = get_args(hint)
        parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(parts) == len(value) and all(map(_fits, value, parts))
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, types.NoneType) else True


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_expected, get_args(hint)))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a value of {hint.__name__}"
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if parts[1:] == (...,):
            return f"a tuple, each {_expected(parts[0])}"
        return f"a tuple, {len(parts)}: {', '.join(map(_expected, parts))}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(hint, str(hint))
