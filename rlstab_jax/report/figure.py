"""Curves as matplotlib draws them, and the picture of a run or of several: is it learning, is it stable, and if not,
which gap grew first."""

import io
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rlstab_jax.report.curves import MARKED, Chart, Curve, Groups, charts, thinned
from rlstab_jax.report.panels import PANELS, Panel, X, literal
from rlstab_jax.rundir import write_aside
from rlstab_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; the dashes tell them apart in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
FEW = 12  # points of a group's curve that are marked; more would hide other curves
LOOKS = 24  # curves that colour and dashes together tell apart
MAKER = "rlstab report"  # in a picture's and a page's description, by which a later report knows its own

HEAVY = "Heavy lines: running mean where there are many points. Light lines: every step."
SMOOTH = "Lines: running mean where there are many points."
BANDS = (
    "Lines: mean over seeds (geometric on logarithmic axes), smoothed where there are many points. Bands: from the "
    "lowest to the highest seed. Thin lines: seeds that have gone further than others of their group."
)


def look_of(number: int) -> dict[str, Any]:
    """Colour and dashes of a curve: different ones for each number below `LOOKS`."""
    return {"color": COLOURS[number % 6], "linestyle": DASHES[(number + number // 6) % 4]}


def draw_run(metrics: Mapping[str, Float[np.ndarray, "step"]], path: str | os.PathLike, title: str) -> None:
    """Draws a run's curves over its gradient steps, as a PNG of 1,200 pixels' width.

    Args:
      metrics: columns [global_step] by name, NaN where absent, as `rundir.read_metrics` gives them. A panel without any
        of its metrics says so.
      path: where the picture goes; written aside and renamed.
      title: the line above it.

    Raises:
      UserError: metrics without progress/gradient_steps, the x axis.
    """
    draw_runs({title: [metrics]}, path, title)


def draw_runs(groups: Groups, path: str | os.PathLike, title: str) -> None:
    """Draws the curves of runs as a PNG: one group's panel by panel, and several groups' metric by metric.

    Args:
      groups: the metrics of the runs of each group, which differ only in their seed, by the group's name.
      path, title: as in `draw_run`, and so is what it raises.
    """
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    if any(metrics and X not in metrics for group in groups.values() for metrics in group):
        raise UserError(f"the metrics hold no {X}: give the metrics of a training run")
    alone = len(groups) == 1
    drawn: list[Chart | Panel] = []
    for panel in PANELS:
        shown = charts(panel, groups)
        drawn += shown if shown or not alone else [panel]
    columns = 2 if alone else 3
    rows = max(1, math.ceil(len(drawn) / columns))
    size = (8, 10) if alone else (11, 2.45 * rows + 0.7 + 0.25 * math.ceil(len(groups) / 3))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    if alone:
        figure.suptitle(literal(title), fontsize=11, fontweight="bold")
    seeds = max((len(group) for group in groups.values()), default=1)
    words = BANDS if seeds > 1 else HEAVY if alone else SMOOTH
    figure.supxlabel(textwrap.fill(words, 120 if alone else 160), fontsize=7)
    axes = figure.subplots(rows, columns, squeeze=False)
    for item, ax in zip(drawn, axes.flat, strict=False):
        if isinstance(item, Chart):
            draw_chart(ax, item, f"{item.panel}\n{item.title}".strip())
        else:
            _draw_nothing(ax, item)
    for ax in list(axes.flat)[len(drawn) :]:
        ax.set_axis_off()
    for i in range(min(columns, len(drawn))):
        last = max(k for k in range(len(drawn)) if k % columns == i)
        axes.flat[last].set_xlabel("gradient steps", fontsize=8)
    figure.align_ylabels(axes)
    if not alone:
        lines = _samples_of_lines(list(groups))
        legend = figure.legend(handles=lines, loc="outside upper center", ncols=3, fontsize=8, handlelength=3)
        legend.set_title(literal(title), FontProperties(weight="bold"))
        legend.set_frame_on(False)
    save_png(figure, Path(path))


def save_png(figure: "Figure", path: Path) -> None:
    """Writes the picture aside and renames it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data, metadata={"Software": MAKER})
    write_aside(path, data.getvalue())


def draw_chart(ax: "Axes", chart: Chart, title: str) -> None:
    """Draws a chart under a title; with a legend where its curves need one."""
    _prepare(ax, title, chart.unit, chart.x_end)
    for curve in chart.curves:
        _draw_curve(ax, curve, band=0.2 if len(chart.curves) < 5 else 0.1)
    if chart.log:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        bottom, top = chart.y_limits
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if top < 300 * bottom else (1.0,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(*chart.y_limits)
    if chart.legend:
        ax.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="none", handlelength=2.6, borderpad=0.2)


def _prepare(ax: "Axes", title: str, unit: str, x_end: float) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylabel(unit, fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, x_end)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _draw_nothing(ax: "Axes", panel: Panel) -> None:
    _prepare(ax, panel.title, panel.unit, 1.02)
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", fontsize=8, color="0.45")
    ax.set_yticks([])


def _draw_curve(ax: "Axes", curve: Curve, band: float) -> None:
    """Band and light lines below, the mean above. What belongs to a group carries its number as an id; ``band`` is the
    opacity of the band."""
    seeds, look = curve.seeds, look_of(curve.look)
    gid = None if curve.group is None else f"g{curve.group}"
    if curve.raw is not None:
        ax.plot(*thinned(*curve.raw), color=look["color"], linewidth=0.6, alpha=0.35)
    if (seeds.high > seeds.low).any():
        x, low = thinned(seeds.x, seeds.low)
        high = seeds.high[np.searchsorted(seeds.x, x)]
        ax.fill_between(x, low, high, color=look["color"], alpha=band, linewidth=0, gid=gid)
    for x, y in seeds.rest:
        ax.plot(*thinned(x, y), linewidth=0.8, alpha=0.8, gid=gid, **look)
    x, y = thinned(seeds.x, seeds.mean)
    marked = 0 < len(x) <= (MARKED if curve.group is None else FEW)
    look |= {"marker": "o" if marked else None, "markersize": 2.5, "linewidth": 1.4}
    ax.plot(x, y, label=curve.label + curve.note, gid=gid, **look)


def _samples_of_lines(labels: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], linewidth=1.6, label=literal(label), **look_of(i)) for i, label in enumerate(labels)]
