"""Whether an objective runs on what a run has for it, found by tracing it on a small batch."""

from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np

from rlstab_jax.objectives.core import Objective, advantages_of, coefficients, surrogate
from rlstab_jax.types import Scores, UserError


def check(objective: Objective) -> None:
    """Raises UserError where a piece does not run on the scores that it is given, before any work is done."""
    try:
        _trace(objective)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"objective: it does not run on a batch: {type(error).__name__}: {error}") from error


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
    array: Any = jax.ShapeDtypeStruct((2, 3), np.float32)
    of_router: Any = jax.ShapeDtypeStruct((2, 3, 4), np.float32) if router else None
    groups: Any = jax.ShapeDtypeStruct((2,), np.int32)
    mask: Any = jax.ShapeDtypeStruct((2, 3), bool)
    before = Scores(array, array, array, mask, groups, array if reference else None, router_old=of_router)

    def loss(before: Scores, entropy: Any, router_target: Any, rewards: Any) -> Any:
        advantage, c = advantages_of(objective, before, rewards), coefficients(objective, before)
        scores = replace(before, groups=None, entropy=entropy, router_target=router_target)
        return surrogate(objective, scores, advantage, c)[0]

    jax.eval_shape(loss, before, array, of_router, jax.ShapeDtypeStruct((2,), np.float32))
