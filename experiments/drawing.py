"""Tables and pictures of a study, from its finished runs. Pictures are for print: labelled, in colours that all see."""

import csv
import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments import statistics
from experiments.pairing import Block, blocks, span, tens
from experiments.study import ACCURACY, Panel, Run, Study

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours, with a grey for the yellow, which paper swallows; the style of the line tells the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)), "-", (0, (2, 1)))
MARKERS = "os^Dv<PX"
COLUMNS = 3  # of panels, at most: a picture as wide as a page, whose letters are printed in their size
PANEL = (2.55, 5.0)  # inches: both halves with their legend
TITLE, ENTRY = 34, 38  # letters in a line of a panel's title, and of its legend's entries
COLD_STARTS = 5  # from which on a mean has an interval: that of fewer is Student's, and reaches beyond 0 and 1
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
    (out / "README.md").write_text(page(study, runs, sorted(path.name for path in out.glob("*.png"))))
    print(f"{study.name}: {sum(map(len, runs.values()))} runs drawn in {out}")


def tables(study: Study, runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """The study's tables, by the names of their files."""
    own = study.tables(runs) if study.tables is not None else {}
    return {"cells.csv": cell_table(study, runs), **{name: rows for name, rows in own.items() if rows}}


def cell_table(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """For each cell that has runs, ten pairs at a time: how they ended, the endpoints with 95% intervals, means of what
    was measured.
    """
    rows = []
    for name, done in ((cell.name, ten) for cell in study.cells for ten in tens(runs[cell.name])):
        row = {"cell": name} | ended(done) | {"degraded": sum(run.outcome.kind == "degraded" for run in done)}
        for endpoint in ("final", "peak", "speed"):
            row |= interval(done, endpoint)
        row |= {name: float(np.mean([run.mean(name) for run in done])) for name in MEASURED}
        known = [run.seconds for run in done if math.isfinite(run.seconds)]
        rows.append(row | {"seconds": float(np.median(known)) if known else math.nan})
    return rows


def page(study: Study, runs: Runs, pictures: Sequence[str]) -> str:
    """The study's page: how its cells ended, and which have not been run; ``pictures`` are files beside it."""
    parts = ("final", "final_low", "final_high", "collapsed", "degraded", "runs", "pairs")
    lines = ["| cell | final accuracy | 95% interval | collapsed | degraded | of runs | pairs |", "|" + " --- |" * 7]
    for row in cell_table(study, runs):
        final, low, high, *counts = (row[part] for part in parts)
        interval_ = f"[{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
        lines.append(f"| {row['cell']} | {final:.2f} | {interval_} | " + " | ".join(map(str, counts)) + " |")
    none = [name for name, done in runs.items() if not done]
    few = any(not enough(ten) for done in runs.values() for ten in tens(done))
    return (
        f"# {study.question}\n\nDrawn by `python -m experiments.{study.name} --draw` from [`runs.jsonl`](runs.jsonl) "
        "and from runs of other studies that are of the same config; [`cells.csv`](cells.csv) has more. Lines of one "
        "cell are of other cold starts; only lines of the same pairs, from the same cold starts, compare. Verdicts are "
        "on [the page of all studies](../README.md).\n\n"
        + "\n".join(lines)
        + (f"\n\nAn interval takes runs from {COLD_STARTS} cold starts." if few else "")
        + (f"\n\nNot yet run: {', '.join(none)}." if none else "")
        + "".join(f"\n\n![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures)
        + "\n"
    )


def ended(runs: Sequence[Run]) -> dict[str, Any]:
    """The pairs of some runs, and how many of these collapsed, with the exact interval of the share, for a table."""
    count, (_, low, high) = sum(run.collapsed for run in runs), collapsed(runs)
    of = {"pairs": span(runs), "runs": len(runs)}
    return of | {"collapsed": count, "collapsed_low": low, "collapsed_high": high}


def interval(runs: Sequence[Run], endpoint: str) -> dict[str, Any]:
    """An endpoint's mean and its interval, for a table."""
    found = mean_of(runs, endpoint)
    return {endpoint: found.mean, f"{endpoint}_low": found.low, f"{endpoint}_high": found.high}


def mean_of(runs: Sequence[Run], endpoint: str) -> statistics.Estimate:
    """The mean of an endpoint of runs with its hierarchical bootstrap interval; NaN from too few cold starts."""
    values = np.array([getattr(run, endpoint) for run in runs])
    found = statistics.estimate(values, np.array([run.cold_start for run in runs]))
    return found if enough(runs) else dataclasses.replace(found, low=math.nan, high=math.nan)


def enough(runs: Sequence[Run]) -> bool:
    """Whether runs are of enough cold starts for an interval."""
    return len({run.cold_start for run in runs}) >= COLD_STARTS


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
    """Above, held-out accuracy: mean and the 10th to 90th percentile of the runs. Below, the share not collapsed.

    What stands in one panel is of the same pairs; a panel that would mix them is drawn as several.
    """
    shown = shown_panels(study, study.panels, runs)
    if not shown:
        return
    columns = min(len(shown), COLUMNS)
    bands = math.ceil(len(shown) / columns)
    size = (PANEL[0] * columns + 0.3, PANEL[1] * bands + 0.4)
    figure, grid = plt.subplots(2 * bands, columns, figsize=size, dpi=150, layout="constrained", squeeze=False)
    places = [(grid[2 * band, i], grid[2 * band + 1, i]) for band in range(bands) for i in range(columns)]
    for ax in (ax for place in places[len(shown) :] for ax in place):
        ax.remove()
    for (above, below), (panel, block) in zip(places, shown, strict=False):
        plain(below)
        for done, style in _lines(above, study, panel, block, ACCURACY):
            _survival(below, done, style)
        above.set_ylim(0, 1)
        below.set_ylim(-0.03, 1.03)
        below.set_xlabel("gradient steps", fontsize=8)
        handles, names = above.get_legend_handles_labels()
        below.legend(handles, names, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.25))
    for above, below in places[::columns]:
        above.set_ylabel("held-out accuracy (training engine)", fontsize=7)
        below.set_ylabel("share of runs not collapsed", fontsize=7)
    title = (
        f"{study.question}. Bands: above, the 10th to 90th percentile of the runs, whose number is in brackets; below, "
        "95% intervals, once a run has collapsed and while one has not"
    )
    figure.suptitle(textwrap.fill(title, int(15 * size[0])), fontsize=8)  # characters of an inch
    figure.savefig(path)
    plt.close(figure)


def shown_panels(study: Study, panels: Sequence[Panel], runs: Runs) -> list[tuple[Panel, Block]]:
    """Panels with each of their blocks, but for blocks in which no cell is the panel's own.

    A cell is the first panel's that names it. In others it is there for comparison: alone it is not what they are of.
    """
    shown = []
    for panel in panels:
        before = {name for other in study.panels[: study.panels.index(panel)] for name in other.cells}
        found = blocks({name: runs[name] for name in panel.cells})
        shown += [(panel, block) for block in found if block.runs.keys() - before]
    return shown


def over_steps(study: Study, panels: Sequence[Panel], runs: Runs, metric: str, label: str, path: Path) -> None:
    """A metric of evaluations over gradient steps, one of the study's panels beside the other, as the accuracy."""
    shown = shown_panels(study, panels, runs)
    if not shown:
        return
    size = (3.6 * len(shown) + 0.6, 3.4)
    figure, axes = plt.subplots(1, len(shown), figsize=size, dpi=150, layout="constrained", squeeze=False)
    for ax, (panel, block) in zip(axes[0], shown, strict=True):
        _lines(ax, study, panel, block, metric)
        ax.set_xlabel("gradient steps", fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel(f"{label}\n(mean, 10th to 90th percentile)", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def look(i: int) -> dict[str, Any]:
    """Colour and style of a panel's line ``i``; those of a colour that has been used have a marker besides."""
    n = len(COLOURS)
    style = {"color": COLOURS[i % n], "linestyle": STYLES[i % n]}
    return style | ({"marker": MARKERS[i // n - 1], "markersize": 3, "markevery": 3} if i >= n else {})


def _lines(ax: Axes, study: Study, panel: Panel, block: Block, metric: str) -> list[tuple[list[Run], dict[str, Any]]]:
    """Draws a curve for each cell of a block; returns its runs and its style."""
    plain(ax)
    ax.set_title(f"{textwrap.fill(panel.title, TITLE)}\n(pairs {block.pairs})", fontsize=8, loc="left")
    drawn = []
    for name, done in block.runs.items():
        style = look(panel.cells.index(name)) | {"linewidth": 1.2}
        label = textwrap.fill(f"{study.cell(name).label or name} ({len(done)})", ENTRY)
        _curve(ax, done, metric, label, style)
        drawn.append((done, style))
    return drawn


def _curve(ax: Axes, runs: Sequence[Run], metric: str, label: str, style: Mapping[str, Any]) -> None:
    steps = runs[0].steps
    values = np.array([run.metrics[metric][run.evaluated] for run in runs if len(run.steps) == len(steps)])
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    ax.plot(steps, values.mean(axis=0), label=label, **style)
    ax.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _survival(ax: Axes, runs: Sequence[Run], style: Mapping[str, Any]) -> None:
    ends = np.array([run.outcome.onset if run.collapsed else run.horizon for run in runs])
    collapsed = np.array([run.collapsed for run in runs])
    times, share, low, high = statistics.kaplan_meier(ends, collapsed)
    horizon = max(run.horizon for run in runs)
    times, share, low, high = (np.append(a, a[-1] if a is not times else horizon) for a in (times, share, low, high))
    ax.step(times, share, where="post", **style)
    ax.fill_between(times, low, high, step="post", color=style["color"], alpha=0.12, linewidth=0)


def by_level(lines: Mapping[str, Mapping[float, str]], runs: Runs, label: str, path: Path, fewest: int = 1) -> None:
    """Final accuracy and share of collapses of several lines of cells, each cell at a level, with 95% intervals.

    A row of the picture is of the same pairs, ``fewest`` of them at least where there are such. A line has a gap at a
    level that has not been run. A cell of several lines is drawn once, in black: there they meet.
    """
    levels = sorted({level for cells in lines.values() for level in cells})
    of: dict[str, list[int]] = {}  # the lines of each cell, and where it stands
    place: dict[str, float] = {}
    for i, cells in enumerate(lines.values()):
        for level, name in cells.items():
            of.setdefault(name, []).append(i)
            place[name] = levels.index(level) + 0.09 * (float(np.mean(of[name])) - (len(lines) - 1) / 2)
    shown = blocks({name: runs.get(name, []) for name in of})
    shown = [block for block in shown if any(len(done) >= fewest for done in block.runs.values())] or shown
    if not shown:
        return
    size = (8, 2.9 * len(shown) + 0.7)
    figure, grid = plt.subplots(len(shown), 2, sharey="col", figsize=size, dpi=150, layout="constrained", squeeze=False)
    for (left, right), block in zip(grid, shown, strict=True):
        for i, (line, cells) in enumerate(lines.items()):
            names = [cells.get(level, "") for level in levels]
            points = [(place.get(name, math.nan), block.runs.get(name, [])) for name in names]
            own = [j for j, name in enumerate(names) if name in block.runs and len(of[name]) == 1]
            if own:
                _points((left, right), points, own, look(i) | {"marker": MARKERS[i % len(MARKERS)], "label": line})
        for name, done in block.runs.items():
            if len(of[name]) > 1:
                style = {"color": "black", "marker": MARKERS[of[name][0] % len(MARKERS)]}
                _points((left, right), [(place[name], done)], [0], style)
        left.set_ylabel("final held-out accuracy", fontsize=8)
        right.set_ylabel("share of runs that collapsed", fontsize=8)
        left.set_title(f"pairs {block.pairs}", fontsize=9, loc="left")
    for ax in grid.flat:
        ax.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        ax.set_xlabel(label, fontsize=8)
        ax.set_xlim(-0.5, len(levels) - 0.5)
        plain(ax)
    grid[0, 1].set_ylim(-0.03, 1.03)
    found = [ax.get_legend_handles_labels() for ax in grid[:, 0]]
    entries = {name: handle for handles, names in found for handle, name in zip(handles, names, strict=True)}
    order = [name for name in lines if name in entries]
    handles = [entries[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _points(
    axes: tuple[Axes, Axes],
    points: Sequence[tuple[float, Sequence[Run]]],
    marked: Sequence[int],
    style: Mapping[str, Any],
) -> None:
    """A line through runs at places, with their intervals; it has a marker at the points that are ``marked``."""
    place = [at for at, _ in points]
    barred = [i in marked and enough(done) for i, (_, done) in enumerate(points)]
    style = {**style, "markevery": marked, "markersize": 4, "linewidth": 1.1, "capsize": 2}
    for ax, measured in zip(axes, (_final, collapsed), strict=True):
        mean, low, high = np.array([measured(done) if done else (math.nan,) * 3 for _, done in points]).T
        ax.errorbar(place, mean, np.where(barred, np.maximum(0, [mean - low, high - mean]), math.nan), **style)


def _final(runs: Sequence[Run]) -> tuple[float, float, float]:
    found = mean_of(runs, "final")
    return found.mean, found.low, found.high


def collapsed(runs: Sequence[Run]) -> tuple[float, float, float]:
    """The share of the runs that collapsed, with its exact interval."""
    count = sum(run.collapsed for run in runs)
    return (count / len(runs), *statistics.clopper_pearson(count, len(runs)))


def plain(ax: Axes) -> None:
    """Axes for print: few lines, small numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.tick_params(labelsize=7)
