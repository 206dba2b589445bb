"""Checks of a config. Ranges: bounds belong to them, NaN does not, None is not set. Fields: of their types alone."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from experiments.study import replaced
from rlstab_jax.checks import check_fields, check_range, check_ranges
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.validate import validate
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


@dataclasses.dataclass(frozen=True)
class Inner:
    word: Literal["one", "two"] | None = None
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int = 1
    on: bool = True
    name: str = ""
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    inner: Inner = Inner()


def test_a_subclass_that_is_no_dataclass_is_refused() -> None:
    """Its new numbers would be its class's, which no field shows and no function is given."""

    class Undecorated(Inner):
        share: float = 0.7
        slope: float = 3.0

    with pytest.raises(UserError, match=r"Undecorated\.slope is no field of inner.*@dataclasses\.dataclass"):
        check_fields(Outer(inner=Undecorated()))


@pytest.mark.parametrize(
    "given",
    [Outer(), Outer(inner=Inner("two", 1)), Outer(count=np.int64(2), inner=Inner(share=np.float32(1)))],
)
def test_fields_of_their_types(given: Outer) -> None:
    check_fields(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 2.5}, "count = 2.5: expected a whole number"),
        ({"count": True}, "count = True: expected a whole number"),
        ({"count": None}, "count = None: expected a whole number"),
        ({"on": 1}, "on = 1: expected True or False"),
        ({"name": None}, "name = None: expected text"),
        ({"sizes": "12"}, "sizes = '12': expected a tuple, each a whole number"),
        ({"sizes": (1, 2.5)}, "sizes = (1, 2.5): expected a tuple, each a whole number"),
        ({"pair": (1, 2, 3)}, "pair = (1, 2, 3): expected a tuple, 2: a whole number, a number"),
        ({"inner": "one"}, "inner = 'one': expected a value of Inner"),
        ({"inner": Inner(share="0.5")}, "inner.share = '0.5': expected a number"),
        ({"inner": Inner("three")}, "inner.word = 'three': expected one of one, two or None"),
    ],
)
def test_fields_of_other_types(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        check_fields(Outer(**given))
    assert str(error.value) == said


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.overlong": "dropped"},
        {"rollout.log_probs": "rescored"},
        {"rollout.precision.scales": "blocks"},
        {"learner.replay": "r4"},
        {"learner.learning_rate": None},
        {"objective.kl_in": "rewards"},
        {"monitor.gradient.policy": "lowr"},
        {"model.qk_norm": "heads"},
        {"kernels.experts": "fast"},
        {"gradient_steps": 2.5},
    ],
)
def test_a_misspelt_word_of_a_config_is_no_default(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=f"^{name} = {value!r}: expected"):
        validate(replaced(RunConfig(), changes))
