"""Sums over groups, the responses of one prompt: equal numbers in [0, batch), in any order."""

import jax
import numpy as np
from jax.ops import segment_min, segment_sum
from jaxtyping import Array, Float, Int

from rlstab_jax.types import UserError

Groups = Int[Array, "batch"]


def group_sum(values: Float[Array, "batch"], groups: Groups) -> Float[Array, "batch"]:
    """The sum of each row's group, written to every row."""
    return segment_sum(values, _checked(groups), num_segments=groups.shape[0])[groups]


def group_min(values: Float[Array, "batch"], groups: Groups) -> Float[Array, "batch"]:
    """The smallest value of each row's group, written to every row."""
    return segment_min(values, _checked(groups), num_segments=groups.shape[0])[groups]


def group_count(counted: Float[Array, "batch"], groups: Groups) -> Float[Array, ""]:
    """Groups with a row that counts more than 0."""
    return (segment_sum(counted, _checked(groups), num_segments=groups.shape[0]) > 0).sum()


def _checked(groups: Groups) -> Groups:
    """Raises UserError for numbers that are none of [0, batch): their rows would be left out, and become NaN. Tracers
    pass, and what lies on other hosts."""
    if not isinstance(groups, jax.core.Tracer) and getattr(groups, "is_fully_addressable", True):
        numbers = np.asarray(groups)
        outside = (numbers < 0) | (numbers >= len(numbers))
        if outside.any():
            raise UserError(
                f"groups: {numbers[outside][0]}, expected numbers in [0, {len(numbers)}), as many as rows: "
                "np.unique(groups, return_inverse=True)[1] numbers them anew"
            )
    return groups
