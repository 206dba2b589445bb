"""The paper's first-order approximation, exactly: every sequence of a tiny MoE policy is enumerated, in float64.

Expectations over mu_old are sums over all sequences of `experiments.enumerable`, so that the only errors are those of
the formulas. Four questions:

1. How wrong is the token-level gradient (Eq. 4), against the sequence-level one (Eq. 2), as each gap alone grows:
   precision (mu_old from rounded weights), staleness (pi_theta after updates), routing (mu_old's experts chosen by a
   perturbed router)?
2. What does the importance weight buy, and what does 1/|y| cost?
3. How does the error grow with the length of the sequence?
4. Under routing replay R2 and R3, first and later mini-batches: how much of the error is bias (another objective is
   followed) and how much is approximation?

    python -m experiments.first_order [--out DIR]
"""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from experiments.enumerable import MODES, Enumeration, Setting, enumerate_sequences, one_gap, replay

POINTS = 8
SIZES = {  # of each gap: rounding step, learning rate of `STALE_UPDATES` updates, perturbation of the router
    "precision": np.logspace(-3.5, -0.7, POINTS),
    "staleness": np.logspace(-3.5, -0.5, POINTS) * 0.3,
    "routing": np.logspace(-2.5, -0.3, POINTS),
}
LENGTH_STUDY_STEP = 0.03
PRECISIONS = (0.01, 0.03, 0.1)  # step of the rounding grid, relative to each tensor's largest weight
UPDATES = (0, 1, 3, 7, 15)  # since the rollout: the first mini-batch, and the last one of N = 2, 4, 8, 16


def run(setting: Setting) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All numbers of the study: of `one_gap` [seed, case] and of `replay` [seed, case, mode]."""
    with jax.enable_x64(True):
        tokens, mask = enumerate_sequences(setting.vocab, setting.length)
        world = Enumeration(jnp.asarray(tokens), jnp.asarray(mask), setting.top_k)
        keys = jax.random.split(jax.random.key(0), setting.seeds)
        over_seeds = partial(jax.vmap, in_axes=(0, None))
        gaps = jax.jit(over_seeds(partial(one_gap, setting, world)))(keys, jnp.asarray(gap_cases(setting)))
        replayed = jax.jit(over_seeds(partial(replay, setting, world)))(keys, jnp.asarray(replay_cases()))
        return jax.tree.map(np.asarray, (gaps, replayed))


def gap_cases(setting: Setting) -> np.ndarray:
    """The cases of `one_gap`: each gap's sizes at full length, then one precision at each length."""
    alone = [np.outer(sizes, np.eye(3)[i]) for i, sizes in enumerate(SIZES.values())]
    cases = np.concatenate([*alone, np.outer(np.full(setting.length, LENGTH_STUDY_STEP), np.eye(3)[0])])
    lengths = np.full(len(cases), setting.length)
    lengths[-setting.length :] = np.arange(1, setting.length + 1)
    return np.column_stack([cases, lengths])


def replay_cases() -> np.ndarray:
    return np.array([(step, updates) for step in PRECISIONS for updates in UPDATES], float)


def interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """The median over seeds, and its 95% percentile bootstrap interval; NaN is left out."""
    values = values[np.isfinite(values)]
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def slopes(gaps: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Order of each error in each gap: for each seed the slope of log error against log gap, where 1e-6 < gap < 0.1."""
    rows = []
    for i, gap in enumerate(SIZES):
        part = slice(i * POINTS, (i + 1) * POINTS)
        for name in ("weight_error", "no_weight_error", "value"):
            fits = []
            for x, y in zip(gaps["gap"][:, part], gaps[name][:, part], strict=True):
                used = (x > 1e-6) & (x < 0.1) & (y > 0)
                fits.append(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0] if used.sum() > 2 else np.nan)
            rows.append({"gap": gap, "quantity": f"slope of {name}", **_named(interval(np.array(fits)))})
        small = (gaps["gap"][:, part] > 1e-6) & (gaps["gap"][:, part] < 0.1)
        ratio = np.where(small, gaps["no_weight_error"][:, part] / gaps["weight_error"][:, part], np.nan)
        with np.errstate(invalid="ignore"):
            per_seed = np.array([np.median(r[np.isfinite(r)]) if np.isfinite(r).any() else np.nan for r in ratio])
        rows.append({"gap": gap, "quantity": "no_weight_error / weight_error", **_named(interval(per_seed))})
    for name in ("length_normalised_error", "length_normalised_cosine"):
        rows.append({"gap": "none", "quantity": name, **_named(interval(gaps[name][:, 0]))})
    return rows


def _named(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), values, strict=True))


def replay_table(replayed: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Medians over seeds for each case and mode, and the paired differences of the total error between the modes."""
    rows = []
    for i, (step, updates) in enumerate(replay_cases()):
        case = {"rounding_step": step, "updates": int(updates)}
        for m, mode in enumerate(MODES):
            for quantity, values in replayed.items():
                rows.append({**case, "mode": mode, "quantity": quantity, **_named(interval(values[:, i, m]))})
        total = replayed["total"][:, i]
        for first, second in ((1, 0), (2, 0), (2, 1)):
            pair = {"mode": f"{MODES[first]} - {MODES[second]}", "quantity": "total"}
            rows.append({**case, **pair, **_named(interval(total[:, first] - total[:, second]))})
    return rows


def gap_table(gaps: dict[str, np.ndarray], setting: Setting) -> list[dict[str, Any]]:
    """Medians over seeds of every number of `one_gap`, for each case."""
    names = ("rounding_step", "learning_rate", "router_perturbation", "length")
    rows = []
    for i, case in enumerate(gap_cases(setting)):
        for quantity, values in gaps.items():
            rows.append({**dict(zip(names, case, strict=True)), "quantity": quantity, **_named(interval(values[:, i]))})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# Okabe and Ito's colours, with a marker of its own for each line.
STYLES = {
    "weight_error": ("#0072B2", "o", "with weight $\\pi_\\theta/\\mu$ (Eq. 4)"),
    "no_weight_error": ("#D55E00", "s", "without weight"),
    "length_normalised_error": ("#999999", "^", "with weight and $1/|y|$"),
    "value": ("#009E73", "x", "value of the surrogate"),
}
MODE_STYLES = {"live": ("#000000", "o", "live"), "r2": ("#0072B2", "s", "R2"), "r3": ("#D55E00", "^", "R3")}
PANELS = {
    "precision": "$\\mu$ from rounded weights",
    "staleness": "$\\pi_\\theta$ after updates",
    "routing": "$\\mu$'s experts perturbed",
}


def draw(path: Path, gaps: dict[str, np.ndarray], replayed: dict[str, np.ndarray], fits: list[dict[str, Any]]) -> None:
    """Six panels: the error against each gap, against length, and under replay against the number of updates."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 7), layout="constrained")
    for i, (gap, title) in enumerate(PANELS.items()):
        part = slice(i * POINTS, (i + 1) * POINTS)
        slope = {row["quantity"]: row for row in fits if row["gap"] == gap}
        against_gap(axes[0, i], {name: values[:, part] for name, values in gaps.items()}, slope)
        axes[0, i].set_title(f"({'abc'[i]}) {gap}: {title}")
    axes[0, 0].set_ylabel("relative error of the gradient (or value)")

    length = gaps["gap"].shape[1] - 3 * POINTS
    for name in ("weight_error", "no_weight_error"):
        colour, marker, label = STYLES[name]
        line(axes[1, 0], np.arange(1, length + 1), gaps[name][:, 3 * POINTS :], colour, marker, label)
    axes[1, 0].set(xlabel="largest length (tokens)", ylabel="relative error of the gradient", ylim=(0, None))
    axes[1, 0].set(title=f"(d) length, precision gap (rounding step {LENGTH_STUDY_STEP})", xticks=range(1, length + 1))

    middle = len(PRECISIONS) // 2
    part = slice(middle * len(UPDATES), (middle + 1) * len(UPDATES))
    for m, (colour, marker, label) in enumerate(MODE_STYLES.values()):
        x = np.arange(len(UPDATES)) + 0.1 * (m - 1)  # side by side, so that no interval hides another
        line(axes[1, 1], x, replayed["total"][:, part, m], colour, marker, label)
        line(axes[1, 2], x, replayed["approximation"][:, part, m], colour, marker, f"{label}: approximation")
        if m:
            line(axes[1, 2], x + 0.05, replayed["bias"][:, part, m], colour, marker, f"{label}: bias", "--")
    axes[1, 1].set_title(f"(e) replay: total error (rounding step {PRECISIONS[middle]})")
    axes[1, 2].set_title("(f) its two parts")
    for axis in axes[1, 1:]:
        axis.set_xticks(range(len(UPDATES)), [f"{u}" for u in UPDATES])
        axis.set(xlabel="updates since the rollout (0: first mini-batch)", ylim=(0, None))
        axis.legend(fontsize=8)
    axes[1, 1].set_ylabel("relative to $|g_{seq}|$, naturally routed")
    seeds = gaps["gap"].shape[0]
    words = (
        f"Token-level against sequence-level gradient, all sequences enumerated, {seeds} policies.\n"
        "Dots: single policies; lines with bars: median and 95% bootstrap interval. In (a) to (d):"
    )
    handles, names = axes[0, 0].get_legend_handles_labels()
    style: dict[str, Any] = {"fontsize": 8, "title_fontsize": 9, "frameon": False}
    figure.legend(handles, names, loc="outside upper center", ncols=4, title=words, **style)
    for axis in axes.flat:
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def against_gap(axis: plt.Axes, gaps: dict[str, np.ndarray], slope: dict[str, Any]) -> None:
    """One dot for each policy and size, and the fitted slopes in words."""
    x = gaps["gap"].ravel()
    shown = x > 1e-6
    for name, (colour, marker, label) in STYLES.items():
        face = "none" if name == "no_weight_error" else colour  # hollow, for it lies over the one with weight
        kind = {"edgecolors": colour, "facecolors": face} if marker != "x" else {"c": colour}
        axis.scatter(x[shown], gaps[name].ravel()[shown], s=14, marker=marker, alpha=0.6, label=label, lw=0.8, **kind)
    words = []
    for name, label in (("weight_error", "with weight"), ("no_weight_error", "without"), ("value", "value")):
        fit = slope[f"slope of {name}"]
        words.append(f"slope {label}: {fit['median']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]")
    axis.text(0.03, 0.97, "\n".join(words), transform=axis.transAxes, va="top", fontsize=8)
    axis.set(xscale="log", yscale="log", xlim=(1e-5, 1), ylim=(1e-9, 1e3))
    axis.set_xlabel("gap: $E_\\mu|\\pi/\\mu-1|$ per token")
    axis.grid(alpha=0.25)


def line(
    axis: plt.Axes, x: np.ndarray, values: np.ndarray, colour: str, marker: str, label: str, style: str = "-"
) -> None:
    """The median over seeds (first axis) with its bootstrap interval."""
    middle, low, high = np.array([interval(column) for column in values.T]).T
    bars = np.stack([middle - low, high - middle])
    axis.errorbar(
        x, middle, bars, color=colour, marker=marker, ls=style, label=label, ms=5, lw=1.4, capsize=2, alpha=0.85
    )
    axis.grid(alpha=0.25)


def main(out: Path = Path("experiments/results/first_order")) -> None:
    """Writes slopes.csv, gaps.csv, replay.csv and first_order.png.

    Args:
      out: the folder to write to.
    """
    plt.switch_backend("agg")  # here and not above: a notebook that draws with these functions has its own
    setting = Setting()
    gaps, replayed = run(setting)
    out.mkdir(parents=True, exist_ok=True)
    fits = slopes(gaps)
    write(out / "slopes.csv", fits)
    write(out / "gaps.csv", gap_table(gaps, setting))
    write(out / "replay.csv", replay_table(replayed))
    draw(out / "first_order.png", gaps, replayed, fits)
    for row in fits:
        print(f"{row['gap']:>10}  {row['quantity']:32} {row['median']:7.3f}  [{row['low']:.3f}, {row['high']:.3f}]")


if __name__ == "__main__":
    tyro.cli(main)
