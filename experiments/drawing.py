"""Tables and pictures of a study, from its finished runs. Pictures are for print: labelled, in colours that all see."""

import csv
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments import statistics
from experiments.study import Run, Study

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours without the yellow, which paper swallows; the style of the line tells the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)), "-")
MARKERS = "os^Dv<P"
MEASURED = ("discrepancy/k3", "routing/rollout_vs_old", "staleness/k3", "trust/masked", "weight/ess", "policy/entropy")

Runs = Mapping[str, list[Run]]


def draw(study: Study, runs: Runs, out: Path) -> None:
    """Writes the tables and pictures of what has been run; nothing if nothing has."""
    if not any(runs.values()):
        print(f"{study.name}: no run is finished yet")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables(study, runs).items():
        write_csv(out / name, rows)
    panels(study, runs, out / "curves.png")
    if study.picture is not None:
        study.picture(runs, out)
    print(f"{study.name}: {sum(map(len, runs.values()))} runs drawn in {out}")


def tables(study: Study, runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """The study's tables, by the names of their files."""
    own = study.tables(runs) if study.tables is not None else {}
    return {"cells.csv": cell_table(study, runs), **{name: rows for name, rows in own.items() if rows}}


def cell_table(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """For each cell that has runs: how they ended, the endpoints with 95% intervals, means of what was measured."""
    rows = []
    for cell in study.cells:
        if not (done := runs[cell.name]):
            continue
        row = {"cell": cell.name} | ended(done) | {"degraded": sum(run.outcome.kind == "degraded" for run in done)}
        for endpoint in ("final", "peak", "speed"):
            row |= interval(done, endpoint)
        row |= {name: float(np.mean([run.mean(name) for run in done])) for name in MEASURED}
        known = [run.seconds for run in done if math.isfinite(run.seconds)]
        rows.append(row | {"seconds": float(np.median(known)) if known else math.nan})
    return rows


def ended(runs: Sequence[Run]) -> dict[str, Any]:
    """How many runs there are and how many of them collapsed, with the exact interval of the share, for a table."""
    collapsed = sum(run.outcome.kind == "collapsed" for run in runs)
    low, high = statistics.clopper_pearson(collapsed, len(runs))
    return {"runs": len(runs), "collapsed": collapsed, "collapsed_low": low, "collapsed_high": high}


def interval(runs: Sequence[Run], endpoint: str) -> dict[str, Any]:
    """An endpoint's mean and its interval, for a table."""
    found = mean_of(runs, endpoint)
    return {endpoint: found.mean, f"{endpoint}_low": found.low, f"{endpoint}_high": found.high}


def mean_of(runs: Sequence[Run], endpoint: str) -> statistics.Estimate:
    """The mean of an endpoint of runs with its hierarchical bootstrap interval."""
    values = np.array([getattr(run, endpoint) for run in runs])
    return statistics.estimate(values, np.array([run.cold_start for run in runs]))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Numbers to four significant digits; NaN is empty."""

    def shown(x: Any) -> Any:
        if not isinstance(x, float):
            return x
        return "" if math.isnan(x) else f"{x:.4g}"

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: shown(x) for name, x in row.items()} for row in rows)


def panels(study: Study, runs: Runs, path: Path) -> None:
    """Above, held-out accuracy: mean and the 10th to 90th percentile of the runs. Below, the share not collapsed."""
    shown = [panel for panel in study.panels if any(runs[name] for name in panel.cells)]
    if not shown:
        return
    size = (3.4 * len(shown) + 0.6, 5.6)
    figure, grid = plt.subplots(2, len(shown), figsize=size, dpi=150, layout="constrained", squeeze=False)
    for (above, below), panel in zip(grid.T, shown, strict=True):
        above.set_title(panel.title, fontsize=9, loc="left")
        for i, name in enumerate(name for name in panel.cells if runs[name]):
            style = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": STYLES[(i + i // len(COLOURS)) % len(STYLES)],
                "linewidth": 1.4,
            }
            _curve(above, runs[name], f"{study.cell(name).label or name} ({len(runs[name])})", style)
            _survival(below, runs[name], style)
        above.set_ylim(0, 1)
        below.set_ylim(-0.03, 1.03)
        below.set_xlabel("gradient steps", fontsize=8)
        above.legend(fontsize=6, frameon=False, loc="upper left")
    grid[0, 0].set_ylabel("held-out accuracy (training engine)", fontsize=8)
    grid[1, 0].set_ylabel("share of runs not collapsed (95% interval)", fontsize=8)
    for ax in grid.flat:
        plain(ax)
    title = f"{study.question}. Bands: 10th to 90th percentile of runs; in brackets their number"
    figure.suptitle(textwrap.fill(title, int(14 * size[0])), fontsize=9)  # characters of an inch
    figure.savefig(path)
    plt.close(figure)


def _curve(ax: Axes, runs: Sequence[Run], label: str, style: Mapping[str, Any]) -> None:
    steps = runs[0].steps
    accuracy = np.array([run.accuracy for run in runs if len(run.accuracy) == len(steps)])
    low, high = np.quantile(accuracy, [0.1, 0.9], axis=0)
    ax.plot(steps, accuracy.mean(axis=0), label=label, **style)
    ax.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _survival(ax: Axes, runs: Sequence[Run], style: Mapping[str, Any]) -> None:
    ends = np.array([run.outcome.onset if run.outcome.kind == "collapsed" else run.horizon for run in runs])
    collapsed = np.array([run.outcome.kind == "collapsed" for run in runs])
    times, share, low, high = statistics.kaplan_meier(ends, collapsed)
    horizon = max(run.horizon for run in runs)
    times, share, low, high = (np.append(a, a[-1] if a is not times else horizon) for a in (times, share, low, high))
    ax.step(times, share, where="post", **style)
    ax.fill_between(times, low, high, step="post", color=style["color"], alpha=0.12, linewidth=0)


def by_level(lines: Mapping[str, Mapping[float, str]], runs: Runs, label: str, path: Path) -> None:
    """Final accuracy and share of collapses of several lines of cells, each cell at a level, with 95% intervals."""
    levels = sorted({level for cells in lines.values() for level in cells})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), dpi=150, layout="constrained")
    for i, (name, cells) in enumerate(lines.items()):
        there = [level for level in sorted(cells) if runs.get(cells[level])]
        if not there:
            continue
        place = [levels.index(level) + 0.09 * (i - (len(lines) - 1) / 2) for level in there]
        style: dict[str, Any] = {"color": COLOURS[i % 7], "linestyle": STYLES[i % 7], "marker": MARKERS[i % 7]}
        style |= {"markersize": 4, "linewidth": 1.1, "capsize": 2, "label": name}
        ends = [mean_of(runs[cells[level]], "final") for level in there]
        counts = [
            (sum(run.outcome.kind == "collapsed" for run in runs[cells[level]]), len(runs[cells[level]]))
            for level in there
        ]
        shares = [count / total for count, total in counts]
        bounds = [statistics.clopper_pearson(*count) for count in counts]
        for ax, mean, low, high in (
            (left, [e.mean for e in ends], [e.low for e in ends], [e.high for e in ends]),
            (right, shares, [low for low, _ in bounds], [high for _, high in bounds]),
        ):
            ax.errorbar(place, mean, np.maximum(0, [np.subtract(mean, low), np.subtract(high, mean)]), **style)
    left.set_ylabel("final held-out accuracy", fontsize=8)
    right.set_ylabel("share of runs that collapsed", fontsize=8)
    for ax in (left, right):
        ax.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        ax.set_xlabel(label, fontsize=8)
        ax.set_xlim(-0.5, len(levels) - 0.5)
        ax.set_ylim(-0.03, 1.03)
        plain(ax)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def plain(ax: Axes) -> None:
    """Axes for print: few lines, small numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.tick_params(labelsize=7)
