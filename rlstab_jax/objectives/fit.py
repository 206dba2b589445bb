"""Whether an objective runs on what a run has for it, found by tracing it on a small batch."""

import sysconfig
import traceback
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.tree_util import Partial

from rlstab_jax.objectives.core import Objective, advantages_of, coefficients, surrogate
from rlstab_jax.types import Scores, UserError, one_line

# Where no user's own code lies.
NOT_OWN = {Path(__file__).parents[1], Path(sysconfig.get_paths()["stdlib"])}
# Of the batch, which is traced and never made: no size that code would name, and rows of groups of any usual size.
ROWS, LENGTH = 2**10 * 3**2 * 5 * 7, 11


def check(objective: Objective) -> None:
    """Raises UserError where a piece does not run on the scores that it is given, before any work is done."""
    pieces = {field.name: getattr(objective, field.name) for field in fields(objective) if field.name != "regularisers"}
    for name, value in [*pieces.items(), *(("term", one.term) for one in objective.regularisers)]:
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
            f"{_place(error)}: {one_line(error)}"
        ) from error


def _place(error: Exception) -> str:
    """Where a user's own code was at last, if it was there at all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not NOT_OWN & {*Path(frame.filename).parents}]
    own = [frame for frame in own if "-packages" not in frame.filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


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
        advantage, c = advantages_of(objective, before, rewards), coefficients(objective, before)
        scores = replace(before, groups=None, entropy=entropy, router_target=router_target)
        return surrogate(objective, scores, advantage, c)[0]

    jax.eval_shape(loss, objective, before, array, of_router, jax.ShapeDtypeStruct((ROWS,), np.float32))
