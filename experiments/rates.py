"""The main methods over the grid of learning rates: at the common rate, at each one's best, at the highest that lasts.

Confirmatory runs of `off_policy` and `high_rates` together; a method's best rate is that of its tuning runs.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing, high_rates, off_policy, tuning
from experiments.claims import ENOUGH
from experiments.pairing import blocks, common
from experiments.setting import LEARNING_RATE, RATES
from experiments.study import RESULTS, Run, runs_of

FOLDER = RESULTS / "rates"
FILE = "rates.csv"
TUNED = 3  # pairs that tuning takes
LASTS = 0.1  # share of runs that may collapse
METHODS = {off_policy.name(*method): off_policy.cell(*method).label for method in off_policy.METHODS}


def cell_at(method: str, rate: float) -> str:
    """The cell of a method at a rate; without a suffix at the common one."""
    return method if rate == LEARNING_RATE else f"{method}-lr{rate:g}"


def confirmatory(records: Mapping[str, dict[str, Any]]) -> dict[str, list[Run]]:
    """The runs of each cell that has enough of them, of whichever study."""
    runs = runs_of(off_policy.STUDY, records) | runs_of(high_rates.STUDY, records)
    return {name: done for name, done in runs.items() if len(done) >= ENOUGH}


def best(method: str, records: Mapping[str, dict[str, Any]]) -> float:
    """The rate of the highest mean final accuracy in tuning, over the pairs that ran at every rate of the grid from one
    cold start; NaN without `TUNED` of them."""
    short = "n1" if method.startswith("n1-") else method
    names = [tuning.name(short, rate) for rate in RATES]
    tuned = common(runs_of(tuning.STUDY, records), names)
    if len(tuned[0]) < TUNED:
        return math.nan
    ends = {rate: np.mean([run.final for run in done]) for rate, done in zip(RATES, tuned, strict=True)}
    return max(ends, key=ends.__getitem__)


def lasts(method: str, runs: Mapping[str, list[Run]]) -> float:
    """The largest rate at which at most a tenth of the runs collapsed; NaN unless more did at the next one."""
    shares = {rate: drawing.collapsed(done)[0] for rate in RATES if (done := runs.get(cell_at(method, rate)))}
    for rate, higher in itertools.pairwise(RATES):
        if rate in shares and higher in shares and shares[rate] <= LASTS < shares[higher]:
            return rate
    return math.nan


def table(records: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and rate that has enough runs, of each block of equal pairs: only these may be compared.

    Among them ``best`` and ``lasts``, which are 1 at the method's best rate in tuning, and at the rate above which more
    than a tenth of the runs collapse; 0 elsewhere.
    """
    runs, rows = confirmatory(records), []
    shown = blocks({name: runs.get(name, []) for name in (cell_at(*of) for of in itertools.product(METHODS, RATES))})
    for method, label in METHODS.items():
        largest, tuned = lasts(method, runs), best(method, records)
        for block, rate in itertools.product(shown, RATES):
            if len(done := block.runs.get(cell_at(method, rate), [])) >= ENOUGH:
                row = {"method": label, "learning_rate": rate} | drawing.ended(done) | {"pairs": block.pairs}
                row |= drawing.interval(done, "final")
                rows.append(row | {"best": int(rate == tuned), "lasts": int(rate == largest)})
    return rows


def lines(records: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table for a page: a line for each method and ten pairs, its rates beside each other."""
    rows = {(row["method"], row["pairs"], row["learning_rate"]): row for row in table(records)}

    def shown(label: str, pairs: str, rate: float) -> str:
        if (row := rows.get((label, pairs, rate))) is None:
            return ""
        marks = "*" * row["best"] + "^" * row["lasts"]
        interval = f"[{row['final_low']:.2f}, {row['final_high']:.2f}]"
        return f"{row['final']:.2f} {interval}, {row['collapsed']} of {row['runs']}{' ' * bool(marks)}{marks}"

    found = dict.fromkeys((label, pairs) for label, pairs, _ in rows)
    return [(label, pairs, *(shown(label, pairs, rate) for rate in RATES)) for label, pairs in found]


def draw(records: Mapping[str, dict[str, Any]], out: Path = FOLDER) -> None:
    """Writes the table and the picture: final accuracy and share of collapses by learning rate."""
    if not (rows := table(records)):
        return
    out.mkdir(parents=True, exist_ok=True)
    drawing.write_csv(out / FILE, rows)
    cells = {label: {rate: cell_at(method, rate) for rate in RATES} for method, label in METHODS.items()}
    drawing.by_level(cells, confirmatory(records), "learning rate", out / "by_rate.png")
