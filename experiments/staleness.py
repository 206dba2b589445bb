"""Asynchronous rollouts against synchronous ones at equal data: a batch that is L updates old when it is learnt from,
and one of which the N mini-batches are 0 to N - 1 updates old.

    python -m experiments.staleness --seeds 10 [--hours 2] [--plan] [--draw]
"""

from experiments.setting import base, replay, updates
from experiments.study import Cell, Panel, Study, main

LAGS = (2, 8)
NUMBERS = (1, 2, 4, 8)

STUDY = Study(
    name="staleness",
    question="Asynchronous rollouts (lag, N = 1) and synchronous ones (N)",
    base=base(),
    cells=(
        *(Cell(f"lag{lag}", updates(1) | {"rollout.lag": lag}, f"lag {lag}") for lag in LAGS),
        Cell("lag8-r3", updates(1) | replay("r3") | {"rollout.lag": 8}, "lag 8, R3"),
        *(Cell(f"n{n}", updates(n), f"N = {n}") for n in NUMBERS),
        Cell("n8-r3", updates(8) | replay("r3"), "N = 8, R3"),
    ),
    panels=(
        Panel("asynchronous", ("n1", *(f"lag{lag}" for lag in LAGS), "lag8-r3")),
        Panel("synchronous", (*(f"n{n}" for n in NUMBERS), "n8-r3")),
    ),
)

if __name__ == "__main__":
    main(STUDY)
