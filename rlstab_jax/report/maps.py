"""Heat maps over training: what each layer's routing does, and how stale each mini-batch is."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from rlstab_jax.report.curves import Groups, Metrics
from rlstab_jax.report.panels import LayerMap, X, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

COLUMNS = 160  # steps that a map shows at most; neighbours are averaged
DECADES = 4  # a logarithmic scale of colours shows so many
COLOUR_MAP = "cividis"  # even in lightness, and the same to colour-blind readers


class HeatMap(NamedTuple):
    """Values of one group [row, column], NaN where not measured, over the gradient steps from ``start`` to ``end``.

    ``rows`` are the numbers of the layers or mini-batches; the columns are equally long stretches of steps.
    """

    label: str
    rows: list[int]
    start: float
    end: float
    values: Float[np.ndarray, "row column"]


def heat_maps(quantity: LayerMap, groups: Groups) -> list[HeatMap]:
    """The map of each group that has the quantity: the mean over those of its seeds that have reached a step."""
    pattern = re.compile(re.escape(quantity.metric).replace("NN", r"(\d+)"))
    maps = []
    for label, group in groups.items():
        names = {int(match[1]): name for metrics in group for name in metrics if (match := pattern.fullmatch(name))}
        rows = sorted(names)
        measured = [_measured(metrics, [names[row] for row in rows]) for metrics in group] if rows else []
        measured = [(x, values) for x, values in measured if len(x)]
        if measured:
            maps.append(_over_seeds(label, rows, measured))
    return maps


def _measured(metrics: Metrics, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which any of the metrics was measured, and their values [row, step]."""
    x = metrics[X]
    values = np.array([metrics.get(name, np.full(len(x), np.nan)) for name in names], np.float64)
    values[~np.isfinite(values)] = np.nan
    kept = ~np.isnan(values).all(0) & np.isfinite(x)
    return x[kept], values[:, kept]


def _over_seeds(label: str, rows: list[int], measured: Sequence[tuple[np.ndarray, np.ndarray]]) -> HeatMap:
    """The mean over seeds on a grid of even steps, on which a step that was not measured leaves a gap."""
    steps = np.unique(np.concatenate([x for x, _ in measured]))
    length = float(np.diff(steps).min(initial=np.inf)) if len(steps) > 1 else max(float(steps[0]), 1.0)
    columns = round((steps[-1] - steps[0]) / length) + 1
    seeds = np.full((len(measured), len(rows), columns), np.nan)
    for seed, (x, values) in zip(seeds, measured, strict=True):
        seed[:, np.round((x - steps[0]) / length).astype(int)] = values
    values = _mean(seeds)
    if columns > COLUMNS:
        edges = np.linspace(0, columns, COLUMNS + 1).round().astype(int)
        parts = np.split(np.arange(columns), edges[1:-1])
        values = np.stack([_mean(values[:, part].T) for part in parts], axis=1)
    return HeatMap(label, rows, float(steps[0] - length), float(steps[-1]), values)


def _mean(values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "..."]:
    """The mean over the first axis of what was measured; NaN where nothing was."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)


def draw_maps(quantity: LayerMap, maps: Sequence[HeatMap], x_end: float, named: bool) -> "Figure":
    """The maps of all groups below each other, on one scale of colours and one of steps; ``named`` by their labels."""
    from matplotlib.figure import Figure

    least = 0.34 if len(maps) > 1 else 0.6
    heights = [min(max(0.13 * len(one.rows), least), 1.5) for one in maps]
    bottom, gap, top = 1.0, 0.22, 0.24
    height = bottom + sum(heights) + gap * len(maps) + top
    figure = Figure(figsize=(4.2, height), facecolor="none")
    figure.text(0.02, 1 - 0.13 / height, quantity.title, fontsize=9, va="center")
    norm = _norm(quantity, maps)
    place = height - top
    for one, tall in zip(maps, heights, strict=True):
        place -= gap + tall
        ax = figure.add_axes((0.12, place / height, 0.85, tall / height))
        last = one is maps[-1]
        _draw_map(ax, one, norm, x_end, quantity.rows, labelled=last, named=named)
    _colour_bar(figure.add_axes((0.12, 0.46 / height, 0.85, 0.1 / height)), norm, quantity.unit)
    return figure


def _norm(quantity: LayerMap, maps: Sequence[HeatMap]) -> "Normalize":
    """One scale for all maps."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([one.values.ravel() for one in maps])
    values = values[np.isfinite(values)]
    highest = float(values.max(initial=0.0))
    if quantity.log and highest > 0:
        lowest = max(float(values[values > 0].min()), highest * 10.0**-DECADES)
        return LogNorm(min(lowest, highest / 10), highest, clip=True)
    return Normalize(min(0.0, float(values.min(initial=0.0))), highest or 1.0)


def _draw_map(
    ax: "Axes", one: HeatMap, norm: "Normalize", x_end: float, rows: str, labelled: bool, named: bool
) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    extent = (one.start, one.end, len(one.rows) - 0.5, -0.5)
    values = np.ma.masked_invalid(one.values)
    ax.imshow(values, norm=norm, cmap=COLOUR_MAP, aspect="auto", interpolation="none", extent=extent)
    if named:
        ax.set_title(literal(one.label), fontsize=8, loc="left", pad=2.5)
    ax.set_xlim(0, x_end)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    few = len(one.rows) <= 4
    shown = range(len(one.rows)) if few else [0, len(one.rows) - 1]
    ax.yaxis.set_major_locator(FixedLocator(list(shown)))
    ax.set_yticklabels([str(one.rows[i]) for i in shown])
    ax.tick_params(labelsize=7.5, labelbottom=labelled, length=2)
    ax.spines[:].set_visible(False)
    if labelled:
        ax.set_xlabel("gradient steps", fontsize=8, labelpad=1)
        ax.set_ylabel(rows, fontsize=7.5)


def _colour_bar(ax: "Axes", norm: "Normalize", unit: str) -> None:
    """A strip of the colours with their values; one image, where matplotlib's own bar has 256 shapes."""
    strip = np.linspace(0, 1, 128)[None]
    ax.imshow(strip, cmap=COLOUR_MAP, aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    places = np.array([0, 0.25, 0.5, 0.75, 1])
    ax.set_xticks(places, [f"{value:.2g}" for value in np.asarray(norm.inverse(places))], fontsize=7.5)
    ax.set_yticks([])
    ax.tick_params(length=2)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(unit, fontsize=8, labelpad=1)
