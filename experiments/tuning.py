"""Learning rates, on seeds and cold starts of their own: the same grid and budget for each method.

Its runs are pilots too: ``power.csv`` says how many pairs a contrast of two methods would need.

    python -m experiments.tuning --seeds 3 [--hours 2] [--plan] [--draw]
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing, off_policy, statistics
from experiments.claims import SMALLEST
from experiments.off_policy import name as cell_name
from experiments.pairing import common
from experiments.setting import RATES, at_rate, base, clipping, replay, updates
from experiments.study import TUNING, Cell, Panel, Run, Study, main

FEWEST = 3  # pairs of a row of the picture: means of fewer say nothing
METHODS = {"n1" if n == 1 else cell_name(n, clip, mode): (n, clip, mode) for n, clip, mode in off_policy.METHODS}


def name(method: str, rate: float) -> str:
    return f"{method}-lr{rate:g}"


def _cell(method: str, rate: float) -> Cell:
    number, clip, mode = METHODS[method]
    changes = updates(number) | clipping(clip) | replay(mode) | at_rate(rate)
    return Cell(name(method, rate), changes, method)


def picture(runs: Mapping[str, list[Run]], out: Path) -> None:
    """Final accuracy and share of collapses by learning rate."""
    lines = {method: {rate: name(method, rate) for rate in RATES} for method in METHODS}
    drawing.by_level(lines, runs, "learning rate", out / "by_rate.png", FEWEST)


def power(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """For two methods at one rate: the spread of paired differences of final accuracy, and what it asks for."""
    rows = []
    for rate, (a, b) in itertools.product(RATES, itertools.combinations(METHODS, 2)):
        first, second = common(runs, (name(a, rate), name(b, rate)))
        if len(first) < 2:
            continue
        differences = np.array([x.final - y.final for x, y in zip(first, second, strict=True)])
        spread = float(np.std(differences, ddof=1))
        row: dict[str, Any] = {"a": a, "b": b, "learning_rate": rate, "pairs": len(first)}
        row |= {"mean": float(differences.mean()), "spread": spread}
        row |= {"pairs_for_smallest_effect": statistics.pairs_needed(SMALLEST, max(spread, 1e-3))}
        row |= {f"detectable_with_{n}": statistics.detectable(n, max(spread, 1e-3)) for n in (10, 20)}
        rows.append(row)
    return rows


STUDY = Study(
    name="tuning",
    question="Learning rates on tuning seeds",
    base=base(),
    cells=tuple(_cell(method, rate) for rate in RATES for method in METHODS),
    panels=tuple(Panel(f"learning rate {rate:g}", tuple(name(method, rate) for method in METHODS)) for rate in RATES),
    pairs=TUNING,
    picture=picture,
    tables=lambda runs: {"power.csv": power(runs)},
)

if __name__ == "__main__":
    main(STUDY)
