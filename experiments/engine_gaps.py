"""What the choice of engines does at fixed weights: to the gap, to the routes, and to the gradient.

At the cold start and at the end of on-policy runs, each choice of engines (a number format of either engine, other
kernels or batch shapes at equal precision) samples the same prompts with the same keys. Measured are KL(mu || pi), how
much of it the routes make, and how far the gradients of MiniRL, with and without the weight, live and with the
sampler's routes replayed (R3), are from the exact one: that of equal engines, where pi = mu and all are Eq. 2's.

As in `experiments.gradients`, a sample has two halves, and inner products are between gradients of different halves.

    python -m experiments.engine_gaps [--seeds 3] [--draw]    # after `python -m experiments.on_policy`
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib
import numpy as np
import tyro

from experiments import drawing, on_policy, statistics
from experiments.discrepancy import PRECISIONS, TRAINING
from experiments.gradients import Surrogate, compared, mean_gradients, projected, run_of, states, unclipped
from experiments.study import RESULTS, add, command, read, replaced
from experiments.workers import prepare
from rlstab_jax.stability.reduce import Statistics, merge
from rlstab_jax.tasks import prompt_iterator
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.diagnose import engine_gaps
from rlstab_jax.training.engines import build
from rlstab_jax.types import RoutingReplay

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EQUAL, WEIGHTED = "equal", "is"
_EQUAL = {"rollout.precision": PRECISIONS[EQUAL]}
# By name, what it changes in the config of on-policy MiniRL. The first one is exact.
ENGINES: dict[str, Mapping[str, Any]] = {
    **{name: {"rollout.precision": precision} for name, precision in PRECISIONS.items()},
    **{name: TRAINING[name] for name in ("both_bf16", "both_fp16", "both_e4m3", "train_e4m3")},
    "equal_other_experts": _EQUAL | {"kernels.decode_experts": "dense"},
    "equal_other_batch": _EQUAL | {"rollout.waves": 4},
}
GRADIENTS = {
    WEIGHTED: Surrogate(unclipped()),
    "no_is": Surrogate(unclipped(importance_sampling=False)),
    "is, R3": Surrogate(unclipped(), RoutingReplay.R3),
    "no_is, R3": Surrogate(unclipped(importance_sampling=False), RoutingReplay.R3),
}
GAPS = ("k3", "k3_replayed", "f2", "max_ratio")
FOLDER = RESULTS / "engine_gaps"
FILE = "engine_gaps.jsonl"


def measure(
    config: RunConfig, run: Path, batches: int = 8, engines: Mapping[str, Mapping[str, Any]] = ENGINES
) -> list[dict[str, Any]]:
    """The gaps and the gradients' inner products at the beginning and the end of an on-policy run.

    Args:
      batches: mini-batches of each half of the sample.
      engines: the choices, as `ENGINES`; the first one is exact.

    Returns:
      A row for each point and choice: its gaps; the inner product of each of its gradients with itself and with the
      exact one, whose square is ``exact``.
    """
    found, own = [], build(config)
    experts, chunk = config.model.num_experts, config.learner.logits_per_chunk
    for number, (point, state) in enumerate(states(config, run, own).items()):
        step = 10**7 * (1 + number)  # far from the run's own, so that prompts and draws are fresh
        data = prompt_iterator(own.task.split("train"), config.prompts_per_step, seed=step)
        halves = [[next(data) for _ in range(batches)] for _ in range(2)]
        exact: list[np.ndarray] = []
        for name, changes in engines.items():
            chosen = build(replaced(config, changes))
            if chosen.config.learner == own.config.learner:  # the same training engine, which is compiled already
                chosen = dataclasses.replace(chosen, training=own.training)
            gaps: list[Statistics] = []
            vectors = [
                mean_gradients(
                    chosen,
                    state.params,
                    state.params,
                    half,
                    step + i * batches,
                    GRADIENTS,
                    watch=lambda rows, chosen=chosen, params=state.params, gaps=gaps: gaps.append(
                        engine_gaps(chosen.training, params, rows.rollout, experts, chunk)
                    ),
                )
                for i, half in enumerate(halves)
            ]
            exact = exact or [half[list(GRADIENTS).index(WEIGHTED)] for half in vectors]
            value = {k: np.asarray(v.value()) for k, v in jax.device_get(reduce(merge, gaps)).items()}
            row: dict[str, Any] = {"point": point, "engines": name, "exact": float(exact[0] @ exact[1])}
            row |= {gap: _short(value[gap]) for gap in GAPS}
            row["disagreement"] = _short(value["layers/disagreement"].mean())
            row["tokens_differ"] = _short(value["tokens_differ"])
            row["squares"] = {g: float(a @ b) for g, a, b in zip(GRADIENTS, *vectors, strict=True)}
            row["products"] = {
                g: float(a @ exact[1] + b @ exact[0]) / 2 for g, a, b in zip(GRADIENTS, *vectors, strict=True)
            }
            found.append(row)
    return found


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


def distances(row: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Of each gradient of a row, beside the exact one and relative to its length: cosine, distance, projection."""
    found = {}
    for name, product in row["products"].items():
        products = np.array([[row["exact"], product], [product, row["squares"][name]]])
        cosines, apart = compared(products)
        found[name] = float(cosines[1]), float(apart[1]), float(projected(products)[1])
    return found


def table(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each point and choice of engines the gaps, and how each gradient lies beside the exact one (`distances`), as
    means over pairs with 95% intervals; NaN where a length is lost in the noise of a pair."""
    rows = [{"cold_start": pair["cold_start"], **row} for pair in pairs for row in pair["measured"]]
    out = []
    for point, engines in dict.fromkeys((row["point"], row["engines"]) for row in rows):
        here = [row for row in rows if (row["point"], row["engines"]) == (point, engines)]
        cold_starts = np.array([row["cold_start"] for row in here])
        line: dict[str, Any] = {"point": point, "engines": engines, "pairs": len(here)}
        line |= {gap: max(r[gap] for r in here) if gap == "max_ratio" else _mean(here, gap) for gap in GAPS}
        k3 = line["k3"]  # below 1e-9 nats a KL is rounding, and a share of it means nothing
        line["routing_share"] = 1 - line["k3_replayed"] / k3 if k3 > 1e-9 else float("nan")
        line |= {share: _mean(here, share) for share in ("disagreement", "tokens_differ")}
        found = [distances(row) for row in here]
        for name in GRADIENTS:
            for i, quantity in enumerate(("cosine", "distance", "projection")):
                estimate = statistics.estimate(np.array([each[name][i] for each in found]), cold_starts)
                line |= {f"{name}: {quantity}": estimate.mean}
                line |= {f"{name}: {quantity} low": estimate.low, f"{name}: {quantity} high": estimate.high}
        out.append(line)
    return out


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """By the choice of engines: KL with live and with replayed routes, and the gradients' distance from the exact."""
    points = list(dict.fromkeys(row["point"] for row in rows))
    figure, grid = plt.subplots(2, len(points), figsize=(4.6 * len(points), 5.6), dpi=150, layout="constrained")
    grid = grid.reshape(2, -1)
    for column, point in enumerate(points):
        here = [row for row in rows if row["point"] == point and row["engines"] != EQUAL]
        place = np.arange(len(here))
        upper, lower = grid[:, column]
        for i, (name, label) in enumerate((("k3", "live routes"), ("k3_replayed", "the sampler's routes replayed"))):
            upper.plot(place, [row[name] for row in here], drawing.MARKERS[i], color=drawing.COLOURS[i], label=label)
        for i, name in enumerate(GRADIENTS):
            mean, low, high = (
                np.array([row[f"{name}: distance{end}"] for row in here], float) for end in ("", " low", " high")
            )
            reach = np.nan_to_num(np.maximum(0, [mean - low, high - mean]))
            style: dict[str, Any] = {"color": drawing.COLOURS[i], "fmt": drawing.MARKERS[i], "markersize": 4}
            lower.errorbar(place + 0.14 * (i - 1.5), mean, reach, capsize=2, linewidth=1, label=name, **style)
        upper.set_yscale("log")
        upper.set_title({"begin": "at the cold start", "end": "at the end of the run"}.get(point, point), fontsize=9)
        upper.set_xticks(place, [])
        lower.set_ylim(bottom=0)
        lower.set_xticks(place, [row["engines"] for row in here], rotation=60, ha="right")
        for ax in (upper, lower):
            drawing.plain(ax)
    grid[0, 0].set_ylabel("KL(mu || pi) per token, nats (k3)", fontsize=8)
    grid[1, 0].set_ylabel("distance from the exact gradient,\nrelative to its length (95% interval)", fontsize=8)
    for ax in grid[:, 0]:
        ax.legend(fontsize=7, frameon=False)
    figure.suptitle("Choices of engines at fixed weights, beside equal engines", fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def draw(out: Path) -> None:
    """Writes the table and the picture, from the committed measurements."""
    rows = table(read(FOLDER / FILE))
    drawing.write_csv(out / "engine_gaps.csv", rows)
    picture(rows, out / "engine_gaps.png")


def main(
    seeds: int = 3,
    first_pair: int = 0,
    draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False,
    runs: Path = Path("runs/studies"),
    batches: int = 8,
) -> None:
    """Measures the pairs that are not there yet, then draws.

    Args:
      seeds: pairs of the on-policy study, up to this one.
      first_pair: leave out the pairs before.
      draw_only: only draw.
      runs: where the run directories are.
      batches: mini-batches of each half of the sample.
    """
    path, study = FOLDER / FILE, on_policy.STUDY
    if not draw_only:
        prepare(runs)
    there = {row["pair"] for row in read(path)}
    for pair in () if draw_only else range(first_pair, seeds):
        if pair not in there:
            config = study.config(study.cell("minirl"), pair)
            found = measure(config, run_of(config, runs), batches)
            add(path, {"pair": pair, "cold_start": config.cold_start.seed, "measured": found})
            print(f"pair {pair} measured")
    if read(path):
        draw(FOLDER)


if __name__ == "__main__":
    command(main)
