"""Ranges of a config's numbers: a table for each config, one check for all."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlstab_jax.types import UserError

# Beyond what any number is meant to be, so that inclusive bounds say "above 0" and "finite".
TINY, HUGE = 1e-30, 1e30
INT = 2**31 - 1

Range = tuple[float, float, str]  # inclusive bounds, and what is expected in words


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Raises UserError if a number, or one of an array's, is outside its range. NaN is outside of all."""
    low, high, expected = allowed
    try:
        values = np.atleast_1d(value)
        wrong = values[~((values >= low) & (values <= high))]
    except TypeError:
        raise UserError(f"{name} = {value!r}: expected a number, {expected}") from None
    if wrong.size:
        raise UserError(f"{name} = {wrong[0]}: expected {expected}")


def check_ranges(owner: object, ranges: Mapping[str, Range], where: str = "") -> None:
    """`check_range` of the attributes of ``owner`` that a table names; one that is None is not set, and passes."""
    for name, allowed in ranges.items():
        if (value := getattr(owner, name)) is not None:
            check_range(f"{where}.{name}" if where else name, value, allowed)
