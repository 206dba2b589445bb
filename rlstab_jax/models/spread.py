"""Costs that depend on where a router sends tokens, written into the names of operations for whoever counts them.

A name goes with its operation into the jaxpr and, as ``op_name``, into the compiled program.
"""

import re
from contextlib import AbstractContextManager

import jax


def evenly(rounds: float = 1.0, held: float = 1.0) -> AbstractContextManager[None]:
    """The scope of a loop, a choice of branches or products, with their cost where tokens choose experts evenly.

    Args:
      rounds: of the loop, whose length is known to the data alone. Of branches the first is taken.
      held: the part of the products' rows that hold tokens.
    """
    return jax.named_scope(f"evenly[{rounds:.9g},{held:.9g}]")


def cost_in(name: str) -> tuple[float, float] | None:
    """``rounds`` and ``held`` of a name that was made in such a scope; None of any other."""
    found = re.search(r"evenly\[([^,\]]+),([^\]]+)\]", name)
    return (float(found.group(1)), float(found.group(2))) if found else None
