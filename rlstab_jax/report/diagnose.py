"""The picture of a diagnosis: how far the engines are apart for each number format, and what the routing adds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlstab_jax.report.figure import COLOURS, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]  # the fields of training.diagnose.Gaps as a dictionary
MARKERS = "osD^vP"
SMALLEST = 1e-8  # nats: below it a KL in float32 is rounding


def draw_diagnosis(rows: Sequence[Row], path: str | os.PathLike, title: str) -> None:
    """Draws the gaps of each precision as a PNG of 1,500 pixels' width; written aside and renamed.

    Args:
      rows: one for each precision, fields as in `rlstab_jax.training.diagnose.Gaps`.
      path: of the picture.
      title: the line above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    (kl, ratio), (disagreement, margin) = figure.subplots(2, 2)
    names = [str(row["precision"]) for row in rows]
    _kl(kl, rows, names)
    _bars(ratio, [row["f2"] for row in rows], names)
    ratio.set_title("Extreme ratios, F(2)", fontsize=9, loc="left")
    ratio.set_xlabel("share of tokens with max(r, 1/r) > 2; in figures, its largest", fontsize=8)
    for i, row in enumerate(rows):
        ratio.annotate(f" {row['max_ratio']:.3g}", (row["f2"], i), va="center", fontsize=7.5)
    ratio.set_xlim(0, 1.25 * max([row["f2"] for row in rows], default=0) or 1.0)
    _layers(disagreement, rows, "disagreement", "share of top-k expert sets")
    disagreement.set_title("Routing disagreement of the engines", fontsize=9, loc="left")
    disagreement.set_ylim(bottom=0)
    _layers(margin, rows, "first_margin", "router probability")
    _layers(
        margin, rows[:1], "margin", "router probability", label="all tokens", color="0.3", marker="", linestyle="--"
    )
    margin.set_title("Margin of tokens that flip first, and of all", fontsize=9, loc="left")
    margin.set_ylim(bottom=0)
    handles, labels = disagreement.get_legend_handles_labels()
    more, name = margin.get_legend_handles_labels()
    if handles:
        figure.legend([*handles, more[-1]], [*labels, name[-1]], loc="outside lower center", ncols=7, fontsize=8)
    save_png(figure, Path(path))


def _kl(ax: "Axes", rows: Sequence[Row], names: Sequence[str]) -> None:
    """Live and replayed KL of each precision; between them lies what the routing adds."""
    ax.set_title(r"KL($\mu_{old}$ || $\pi_{old}$), k3", fontsize=9, loc="left")
    ax.set_xlabel(f"nats per token (drawn at {SMALLEST:g} where smaller)", fontsize=8)
    ax.set_xscale("log")
    places = np.arange(len(rows))
    live = np.maximum([row["k3"] for row in rows], SMALLEST)
    replayed = np.maximum([row["k3_replayed"] for row in rows], SMALLEST)
    if max(live, default=SMALLEST) == SMALLEST:  # equal engines alone: no range to draw
        ax.set_xlim(SMALLEST / 10, SMALLEST * 10)
    ax.hlines(places, replayed, live, color="0.7", linewidth=3, zorder=1)
    ax.plot(live, places, "o", color=COLOURS[0], label="live routing")
    ax.plot(replayed, places, "D", color=COLOURS[1], label="the sampler's routes replayed")
    for place, row in enumerate(rows):
        if row["k3"] > SMALLEST and np.isfinite(row["routing_k3"]):
            share = f"routing {row['routing_k3'] / row['k3']:.0%}"
            ax.annotate(share, (live[place], place), (6, 4), textcoords="offset points", fontsize=7)
    _name_rows(ax, names)
    ax.margins(x=0.15)
    ax.legend(fontsize=7, framealpha=0.8, edgecolor="none")


def _bars(ax: "Axes", values: Sequence[float], names: Sequence[str]) -> None:
    ax.barh(np.arange(len(values)), values, color=COLOURS[0], height=0.55)
    _name_rows(ax, names)


def _name_rows(ax: "Axes", names: Sequence[str]) -> None:
    ax.set_yticks(np.arange(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    _plain(ax)


def _layers(ax: "Axes", rows: Sequence[Row], field: str, unit: str, **style: Any) -> None:
    """One line a precision over the depth of the MoE layers."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("MoE layer", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    for i, row in enumerate(rows):
        values = [layer[field] for layer in row["layers"]]
        if np.isfinite(values).any():
            look = {
                "label": row["precision"],
                "color": COLOURS[i % 6],
                "marker": MARKERS[i % 6],
                "linestyle": "-",
                "clip_on": False,
            }
            ax.plot(np.arange(len(values)), values, linewidth=1.2, markersize=4, **(look | style))
    if not ax.lines:
        said = "nothing differs" if any(row["layers"] for row in rows) else "no routed layers"
        ax.text(0.5, 0.5, said, transform=ax.transAxes, ha="center", va="center", fontsize=8, color="0.45")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(ax)


def _plain(ax: "Axes") -> None:
    ax.tick_params(labelsize=7.5)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
