"""The page's words: what runs there are, the monitor's remarks, the configs' differences, the samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlstab_jax.report.curves import Groups, finite_series
from rlstab_jax.report.figure import DASHES
from rlstab_jax.report.markup import Html, element, folded, joined, section, table
from rlstab_jax.report.runs import Difference, Group, Run, differences
from rlstab_jax.report.samples import samples_table
from rlstab_jax.report.svg import inline
from rlstab_jax.report.timeline import draw_timeline
from rlstab_jax.stability.monitor import ADVICE, Remark

FEW = 8  # remarks that are not folded away
Said = Mapping[
    Path, tuple[list[Remark], bool]
]  # by a run's path: the monitor's remarks, by thresholds of its own or not


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
    return element("div", *boxes, class_="groups", role="group", aria_label="Groups whose curves are shown")


def overview(groups: Sequence[Group], said: Said) -> Html:
    """What there is: a row for each group."""
    heads = ["group", "runs", "gradient steps", "reward of the last tenth", "held-out, training engine"]
    heads += ["held-out, inference engine", "monitor's remarks"]
    rows = []
    for i, group in enumerate(groups):
        runs = [
            element("div", run.name, element("small", _state(run) + survived(run.metrics)), title=str(run.path))
            for run in group.runs
        ]
        rows.append(
            [
                joined(swatch(i) if len(groups) > 1 else "", group.label),
                joined(*runs),
                _spread([run.steps for run in group.runs], "{:g}"),
                _spread([_last_tenth(run) for run in group.runs], "{:.3f}"),
                _from_to(group, "eval/accuracy_training"),
                _from_to(group, "eval/accuracy_rollout"),
                _spread([len(said[run.path][0]) for run in group.runs], "{:.3g}"),
            ]
        )
    note = "Held-out accuracy is that of the first and of the last evaluation, sampled by the engine named."
    if any(len(group.runs) > 1 for group in groups):
        note = f"Means over the runs of a group, with the lowest and the highest. {note}"
    return section("runs", "Runs", element("p", note), table("The groups of runs", heads, rows))


def _state(run: Run) -> str:
    """Whether a run is finished, and when it was last written to if not."""
    planned = run.config.get("gradient_steps")
    if not isinstance(planned, int):
        return ""
    if run.steps >= planned:
        return ", complete"
    return f", {run.steps} of {planned} steps, last written {run.written:%Y-%m-%d %H:%M} UTC"


def survived(metrics: Mapping[str, np.ndarray]) -> str:
    """In how many steps something went wrong and the run went on; curves leave out what is no finite number."""
    steps = np.isfinite(metrics.get("reward/mean", np.array([])))

    def times(what: str, name: str, wrong: Callable[[np.ndarray], np.ndarray]) -> str:
        count = int((steps & wrong(metrics[name])).sum()) if name in metrics else 0
        return f"; {what} in {count} step{'s' * (count > 1)}" if count else ""

    return (
        times("tokens that are no finite number", "learner/broken", lambda x: x > 0)
        + times("a gradient that is none", "learner/grad_norm", lambda x: ~np.isfinite(x))
        + times("failed verdicts", "reward/verifier_failures", lambda x: x > 0)
    )


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
    low, high = form.format(min(known)), form.format(max(known))
    middle = form.format(float(np.mean(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def monitor(groups: Sequence[Group], said: Said, figures: Iterator[int]) -> Html:
    """The monitor's remarks on a time line, then in words."""
    runs = [run for group in groups for run in group.runs]
    remarks = [said[run.path][0] for run in runs]
    foreign = [run.name for run in runs if not said[run.path][1]]
    note = "What the monitor says by each run's own thresholds."
    if foreign:
        which = ", ".join(foreign) if len(foreign) < 4 else f"{len(foreign)} of {len(runs)} runs"
        note += f" The default ones where a manifest holds none that this version knows: {which}."
    if not any(remarks):
        return section("monitor", "The monitor's remarks", element("p", f"{note} It has nothing to remark."))
    figure = draw_timeline([(run.name, run.steps) for run in runs], remarks, 1.02 * max(run.steps for run in runs))
    counts = "; ".join(f"{run.name}: {len(some)}" for run, some in zip(runs, remarks, strict=True))
    picture = inline(figure, next(figures), f"Time line of remarks by run. Number of remarks: {counts}.")
    wide = element("div", picture, class_="wide")
    frame = element("figure", wide, class_="scroll", tabindex=0, role="region", aria_label="Time line")
    rows = [
        [run.name, str(one.step), _words(one.check), one.message, one.action]
        for run, some in zip(runs, remarks, strict=True)
        for one in some
    ]
    spoke = dict.fromkeys(one.check for some in remarks for one in some)
    tries = [item for check in spoke for item in (element("dt", _words(check)), element("dd", ADVICE[check]))]
    words = table("Remarks", ["run", "gradient step", "check", "finding", "policy"], rows, "remarks")
    count = f"All {len(rows)} remarks in words, and what to try" if len(rows) > 1 else "The remark, and what to try"
    inwords = element("details", element("summary", count), words, element("dl", *tries), open=len(rows) <= FEW)
    return section("monitor", "The monitor's remarks", element("p", note), frame, inwords)


def _words(check: str) -> str:
    return check.replace("_", " ")


def configs(groups: Sequence[Group]) -> Html:
    """The fields that differ by group, and folded away those that do not, and the commands."""
    differ, shared = differences(groups)
    same = [[element("code", name), element("code", value)] for name, value in shared]
    commands = [
        [run.name, element("code", " ".join(map(str, run.manifest["command"])))]
        for group in groups
        for run in group.runs
        if isinstance(run.manifest.get("command"), list)
    ]
    return section(
        "configs",
        "Configs",
        _difference_table(groups, differ) if differ else element("p", "No field differs."),
        folded(
            f"The {len(same)} fields that are equal", table("Fields that are equal", ["field", "value"], same, "values")
        ),
        folded("Commands", table("Commands", ["run", "command"], commands, "values")) if commands else "",
    )


def _difference_table(groups: Sequence[Group], differ: Sequence[Difference]) -> Html:
    """A row for each field and a column for each group, or the other way round where that is narrower."""
    fields = [element("code", one.field) for one in differ]
    cells = [[_values(values) for values in one.values] for one in differ]
    labels = [group.label for group in groups]
    if len(groups) > len(differ):
        rows = [[label, *(field[i] for field in cells)] for i, label in enumerate(labels)]
        return table("Fields that differ", ["group", *fields], rows, "values")
    return table(
        "Fields that differ", ["field", *labels], [[f, *row] for f, row in zip(fields, cells, strict=True)], "values"
    )


def _values(values: Sequence[str | None]) -> Html:
    return Html(", ".join(element("em", "absent") if value is None else element("code", value) for value in values))


def responses(groups: Sequence[Group]) -> Html:
    """What the models wrote, folded away run by run."""
    items: list[Html] = []
    for run in (run for group in groups for run in group.runs):
        content = samples_table(run.name, run.samples) if run.samples else element("p", "No responses were logged.")
        items.append(element("details", element("summary", run.name), content, open=not items))
    note = "At four steps of each run, the logged responses with the highest and with the lowest reward."
    return section("samples", "Samples", element("p", note), *items)
