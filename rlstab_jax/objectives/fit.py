"""Whether an objective runs on what a run has for it, found by tracing it on a small batch."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

import jax
import numpy as np
from jax.tree_util import Partial

from rlstab_jax.objectives.core import Objective, Regulariser, advantages_of, coefficients, surrogate
from rlstab_jax.own_code import place
from rlstab_jax.types import Scores, UserError, one_line

# Of the batch, which is traced and never made: no size that code would name, and rows of groups of any usual size.
ROWS, LENGTH = 2**10 * 3**2 * 5 * 7, 11


def check(objective: Objective) -> None:
    """Raises UserError where a piece does not run on the scores that it is given, before any work is done."""
    check_regularisers(objective)
    for name, value in [*_pieces(objective).items(), *(("term", one.term) for one in objective.regularisers)]:
        if not isinstance(value, Partial):
            function = getattr(value, "__name__", None)
            raise UserError(
                f"objective: {name} is {function or repr(value)}, expected a function in a piece: "
                f"{name}=piece({function or '...'})"
            )
        if odd := [number for number in jax.tree.leaves(value) if isinstance(number, str)]:
            raise UserError(f"objective: {name} is given the text {odd[0]!r}, expected numbers and functions")
    try:
        _trace(objective)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"objective: it does not run on a batch, tried on {ROWS} responses of up to {LENGTH} tokens"
            f"{place(error)}: {one_line(error)}"
        ) from error


def check_regularisers(objective: Objective) -> None:
    """Raises UserError where they are anything but a tuple of `Regulariser`."""
    given = objective.regularisers
    if not isinstance(given, tuple) or not all(isinstance(one, Regulariser) for one in given):
        kinds = [type(one).__name__ for one in given] if isinstance(given, tuple | list) else type(given).__name__
        raise UserError(
            f"objective: regularisers is {kinds}, expected a tuple: regularisers=(Regulariser(piece(...), 0.01),)"
        )


def _pieces(objective: Objective) -> dict[str, Partial]:
    """All but the regularisers, by name."""
    return {field.name: getattr(objective, field.name) for field in fields(objective) if field.name != "regularisers"}


def reads(objective: Objective, what: Literal["reference", "router"]) -> bool:
    """Whether it fails without a reference's log-probs, or without the routers'. For one that passes `check`."""
    try:
        _trace(objective, **{what: False})
    except Exception:  # what a piece raises that meets None
        return True
    return False


def _trace(objective: Objective, reference: bool = True, router: bool = True) -> None:
    """As a run does: advantages and coefficients before the updates, which alone have entropies and pi_theta's router;
    the loss without groups, since it sees parts of them."""
    array: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), np.float32)
    of_router: Any = jax.ShapeDtypeStruct((ROWS, LENGTH, 4), np.float32) if router else None
    groups: Any = jax.ShapeDtypeStruct((ROWS,), np.int32)
    mask: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), bool)
    before = Scores(array, array, array, mask, groups, array if reference else None, router_old=of_router)

    def loss(objective: Objective, before: Scores, entropy: Any, router_target: Any, rewards: Any) -> Any:
        objective = _measured(objective)
        advantage, c = advantages_of(objective, before, rewards), coefficients(objective, before)
        scores = replace(before, groups=None, entropy=entropy, router_target=router_target)
        return surrogate(objective, scores, advantage, c)[0]

    jax.eval_shape(loss, objective, before, array, of_router, jax.ShapeDtypeStruct((ROWS,), np.float32))


def _measured(objective: Objective) -> Objective:
    """The same, whose pieces raise UserError where they return another shape than they should: one that happens to
    broadcast would mix the responses of a batch."""
    batch, tokens = ("[batch]",), ("[batch, R]", "[batch, 1]")
    shapes = {"reward": batch, "advantage": batch + tokens}

    def measured(name: str, function: Callable) -> Partial:
        def call(*arguments: Any) -> Any:
            result, expected = function(*arguments), shapes.get(name, tokens)
            shape = ", ".join({ROWS: "batch", LENGTH: "R"}.get(size, str(size)) for size in np.shape(result))
            if f"[{shape}]" not in expected:
                raise UserError(f"objective: {name} returned an array [{shape}], expected {' or '.join(expected)}")
            return result

        return Partial(call)

    penalties = tuple(replace(one, term=measured("term", one.term)) for one in objective.regularisers)
    return replace(
        objective, **{name: measured(name, of) for name, of in _pieces(objective).items()}, regularisers=penalties
    )
