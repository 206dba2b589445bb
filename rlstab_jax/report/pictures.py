"""The page's pictures: panels of curves and heat maps, each with words for readers who do not see it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlstab_jax.metrics import METRICS, describe
from rlstab_jax.report import panels
from rlstab_jax.report.curves import Chart, Groups, charts
from rlstab_jax.report.figure import draw_chart
from rlstab_jax.report.maps import HeatMap, draw_maps, heat_maps
from rlstab_jax.report.markup import Html, element, folded, section, subscripted
from rlstab_jax.report.panels import LayerMap, Panel, plain_text
from rlstab_jax.report.svg import inline

LEARNING = (panels.REWARD, panels.LENGTH, panels.ENTROPY, panels.GRADIENT, panels.TRUNCATED)
BOTH_GAPS = (panels.GAPS, panels.LARGEST, panels.EXTREME, panels.FIRST_ORDER)
TRUST = (panels.CUT_OFF, panels.WEIGHT, panels.SIDES, panels.SAMPLE_SIZE)
NOTE_ON_GAPS = (
    "The training-inference discrepancy is between the two engines at equal weights, μ_old and π_old; the staleness is "
    "between the weights that sampled and those being updated, π_old and π_θ. The tails of both ratios decide how far "
    "the token-level objective can be trusted."
)
NOTE_ON_TRUST = "How much of the batch the trust region and the truncation of weights take out, and what is left of it."


def curves_of(name: str, title: str, note: str, shown: Sequence[Panel], groups: Groups, figures: Iterator[int]) -> Html:
    """A section of panels."""
    drawn = element("div", *(_panel(panel, groups, figures) for panel in shown), class_="grid")
    return section(name, title, element("p", subscripted(note)) if note else "", drawn)


def _panel(panel: Panel, groups: Groups, figures: Iterator[int]) -> Html:
    drawn = charts(panel, groups)
    missing = [name for name in panel.series if not any(name in chart.metrics for chart in drawn)]
    notes = [element("p", f"Not recorded: {', '.join(missing)}.", class_="note")] if missing else []
    pictures = [_chart(chart, figures) for chart in drawn]
    heading = element("h3", subscripted(plain_text(panel.title)))
    if not pictures:
        return element("div", heading, *notes, class_="panel")
    meanings = _meanings([name for name in panel.series if name not in missing])
    class_ = f"panel span{len(pictures)}"
    return element("div", heading, element("div", *pictures, class_="grid"), *notes, meanings, class_=class_)


def _chart(chart: Chart, figures: Iterator[int]) -> Html:
    from matplotlib.figure import Figure

    titled = all(curve.group is not None for curve in chart.curves)  # and so are the charts beside it
    figure = Figure(figsize=(3.9, 2.6), facecolor="none")
    ax = figure.add_axes((0.165, 0.155, 0.815, 0.745 if titled else 0.825), facecolor="none")
    draw_chart(ax, chart, chart.title)
    ax.set_xlabel("gradient steps", fontsize=8, labelpad=1)
    unseen = [curve.label + curve.note for curve in chart.curves if titled and chart.log and curve.note]
    caption = element("figcaption", f"Not on this axis: {', '.join(unseen)}.") if unseen else ""
    return element("figure", inline(figure, next(figures), spoken(chart)), caption)


def spoken(chart: Chart) -> str:
    """What a chart shows, in words: the first and the last value of each curve."""
    said = []
    for curve in chart.curves:
        alone = curve.seeds.rest[:1]
        x, y = (curve.seeds.x, curve.seeds.mean) if len(curve.seeds.x) or not alone else alone[0]
        ends = f": {y[0]:.3g} at step {x[0]:g}, {y[-1]:.3g} at step {x[-1]:g}" if len(x) else ""
        said.append(f"{curve.label}{curve.note}{ends}")
    what = ": ".join(filter(None, (chart.panel, chart.title)))
    return plain_text(f"{what}, {chart.unit}, over gradient steps. {'; '.join(said)}.")


def _meanings(names: Sequence[str]) -> Html:
    """Definitions of metrics, folded away."""
    items = []
    for name in names:
        metric = METRICS[name] if name in METRICS else describe(name)
        items += [
            element("dt", element("code", name)),
            element("dd", f"{metric.meaning}; {metric.reduction}; {metric.unit}"),
        ]
    return folded("Definitions", element("dl", *items), class_="small")


def routing(groups: Groups, figures: Iterator[int]) -> Html:
    """Disagreement of expert choices, as curves and layer by layer; and the staleness mini-batch by mini-batch."""
    shown = [_map_of(quantity, groups, figures) for quantity in panels.LAYER_MAPS]
    shown = [picture for picture in shown if picture]
    disagreement = element("div", _panel(panels.ROUTING, groups, figures), class_="grid")
    content = [disagreement] if charts(panels.ROUTING, groups) else []
    if shown:
        names = [quantity.metric for quantity in panels.LAYER_MAPS]
        note = "Means over the seeds of a group that have reached a step. Layers in order of depth, from the top down."
        content += [
            element("h3", "Layer by layer"),
            element("p", note),
            element("div", *shown, class_="grid"),
            _meanings(names),
        ]
        without = [label for label, group in groups.items() if not _has_layers(group)]
        content += [element("p", f"Without routed layers: {', '.join(without)}.", class_="note")] if without else []
    if not content:
        content = [element("p", "No run has routed layers, or none has recorded what they do.")]
    stale = _map_of(panels.STALENESS_MAP, groups, figures)
    if stale:
        note = "The mini-batches of a global step in the order of their updates: each sees weights further from π_old."
        content += [
            element("h3", "Mini-batch by mini-batch"),
            element("p", subscripted(note)),
            element("div", stale, class_="grid"),
        ]
        content += [_meanings([panels.STALENESS_MAP.metric])]
    return section("routing", "Routing", *content)


def _has_layers(group: Sequence[Mapping[str, np.ndarray]]) -> bool:
    return any(name.startswith("routing/layer_") for metrics in group for name in metrics)


def _map_of(quantity: LayerMap, groups: Groups, figures: Iterator[int]) -> Html:
    maps = [one for one in heat_maps(quantity, groups) if quantity is not panels.STALENESS_MAP or len(one.rows) > 1]
    if not maps:
        return Html()
    x_end = max(one.end for one in maps)
    return element(
        "figure",
        inline(draw_maps(quantity, maps, x_end, named=len(groups) > 1), next(figures), spoken_maps(quantity, maps)),
    )


def spoken_maps(quantity: LayerMap, maps: Sequence[HeatMap]) -> str:
    """What heat maps show, in words: for each group the mean of its first and last row."""
    said = []
    for one in maps:
        ends = [(row, values[np.isfinite(values)]) for row, values in ((one.rows[i], one.values[i]) for i in (0, -1))]
        means = [f"{values.mean():.3g} in {row}" if len(values) else f"none in {row}" for row, values in ends]
        said.append(f"{one.label}: {', '.join(means)}")
    what = f"{quantity.title}, {quantity.unit}, by {quantity.rows} over gradient steps"
    return f"Heat map: {what}; means: {'; '.join(said)}."
