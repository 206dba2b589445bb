"""The sections of the page that compares runs, in its order; each is HTML made of the runs' groups."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlstab_jax.report import panels
from rlstab_jax.report.curves import Chart, Groups, charts, finite_series
from rlstab_jax.report.figure import DASHES, draw_chart
from rlstab_jax.report.html import Html, element, joined, table
from rlstab_jax.report.maps import HeatMap, draw_maps, heat_maps
from rlstab_jax.report.panels import LayerMap, Panel, plain_text
from rlstab_jax.report.runs import Group, Run, differences
from rlstab_jax.report.samples import samples_table
from rlstab_jax.report.svg import inline
from rlstab_jax.report.timeline import draw_timeline
from rlstab_jax.rundir import METRICS, describe, read_samples
from rlstab_jax.stability.monitor import ADVICE, Remark

Said = Mapping[
    Path, tuple[list[Remark], bool]
]  # by a run's path: the monitor's remarks, by thresholds of its own or not


def section(name: str, title: str, *content: str) -> Html:
    return element("section", element("h2", title, id=name), *content, aria_labelledby=name)


def metrics_of(groups: Sequence[Group]) -> Groups:
    return {group.label: [run.metrics for run in group.runs] for group in groups}


def swatch(number: int) -> Html:
    """A piece of a group's line, as the curves draw it."""
    dashes = DASHES[(number + number // 6) % 4]
    pattern = " ".join(f"{2.2 * part:g}" for part in dashes[1]) if isinstance(dashes, tuple) else None
    line = element("line", x1=0, y1=5, x2=36, y2=5, style=f"stroke: var(--c{number % 6})", stroke_dasharray=pattern)
    return element("svg", line, class_="swatch", viewBox="0 0 36 10", aria_hidden="true")


def legend(groups: Sequence[Group]) -> Html:
    """A box to tick for each group, which shows and hides its curves."""
    if len(groups) == 1:
        return Html()
    boxes = [
        element("label", element("input", type="checkbox", id=f"show{i}", checked=True), swatch(i), group.label)
        for i, group in enumerate(groups)
    ]
    return element("fieldset", element("legend", "Groups whose curves are shown"), *boxes, class_="groups")


def overview(groups: Sequence[Group], said: Said) -> Html:
    """What there is: a row for each group."""
    heads = ["group", "runs", "gradient steps", "reward of the last tenth", "held-out, training engine"]
    heads += ["held-out, inference engine", "monitor's remarks"]
    rows = []
    for i, group in enumerate(groups):
        several = len(groups) > 1
        runs = [element("div", run.name, element("small", _state(run)), title=str(run.path)) for run in group.runs]
        last = [_last_tenth(run) for run in group.runs]
        rows.append(
            [
                joined(swatch(i) if several else "", group.label),
                joined(*runs),
                _spread([run.steps for run in group.runs], "{:g}"),
                _spread(last, "{:.3f}"),
                *(_from_to(group, f"eval/accuracy_{engine}") for engine in ("training", "rollout")),
                _spread([len(said[run.path][0]) for run in group.runs], "{:.3g}"),
            ]
        )
    note = (
        "Means over the runs of a group, with the lowest and the highest. Held-out accuracy is that of the first and "
    )
    note += "of the last evaluation, sampled by the engine named."
    return section("runs", "Runs", element("p", note), table("The groups of runs", heads, rows))


def _state(run: Run) -> str:
    """Whether a run is finished, and when it was last written to if not."""
    planned = run.config.get("gradient_steps")
    if not isinstance(planned, int) or run.steps >= planned:
        return ", complete" if isinstance(planned, int) else ""
    return f", {run.steps} of {planned} steps, last written {run.written:%Y-%m-%d %H:%M} UTC"


def _last_tenth(run: Run) -> float:
    reward = finite_series(run.metrics, "reward/mean")[1]
    return float(reward[-max(1, len(reward) // 10) :].mean()) if len(reward) else np.nan


def _from_to(group: Group, metric: str) -> str:
    ends = [series[[0, -1]] for run in group.runs if len(series := finite_series(run.metrics, metric)[1])]
    if not ends:
        return "not measured"
    first, last = np.array(ends).T
    return f"{first.mean():.3f} → {_spread(last, '{:.3f}')}"


def _spread(values: Sequence[float], form: str) -> str:
    """The mean of values with their range."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "not measured"
    low, high = min(known), max(known)
    middle = form.format(float(np.mean(known)))
    return middle if low == high else f"{middle} ({form.format(low)} to {form.format(high)})"


LEARNING = (panels.REWARD, panels.LENGTH, panels.ENTROPY, panels.GRADIENT, panels.TRUNCATED)
BOTH_GAPS = (panels.GAPS, panels.LARGEST, panels.EXTREME, panels.FIRST_ORDER)
TRUST = (panels.CUT_OFF, panels.SAMPLE_SIZE, panels.SIDES)
NOTE_ON_GAPS = (
    "The training-inference discrepancy is between the two engines at equal weights, μ_old and π_old; the staleness is "
    "between the weights that sampled and those being updated, π_old and π_θ. The tails of both ratios decide how far "
    "the token-level objective can be trusted."
)
NOTE_ON_TRUST = "How much of the batch the trust region and the truncation of weights take out, and what is left of it."


def curves_of(name: str, title: str, note: str, shown: Sequence[Panel], groups: Groups, figures: Iterator[int]) -> Html:
    """A section of panels."""
    drawn = element("div", *(_panel(panel, groups, figures) for panel in shown), class_="grid")
    return section(name, title, element("p", note) if note else "", drawn)


def _panel(panel: Panel, groups: Groups, figures: Iterator[int]) -> Html:
    drawn = charts(panel, groups)
    missing = [name for name in panel.series if not any(name in chart.metrics for chart in drawn)]
    notes = [element("p", f"Not recorded: {', '.join(missing)}.", class_="note")] if missing else []
    pictures = [_chart(chart, figures) for chart in drawn]
    heading = element("h3", plain_text(panel.title))
    if not pictures:
        return element("div", heading, *notes, class_="panel")
    meanings = _meanings([name for name in panel.series if name not in missing])
    class_ = f"panel span{len(pictures)}"
    return element("div", heading, element("div", *pictures, class_="grid"), *notes, meanings, class_=class_)


def _chart(chart: Chart, figures: Iterator[int]) -> Html:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.9), facecolor="none")
    ax = figure.add_axes((0.15, 0.145, 0.83, 0.765), facecolor="none")
    draw_chart(ax, chart, chart.title)
    ax.set_xlabel("gradient steps", fontsize=8, labelpad=1)
    return element("figure", inline(figure, next(figures), spoken(chart)))


def spoken(chart: Chart) -> str:
    """What a chart shows, in words: the first and the last value of each curve."""
    said = []
    for curve in chart.curves:
        x, y = curve.seeds.x, curve.seeds.mean
        x, y = (x, y) if len(x) else curve.seeds.rest[0]
        said.append(f"{curve.label}: {y[0]:.3g} at step {x[0]:g}, {y[-1]:.3g} at step {x[-1]:g}")
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
    return element("details", element("summary", "Definitions"), element("dl", *items))


def routing(groups: Groups, figures: Iterator[int]) -> Html:
    """Disagreement of expert choices, as curves and layer by layer; and the staleness mini-batch by mini-batch."""
    shown = [_map_of(quantity, groups, figures) for quantity in panels.LAYER_MAPS]
    shown = [picture for picture in shown if picture]
    content = [_panel(panels.ROUTING, groups, figures)] if charts(panels.ROUTING, groups) else []
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
        content += [element("h3", "Mini-batch by mini-batch"), element("p", note), element("div", stale, class_="grid")]
        content += [_meanings([panels.STALENESS_MAP.metric])]
    return section("routing", "Routing", *content)


def _has_layers(group: Sequence[Mapping[str, np.ndarray]]) -> bool:
    return any(name.startswith("routing/layer_") for metrics in group for name in metrics)


def _map_of(quantity: LayerMap, groups: Groups, figures: Iterator[int]) -> Html:
    maps = [one for one in heat_maps(quantity, groups) if quantity is not panels.STALENESS_MAP or len(one.rows) > 1]
    if not maps:
        return Html()
    x_end = max(one.end for one in maps)
    return element("figure", inline(draw_maps(quantity, maps, x_end), next(figures), spoken_maps(quantity, maps)))


def spoken_maps(quantity: LayerMap, maps: Sequence[HeatMap]) -> str:
    """What heat maps show, in words: for each group the mean of its first and last row."""
    said = []
    for one in maps:
        first, last = np.nanmean(one.values[0]), np.nanmean(one.values[-1])
        said.append(f"{one.label}: {first:.3g} in {one.rows[0]}, {last:.3g} in {one.rows[-1]}")
    what = f"{quantity.title}, {quantity.unit}, by {quantity.rows} over gradient steps"
    return f"Heat map: {what}; means: {'; '.join(said)}."


def monitor(groups: Sequence[Group], said: Said, figures: Iterator[int]) -> Html:
    """The monitor's remarks on a time line, then in words."""
    runs = [run for group in groups for run in group.runs]
    remarks = [said[run.path][0] for run in runs]
    foreign = [run.name for run in runs if not said[run.path][1]]
    note = "What the monitor says by each run's own thresholds."
    if foreign:
        note += (
            f" These manifests hold none that this version knows, so the default ones are used: {', '.join(foreign)}."
        )
    if not any(remarks):
        return section("monitor", "The monitor's remarks", element("p", f"{note} It has nothing to remark."))
    figure = draw_timeline([(run.name, run.steps) for run in runs], remarks, 1.02 * max(run.steps for run in runs))
    counts = "; ".join(f"{run.name}: {len(some)}" for run, some in zip(runs, remarks, strict=True))
    picture = inline(figure, next(figures), f"Time line of remarks by run. Number of remarks: {counts}.")
    frame = element(
        "figure",
        element("div", picture, class_="wide"),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="Time line",
    )
    rows = [
        [run.name, str(one.step), one.check.replace("_", " "), one.message, one.action]
        for run, some in zip(runs, remarks, strict=True)
        for one in some
    ]
    spoke = dict.fromkeys(one.check for some in remarks for one in some)
    tries = [item for check in spoke for item in (element("dt", check.replace("_", " ")), element("dd", ADVICE[check]))]
    words = table("Remarks", ["run", "gradient step", "check", "finding", "policy"], rows)
    folded = element(
        "details",
        element("summary", f"All {len(rows)} remarks in words, and what to try"),
        words,
        element("dl", *tries),
    )
    return section("monitor", "The monitor's remarks", element("p", note), frame, folded)


def configs(groups: Sequence[Group]) -> Html:
    """The fields that differ by group, and folded away those that do not, and the commands."""
    differ, shared = differences(groups)
    heads = ["field", *(group.label for group in groups)]
    rows = [[element("code", one.field), *(_values(values) for values in one.values)] for one in differ]
    content = [table("Fields that differ", heads, rows, "values")] if rows else [element("p", "No field differs.")]
    same = [[element("code", name), element("code", value)] for name, value in shared]
    content.append(
        element(
            "details",
            element("summary", f"The {len(same)} fields that are equal"),
            table("Fields that are equal", ["field", "value"], same, "values"),
        )
    )
    commands = [
        [run.name, element("code", " ".join(map(str, run.manifest["command"])))]
        for group in groups
        for run in group.runs
        if isinstance(run.manifest.get("command"), list)
    ]
    if commands:
        content.append(
            element(
                "details", element("summary", "Commands"), table("Commands", ["run", "command"], commands, "values")
            )
        )
    return section("configs", "Configs", *content)


def _values(values: Sequence[str | None]) -> Html:
    shown = [element("em", "absent") if value is None else element("code", value) for value in values]
    return Html(", ".join(shown))


def responses(groups: Sequence[Group]) -> Html:
    """What the models wrote, folded away run by run."""
    items = []
    for group in groups:
        for run in group.runs:
            samples = read_samples(run.path)
            content = samples_table(run.name, samples) if samples else element("p", "No responses were logged.")
            items.append(element("details", element("summary", run.name), content, open=not items))
    note = "At four steps of each run, the logged responses with the highest and with the lowest reward."
    return section("samples", "Samples", element("p", note), *items)
