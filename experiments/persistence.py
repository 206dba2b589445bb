"""How persistent the engines' gap is: delta_t = log mu(y_t) - log pi(y_t) of fixed sequences, along on-policy runs.

The hypothesis: without the IS weight a run collapses if the gap pushes in one direction for long, not if it is large.
Rounding errors are drawn anew as the weights move. So a fixed probe of sequences, sampled at the first checkpoint, is
scored under both engines at every checkpoint, and delta_t of one checkpoint is correlated, over tokens, with that of a
later one. The runs are those of `experiments.on_policy` with a checkpoint every 16 updates; those with mu mixed, and
with noise that lasts, are the ones whose gap should persist, since training cannot remove it.

    python -m experiments.persistence [--seeds 3] [--first-pair 0] [--cells '*'] [--draw]
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import tyro
from jaxtyping import Bool, Float

from experiments import drawing, on_policy, statistics
from experiments.study import RESULTS, add, command, matches, read
from experiments.workers import prepare
from rlstab_jax.rundir import read_metrics
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.loop import RunState, first_train_state
from rlstab_jax.training.passes import inference_weights, rescore, sample_responses, score_old
from rlstab_jax.training.run import train
from rlstab_jax.types import Rollout, RoutingReplay, UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELLS = (
    *("minirl", "no_is", "mixed", "mixed-no_is", "minirl-4bit", "no_is-4bit"),
    *(cell.name for cell in on_policy.NOISE_CELLS),
)
EVERY = 16
PROMPTS = 64
FOLDER = RESULTS / "persistence"
FILE = "persistence.jsonl"
LIMIT = 20.0  # of a log-ratio, as in `stability.gaps`


def autocorrelation(
    delta: Float[np.ndarray, "checkpoint batch R"], mask: Bool[np.ndarray, "batch R"]
) -> Float[np.ndarray, "lag"]:
    """The correlation over tokens of delta at one checkpoint and at a later one, by lag in checkpoints from 0 on: the
    mean over all such pairs of checkpoints, but those of which one has no gap at all; NaN if none is left."""
    tokens = np.clip(delta[:, mask].astype(np.float64), -LIMIT, LIMIT)
    tokens -= tokens.mean(axis=1, keepdims=True)
    length = np.linalg.norm(tokens, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = tokens @ tokens.T / np.outer(length, length)
    by_lag = [np.diagonal(correlations, lag) for lag in range(len(tokens))]
    return np.array([np.mean(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in by_lag])


def log_mu(engines: Engines, weights: dict[str, Any], probe: Rollout) -> Float[np.ndarray, "batch R"]:
    """log mu of the probe's tokens, at temperature 1 and without truncation: the inference engine's softmax, mixed with
    the uniform distribution over the vocabulary where the run mixes it in. ``weights`` are from `inference_weights`."""
    rollout = engines.config.rollout
    if (rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p) != (1.0, 0, 1.0, 0.0):
        raise UserError(f"persistence is measured at temperature 1 and without truncation, not with {rollout}")
    softmax = np.asarray(rescore(engines, weights, probe))
    if rollout.uniform == 0.0:
        return softmax
    of_uniform = np.log(rollout.uniform / engines.training.config.vocab_size)
    return np.logaddexp(np.log1p(-rollout.uniform) + softmax, of_uniform)


def measure(config: RunConfig, run: Path, prompts: int = PROMPTS) -> dict[str, Any]:
    """Trains ``config`` in ``run`` if that has not been done, and scores the probe at each of its checkpoints."""
    config = dataclasses.replace(config, checkpoint_every=EVERY, keep_checkpoints=config.gradient_steps)
    if train(config, run, say=lambda line: None) is not None:
        raise UserError(f"{run} was stopped; the same command goes on")
    engines = build(config)

    def fresh() -> RunState:
        return RunState(first_train_state(engines, initial_params(engines.training, 0)), None)

    heldout = engines.task.split("heldout")
    probe, deltas = None, []
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        # A run that was stopped has one at the step that it had reached, too.
        steps = [step for step in checkpoints.steps() if step * config.minibatches % EVERY == 0]
        for step in steps:
            restored = checkpoints.restore(engines.placed_like(fresh), step)
            if restored is None:
                raise UserError(f"{run} has no checkpoint of step {step}")
            params = engines.place(restored[1]).train.params
            weights = inference_weights(engines, params, step)
            if probe is None:
                probe = sample_responses(engines, weights, [heldout[i] for i in range(prompts)], 10**6)
            old, _ = score_old(engines, params, probe, RoutingReplay.LIVE)
            deltas.append(log_mu(engines, weights, probe) - np.asarray(old.log_probs))
    if probe is None:
        raise UserError(f"{run} has no checkpoint")
    mask, delta = np.asarray(probe.response_mask), np.stack(deltas)
    metrics = read_metrics(run)
    accuracy = metrics["eval/accuracy_training"]
    return {
        "steps": [step * config.minibatches for step in steps],
        "autocorrelation": [round(x, 5) for x in autocorrelation(delta, mask).tolist()],
        "size": float(f"{np.sqrt(np.mean(np.clip(delta[:, mask], -LIMIT, LIMIT) ** 2)):.5g}"),
        "final": float(accuracy[np.isfinite(accuracy)][-1]),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each cell and lag the autocorrelation, with the size of the gap and the accuracy at the end, over pairs."""
    out = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = [row for row in rows if row["cell"] == cell]
        values = np.array([row["autocorrelation"] for row in here], float)
        cold_starts = np.array([row["cold_start"] for row in here])
        for lag in range(1, values.shape[1]):
            found = statistics.estimate(values[:, lag], cold_starts)
            line: dict[str, Any] = {"cell": cell, "pairs": len(here), "lag": lag * EVERY, "autocorrelation": found.mean}
            line |= {"low": found.low, "high": found.high}
            line |= {name: float(np.mean([row[name] for row in here])) for name in ("size", "final")}
            out.append(line)
    return out


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Autocorrelation by lag: one line a run."""
    figure, ax = plt.subplots(figsize=(5, 3.4), dpi=150, layout="constrained")
    for i, cell in enumerate(dict.fromkeys(row["cell"] for row in rows)):
        style = drawing.look(i) | {"linewidth": 1.2}
        for j, row in enumerate(row for row in rows if row["cell"] == cell):
            lags = EVERY * np.arange(len(row["autocorrelation"]))
            ax.plot(
                lags,
                np.array(row["autocorrelation"], float),
                label=None if j else on_policy.STUDY.cell(cell).label,
                **style,
            )
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_title("How long the gap of a token lasts, by rollouts; a line is a run", fontsize=9, loc="left")
    ax.set_xlabel("lag, gradient steps", fontsize=8)
    ax.set_ylabel("correlation of log mu - log pi with itself", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
    drawing.plain(ax)
    figure.savefig(path)
    plt.close(figure)


def draw(out: Path) -> None:
    """Writes the table and the picture, from the committed measurements."""
    rows = read(FOLDER / FILE)
    drawing.write_csv(out / "persistence.csv", table(rows))
    picture(rows, out / "persistence.png")


def main(
    seeds: int = 3,
    cells: tuple[str, ...] = ("*",),
    first_pair: int = 0,
    draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False,
    runs: Path = Path("runs/studies"),
) -> None:
    """Runs and measures what is missing, then draws.

    Args:
      seeds: pairs of the on-policy study.
      cells: only those whose name matches one of these, e.g. 'noise*'.
      first_pair: leave out the pairs before.
      draw_only: only draw.
      runs: where the run directories are kept.
    """
    path, study = FOLDER / FILE, on_policy.STUDY
    if not draw_only:
        prepare(runs)
    there = {(row["cell"], row["pair"]) for row in read(path)}
    for pair in () if draw_only else range(first_pair, seeds):
        for cell in CELLS:
            if (cell, pair) not in there and matches(cell, cells):
                config = study.config(study.cell(cell), pair)
                row = measure(config, runs / f"persistence-{cell}-pair{pair:02d}")
                add(path, {"cell": cell, "pair": pair, "cold_start": config.cold_start.seed, **row})
                print(f"{cell}, pair {pair}: measured")
    if read(path):
        draw(FOLDER)


if __name__ == "__main__":
    command(main)
