"""One picture of one run: is it learning, is it stable, and if not, which gap grew first."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlstab_jax.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Mapping[str, Float[np.ndarray, "step"]]

X = "progress/gradient_steps"
# Okabe and Ito's colours, told apart by colour-blind readers; the dashes tell them apart in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
DECADES = 7  # a logarithmic axis shows at most so many: what lies below is rounding error
MARKED = 40  # series of more points are smoothed, others show each point


class Panel(NamedTuple):
    """Series of one unit that are read together: metric name -> label. An axis that is not logarithmic begins at 0."""

    title: str
    unit: str
    series: dict[str, str]
    log: bool = False


MU_OLD, PI_OLD, PI = r"$\mu_{old}$", r"$\pi_{old}$", r"$\pi_\theta$"
PANELS = (
    Panel(
        "Reward and held-out accuracy",
        "mean reward",
        {
            "reward/mean": "reward, training prompts",
            "eval/accuracy_rollout": "held-out, inference engine",
            "eval/accuracy_training": "held-out, training engine",
        },
    ),
    Panel(f"Entropy of {PI_OLD}", "nats per token", {"policy/entropy": "entropy"}),
    Panel(
        "The two gaps",
        "KL (k3), nats per token",
        {
            "discrepancy/k3": f"discrepancy, {MU_OLD} to {PI_OLD}",
            "discrepancy_live/k3": "the same with live routing",
            "staleness/k3": f"staleness, {PI_OLD} to {PI}",
        },
        log=True,
    ),
    Panel(
        "Routing disagreement",
        "share of top-k expert sets",
        {"routing/rollout_vs_old": f"{MU_OLD} against {PI_OLD}", "routing/old_vs_target": f"{PI_OLD} against {PI}"},
    ),
    Panel(
        "Largest ratio of a step",
        "ratio",
        {
            "discrepancy/max_ratio": f"{PI_OLD} / {MU_OLD}",
            "staleness/max_ratio": f"{PI} / {PI_OLD}",
            "weight/max": "weight in the loss",
        },
        log=True,
    ),
    Panel(
        "Tokens cut off",
        "share of tokens",
        {"trust/masked": "gradient stopped by the trust region", "weight/truncated": "weight truncated"},
    ),
    Panel("Gradient norm before clipping", "global L2 norm", {"learner/grad_norm": "norm"}, log=True),
    Panel("Response length", "tokens", {"response/length": "training", "eval/response_length": "held-out"}),
)


def draw_run(metrics: Metrics, path: str | os.PathLike, title: str) -> None:
    """Draws a run's curves over its gradient steps, as a PNG of 1,200 pixels' width.

    Args:
      metrics: columns [global_step] by name, NaN where absent, as `rundir.read_metrics` gives them. A panel without any
        of its metrics says so.
      path: where the picture goes; written aside and renamed.
      title: the line above it.

    Raises:
      UserError: metrics without progress/gradient_steps, the x axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if metrics and X not in metrics:
        raise UserError(f"the metrics hold no {X}: give the metrics of a training run")
    x = np.asarray(metrics.get(X, []), np.float64)
    figure = Figure(figsize=(8, 10), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel("Heavy lines: running mean where there are many points. Light lines: every step.", fontsize=7)
    axes = figure.subplots(4, 2)
    for panel, ax in zip(PANELS, axes.flat, strict=True):
        _draw_panel(ax, panel, x, metrics)
    for ax in axes[-1]:
        ax.set_xlabel("gradient steps", fontsize=8)
    figure.align_ylabels(axes)
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    canvas.print_png(aside)
    os.replace(aside, path)


def _draw_panel(ax: "Axes", panel: Panel, x: np.ndarray, metrics: Metrics) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    ax.set_title(panel.title, fontsize=9, loc="left")
    ax.set_ylabel(panel.unit, fontsize=8)
    ax.tick_params(labelsize=7.5)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, 1.02 * x.max(initial=1.0))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    present = [name for name in panel.series if name in metrics and np.isfinite(metrics[name]).any()]
    if not present:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", fontsize=8, color="0.45")
        ax.set_yticks([])
        return
    highest = max(np.nanmax(metrics[name], where=np.isfinite(metrics[name]), initial=0.0) for name in present)
    log = panel.log and highest > 0
    for name, colour, dashes in zip(panel.series, COLOURS, DASHES, strict=False):
        if name in present:
            _draw_series(ax, x, metrics[name], panel.series[name], log, color=colour, linestyle=dashes)
    if log:
        ax.set_yscale("log")
        bottom, top = ax.get_ylim()
        bottom = max(bottom, highest * 10.0**-DECADES)
        ax.set_ylim(bottom, top)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if top < 300 * bottom else (1.0,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, 1.2 * highest or 1.0)  # with room for the legend
    if len(panel.series) > 1:
        ax.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="none", handlelength=2.6, borderpad=0.2)


def _draw_series(ax: "Axes", x: np.ndarray, values: np.ndarray, label: str, log: bool, **style: Any) -> None:
    """Draws the finite values of one metric, on a logarithmic axis the positive ones."""
    finite = np.isfinite(values) & np.isfinite(x)
    if not values[finite].any():
        label += " (0 throughout)"
    shown = finite & (values > 0) if log else finite
    x, y = x[shown], values[shown]
    if len(y) > MARKED:
        ax.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.35)
        y = np.exp(_running_mean(np.log(y))) if log else _running_mean(y)
    ax.plot(x, y, label=label, linewidth=1.4, marker="o" if 0 < len(y) <= MARKED else None, markersize=2.5, **style)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the points around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here, half = np.arange(len(values)), max(1, len(values) // 40)
    first, last = np.maximum(here - half, 0), np.minimum(here + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
