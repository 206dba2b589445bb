"""Where could the claims on staleness bite? Without clipping or replay, on tuning seeds: an exploration, no evidence.

At the common learning rate nothing collapses. So what the theory says makes the error grow is turned up one by one:
the learning rate, N, the weights (no cap, or one on pi_old/mu alone, which leaves pi_theta/pi_old unbounded), each
beside on-policy training at the same rate; and the highest rate with clipping by global norm, which the other studies
leave off.

    python -m experiments.regime --seeds 3 [--hours 2] [--plan] [--draw]
"""

import math
from typing import Any

from experiments.setting import at_rate, base, clipping, updates
from experiments.study import TUNING, Cell, Panel, Study, main

NO_CAP = {"objective.cap": math.inf}
CAP_ON_DISCREPANCY = {"objective.cap_on": "discrepancy"}
NORM = {"learner.max_grad_norm": 1.0}


def _cell(number: int, rate: float, suffix: str = "", label: str = "", **changes: Any) -> Cell:
    """N = 1 is on-policy, where clipping changes nothing; the others go without."""
    text = f"N = {number}, {rate:g}{label}"
    return Cell(
        f"n{number}-lr{rate:g}{suffix}", updates(number) | clipping(number == 1) | at_rate(rate) | changes, text
    )


STUDY = Study(
    name="regime",
    question="No clipping, live routing, tuning seeds: what makes runs collapse",
    base=base(),
    cells=(
        _cell(1, 1.5e-3),
        _cell(8, 1.5e-3),
        _cell(8, 1.5e-3, "-nocap", ", no cap", **NO_CAP),
        _cell(8, 1.5e-3, "-capfactor", r", cap on $\pi_{old}/\mu$", **CAP_ON_DISCREPANCY),
        _cell(1, 1e-3),
        _cell(8, 1e-3, "-nocap", ", no cap", **NO_CAP),
        _cell(16, 1e-3),
        _cell(32, 1e-3),
        _cell(1, 2e-3, "-norm1", ", norm clipped at 1", **NORM),
        _cell(8, 2e-3, "-norm1", ", norm clipped at 1", **NORM),
    ),
    panels=(
        Panel("learning rate 1.5e-3", ("n1-lr0.0015", "n8-lr0.0015", "n8-lr0.0015-nocap", "n8-lr0.0015-capfactor")),
        Panel("1e-3", ("n1-lr0.001", "n8-lr0.001-nocap", "n16-lr0.001", "n32-lr0.001")),
        Panel("2e-3", ("n1-lr0.002-norm1", "n8-lr0.002-norm1")),
    ),
    pairs=TUNING,
)

if __name__ == "__main__":
    main(STUDY)
