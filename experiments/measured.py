"""The page's tables and sentences beside its verdicts: of what was measured at fixed weights (gradients, gaps and their
memory), of how long answers are, and of how runs end."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import engine_gaps, gradients, on_policy, persistence, scale
from experiments.benchmarks.common import markdown
from experiments.claims import ENOUGH
from experiments.pairing import common
from experiments.setting import HORIZON
from experiments.study import Run, read

AT = (0, 32, 64, HORIZON)
LAST_STEPS = 48


def of_gradients(results: Path) -> str:
    """Cosines of ablated gradients with Eq. 2's at the weights that sampled, and the verdicts on (m)."""
    rows = gradients.table(read(results / "gradients" / gradients.FILE))
    lines = []
    for name, says in (("no_is", "without IS"), ("length_norm", "with 1/\\|y\\|")):
        here = [row for row in rows if row["gradient"] == name and row["updates"] == 0]
        figures = "; ".join(
            f"{row['point']}: {row['cosine']:.2f} [{row['cosine_low']:.2f}, {row['cosine_high']:.2f}]" for row in here
        )
        lines.append(
            ("m", f"the gradient {says} is not correlated with Eq. 2's", figures, gradients.correlated(rows, name))
        )
    return markdown(("claim", "as tested", "cosine", "verdict"), lines)


def lengths(runs: Mapping[str, Sequence[Run]]) -> str:
    """Of held-out answers where the cold start has seen ones that skip steps, and what that does and does not test."""

    def of(cell: str) -> str:
        kept = [run.metrics["eval/response_length"][run.evaluated] for run in runs[cell]]
        at = [np.mean([each[run.steps >= step][0] for each, run in zip(kept, runs[cell], strict=True)]) for step in AT]
        return ", ".join(f"{length:.1f}" for length in at)

    but = "Where the lengths of a prompt's responses differ, the enumeration alone has tested (m)"
    if not all(runs[cell] for cell in ("minirl-skips", "length_norm-skips")):
        return f"{but}, and (c) is not yet run."
    return (
        f"{but}; (c) has a line of cold starts that have seen answers which skip steps. These are unlearnt soon: "
        f"held-out answers have {of('minirl-skips')} tokens after {', '.join(map(str, AT))} updates, with 1/|y| "
        f"{of('length_norm-skips')}."
    )


def climbing(runs: Sequence[Run]) -> str:
    """How much runs still learn when they end."""
    if not runs:
        return "No run has ended."
    last = [run.steps >= run.steps[-1] - LAST_STEPS for run in runs]
    windows = [np.convolve(run.accuracy, [0.5, 0.5], "valid") for run in runs]
    at_the_end = np.mean([end[1 + np.argmax(mean)] for end, mean in zip(last, windows, strict=True)])
    rise = np.mean([run.accuracy[-1] - run.accuracy[end][0] for end, run in zip(last, runs, strict=True)])
    return (
        f"**Runs still climb when they end**: of the {len(runs)} of `off_policy` at the common rate {at_the_end:.0%} "
        f"have their peak in the last {LAST_STEPS} updates, in which accuracy rises by {rise:.3f} on average. So a "
        "final accuracy is also how fast a run learnt, a peak is near its end, and what (a), (c), (d), (f), (g) and "
        "(i) would be after more updates is not known."
    )


def collapses_without_clipping(off_policy: Mapping[str, Sequence[Run]], scales: Mapping[str, Sequence[Run]]) -> str:
    """Of the runs at the common rate."""
    counts = {
        "answers of up to 17 tokens": [run for cells in (off_policy, scales) for name, done in cells.items()
                                       if "noclip" in name and "-lr" not in name and not name.startswith("len")
                                       for run in done],
        **{f"answers of up to {length[3:]} tokens": [run for name, done in scales.items()
                                                     if name.startswith(f"{length}-n8-noclip") for run in done]
           for length in scale.LENGTHS},
    }  # fmt: skip
    told = [f"{sum(run.collapsed for run in done)} of {len(done)} with {what}" for what, done in counts.items()]
    return f"At the common rate, of the runs without clipping there collapse {', '.join(told)}."


def by_quarters(runs: Mapping[str, Sequence[Run]]) -> str:
    """How the cold starts under a ceiling approach each other."""
    told = []
    for name in ("strong", "slips"):
        a, b = common(runs, (f"ceiling-{name}", "ceiling-plain"))
        if len(a) < ENOUGH:
            continue
        apart = np.array([x.accuracy - y.accuracy for x, y in zip(a, b, strict=True)]).mean(0)
        quarter = np.minimum(4 * a[0].steps // (a[0].horizon + 1), 3)
        told.append(f"{name} less plain {', '.join(f'{apart[quarter == i].mean():+.3f}' for i in range(4))}")
    return (
        f"(k) under the ceiling, by quarters of the updates: {'; '.join(told)}. Their answers have one length, which "
        "the prompts ask for, so that length cannot tell cold starts apart."
    )


def of_projections(results: Path) -> str:
    """How much of Eq. 2's gradient each kind of routes leaves, where and after how many updates."""
    kinds = {
        "token": "live routes",
        "r2": "R2",
        "r3": "R3",
        "permuted": "R3, another token's routes",
        "initial": "R3, the cold start's routes",
        "clipped": "live routes, clipping and truncation",
    }
    measured = read(results / "gradients" / gradients.FILE)
    # Of the same pairs: cold starts differ by more than routes do.
    rows = gradients.table(
        [pair for pair in measured if all(kinds.keys() <= set(row["names"]) for row in pair["measured"])]
    )
    places = list(dict.fromkeys((row["point"], row["updates"]) for row in rows))
    of = {(row["point"], row["updates"], row["gradient"]): row for row in rows}

    def shown(row: Mapping[str, Any]) -> str:
        return f"{row['projection']:.2f} [{row['projection_low']:.2f}, {row['projection_high']:.2f}]"

    lines = [(says, *(shown(of[*place, name]) for place in places)) for name, says in kinds.items() if rows]
    return markdown(("gradient with", *(f"{point}, {updates} updates" for point, updates in places)), lines)


def of_persistence(results: Path) -> str:
    """Size and persistence of the gap by kind of rollouts, and how runs with and without IS ended."""
    kinds = {"e4m3": ("minirl", "no_is"), "4 bits": ("minirl-4bit", "no_is-4bit"), "mu mixed": ("mixed", "mixed-no_is")}
    kinds |= {label: (name, f"{name}-no_is") for name, (label, _) in on_policy.NOISES.items()}
    lags = (16, 64, 256)
    rows = persistence.table(read(results / "persistence" / persistence.FILE))
    of = {(row["cell"], row["lag"]): row for row in rows}
    lines = []
    for kind, (weighted, without) in kinds.items():
        if all((cell, lag) in of for cell in (weighted, without) for lag in lags):
            row = of[without, lags[0]]
            stays = [f"{of[without, lag]['autocorrelation']:.2f}" for lag in lags]
            ends = [f"{of[cell, lags[0]]['final']:.2f}" for cell in (weighted, without)]
            lines.append((kind, str(row["pairs"]), f"{row['size']:.2g}", *stays, *ends))
    head = ("rollouts", "pairs", "size without IS", *(f"correlation after {lag}" for lag in lags))
    return markdown((*head, "accuracy with IS", "without IS"), lines)


def of_engines(results: Path) -> str:
    """Gaps and gradients of each choice of engines at the end of runs."""
    rows = engine_gaps.table(read(results / "engine_gaps" / engine_gaps.FILE))

    def shown(row: Mapping[str, Any], gradient: str) -> str:
        mean, low, high = (row[f"{gradient}: projection{end}"] for end in ("", " low", " high"))
        return "lost in noise" if math.isnan(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"

    lines = [
        (
            row["engines"],
            str(row["pairs"]),
            f"{row['k3']:.2g}",
            "" if math.isnan(row["routing_share"]) else f"{row['routing_share']:.2f}",
            f"{row['disagreement']:.2g}",
            f"{row['tokens_differ']:.2g}",
            *(shown(row, gradient) for gradient in engine_gaps.GRADIENTS),
        )
        for row in rows
        if row["point"] == "end"
    ]
    head = (
        "engines",
        "pairs",
        "KL, nats",
        "share of routing",
        "routes that differ",
        "tokens with any that differ",
        *engine_gaps.GRADIENTS,
    )
    return markdown(head, lines)


def enumerated(results: Path) -> str:
    """What the enumeration of a tiny policy says of claim (m)."""
    with (results / "first_order" / "slopes.csv").open() as file:
        rows = {(row["gap"], row["quantity"]): row for row in csv.DictReader(file)}

    def shown(gap: str, quantity: str) -> str:
        row = rows[gap, quantity]
        return f"{float(row['median']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}]"

    return (
        f"there the cosine of the length-normalised gradient with the true one is "
        f"{shown('none', 'length_normalised_cosine')} at hardly any gap, and without the weight the error is "
        f"{shown('precision', 'no_weight_error / weight_error')} times as large; so they are not equal, but they are "
        "correlated ([`first_order`](first_order/README.md))."
    )
