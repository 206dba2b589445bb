"""The monitor's remarks on runs: read off their metrics afterwards, and drawn over gradient steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlstab_jax.report.figure import COLOURS
from rlstab_jax.report.panels import literal
from rlstab_jax.report.runs import Run
from rlstab_jax.stability.monitor import CHECKS, LIVE, Check, GapCheck, MonitorConfig, Remark, review, validate
from rlstab_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX<>"


def remarks_of(run: Run) -> tuple[list[Remark], bool]:
    """What the monitor says of a run by the run's own thresholds, and whether these are known: where its manifest holds
    none that this version understands, those that a run has by default."""
    config = monitor_config(run.config.get("monitor"))
    # The monitor reads metrics of whole models; those of each layer would cost the most time.
    whole = {name: column for name, column in run.metrics.items() if name.count("/") == 1}
    return review(whole, config or LIVE), config is not None


def monitor_config(fields: Any) -> MonitorConfig | None:
    """The monitor's config of a manifest, or None if it is not one of this version."""
    if not isinstance(fields, Mapping):
        return None
    try:
        config = MonitorConfig(**{name: _value(value) for name, value in fields.items()})
        validate(config)
    except (AttributeError, KeyError, TypeError, ValueError, UserError):
        return None
    return config


def _value(value: Any) -> Any:
    """A field as `rundir.plain` wrote it: checks are dictionaries, and infinities are text."""
    if not isinstance(value, Mapping):
        return value
    if "factor" in value:
        return Check(**{**value, "factor": float(value["factor"])})
    return GapCheck(**{**value, "gap": float(value["gap"])})


def draw_timeline(runs: Sequence[tuple[str, int]], remarks: Sequence[Sequence[Remark]], x_end: float) -> "Figure":
    """A row a run, as long as the run, with a mark where a check spoke.

    Args:
      runs: name and gradient steps of each.
      remarks: on each.
      x_end: the last gradient step of all.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    spoke = [check for check in CHECKS if any(remark.check == check for said in remarks for remark in said)]
    height = 0.75 + 0.24 * len(runs)
    figure = Figure(figsize=(8.6, height), facecolor="none")
    left = min(0.45, 0.02 + 0.0095 * max(len(name) for name, _ in runs))
    ax = figure.add_axes((left, 0.5 / height, 0.98 - left, 0.24 * len(runs) / height), facecolor="none")
    for row, (_, steps) in enumerate(runs):
        ax.plot([0, steps], [row, row], color="0.9", linewidth=5, solid_capstyle="butt", zorder=1)
    for number, check in enumerate(spoke):
        places = [(remark.step, row) for row, said in enumerate(remarks) for remark in said if remark.check == check]
        x, y = zip(*places, strict=True)
        look: dict[str, Any] = {"color": COLOURS[number % 6], "marker": MARKERS[number], "linestyle": ""}
        ax.plot(x, y, label=check.replace("_", " "), markersize=6, clip_on=False, zorder=3, **look)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), [literal(name) for name, _ in runs], fontsize=8)
    ax.set_xlim(0, x_end)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    ax.tick_params(labelsize=8, length=2)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("gradient steps", fontsize=8, labelpad=2)
    figure.legend(loc="upper left", ncols=9, fontsize=8, frameon=False, columnspacing=1.4, handletextpad=0.2)
    return figure
