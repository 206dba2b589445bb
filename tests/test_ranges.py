"""Ranges of a config's numbers: bounds belong to them, NaN and what is no number do not, None is not set."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from rlstab_jax.ranges import check_range, check_ranges
from rlstab_jax.types import UserError

SHARE = (0, 1, "from 0 to 1")


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(1), np.array([0.0, 1.0]), 2**0])
def test_numbers_inside(value: object) -> None:
    check_range("share", value, SHARE)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1e-9, "share = -1e-09: expected from 0 to 1"),
        (2**70, f"share = {2**70}: expected from 0 to 1"),
        (math.nan, "share = nan: expected from 0 to 1"),
        (np.array([0.5, 1.5, 7.0]), "share = 1.5: expected from 0 to 1"),
        ("0.5", "share = '0.5': expected a number, from 0 to 1"),
    ],
)
def test_numbers_outside(value: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_range("share", value, SHARE)
    assert str(error.value) == said


def test_of_a_config() -> None:
    check_ranges(SimpleNamespace(share=None), {"share": SHARE}, "rollout")
    for where, name in (("rollout", "rollout.share"), ("", "share")):
        with pytest.raises(UserError, match=f"^{name} = 3"):
            check_ranges(SimpleNamespace(share=3), {"share": SHARE}, where)
