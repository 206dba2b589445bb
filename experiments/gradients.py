"""The token-level gradient against the sequence-level one (PAPER, Eqs. 4 and 2) at the weights of trained runs.

At the cold start of each on-policy MiniRL run and at its end, and each time at those weights and after seven more
updates (as in the last mini-batch of N = 8), a large fresh sample of mu_old gives the gradient of Eq. 2 and those of
the objectives that approximate it: with and without the weight, with 1/|y|, and with routes replayed: the right ones,
another token's, and those that the training engine chose at the cold start. This is claim (m), and what replay does to
the first-order approximation.

The sample is drawn in two halves, and all inner products are between a gradient of one half and one of the other: the
sampling noise of the two is independent, so that it does not pass for similarity, nor its square for length.

    python -m experiments.gradients [--seeds 10] [--draw]     # after `python -m experiments.on_policy --cells minirl`
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from experiments import drawing, on_policy, statistics
from experiments.claims import ENOUGH, NOT_YET, REFUTED, REPRODUCED, UNDECIDED
from experiments.study import RESULTS, add, command, key_of, read
from experiments.workers import prepare
from rlstab_jax.learner import Minibatch, TrainState
from rlstab_jax.learner.loss_scale import BEGIN
from rlstab_jax.learner.score import policy_scores, replayed_routes
from rlstab_jax.models import Transformer
from rlstab_jax.objectives import Objective, coefficients, minirl, sequence_is, surrogate
from rlstab_jax.tasks import Prompt, prompt_iterator
from rlstab_jax.training.checkpoint import Checkpoints
from rlstab_jax.training.cold_start import cold_start
from rlstab_jax.training.config import RunConfig
from rlstab_jax.training.engines import Engines, build, initial_params
from rlstab_jax.training.loop import RunState, first_train_state, learn, minibatch, produce
from rlstab_jax.training.passes import score_old, with_routes_of
from rlstab_jax.types import RoutingReplay, Scores, UserError

REFERENCE = "sequence"  # Eq. 2, live routing, no truncation


def unclipped(**changes: Any) -> Objective:
    """MiniRL without clipping and truncation, of which the first-order theory knows nothing."""
    return minirl(eps_low=math.inf, eps_high=math.inf, cap=math.inf, **changes)


class Surrogate(NamedTuple):
    """An objective, and the routes that it is taken with."""

    objective: Objective
    replay: RoutingReplay = RoutingReplay.LIVE
    replay_of: Literal["recorded", "permuted", "initial"] = "recorded"
    """What R3 replays, as ``learner.replay_of``."""


GRADIENTS = {
    REFERENCE: Surrogate(sequence_is()),
    "token": Surrogate(unclipped()),
    "no_is": Surrogate(unclipped(importance_sampling=False)),
    "length_norm": Surrogate(unclipped(length_normalise=True)),
    "r2": Surrogate(unclipped(), RoutingReplay.R2),
    "r3": Surrogate(unclipped(), RoutingReplay.R3),
    "permuted": Surrogate(unclipped(), RoutingReplay.R3, "permuted"),
    "clipped": Surrogate(minirl()),
    "initial": Surrogate(unclipped(), RoutingReplay.R3, "initial"),
}
UPDATES = (0, 7)
FOLDER = RESULTS / "gradients"
FILE = "gradients.jsonl"


@partial(jax.jit, static_argnames=("model", "replay", "logits_per_chunk"))
def gradient(
    model: Transformer,
    params: dict,
    rows: Minibatch,
    objective: Objective,
    *,
    replay: RoutingReplay,
    logits_per_chunk: int,
) -> Float[Array, "parameters"]:
    """The gradient of an objective's loss at ``params`` over rows that mu_old sampled, in one vector. In float16 the
    loss is scaled, as a learner's is."""
    routes = replayed_routes(replay, rows.rollout, rows.old.routes)
    old = rows.old.log_probs
    scores = Scores(old, old, rows.rollout.log_probs, rows.rollout.response_mask, rows.groups)
    c = coefficients(objective, scores)
    scale = BEGIN if model.precision.dtype == "float16" else 1.0

    def loss(params: dict) -> Float[Array, ""]:
        target, _ = policy_scores(model, {"params": params}, rows.rollout, routes, logits_per_chunk)
        return scale * surrogate(objective, dataclasses.replace(scores, target=target.log_probs), rows.advantage, c)[0]

    return ravel_pytree(jax.grad(loss)(params))[0] / scale


def _replaying(
    engines: Engines, old: dict, rows: Minibatch, replay_of: str, initial: dict | None, key: int
) -> Minibatch:
    """The rows with pi_old's scores under R3, of the recorded routes, of those permuted by a key, or of those that the
    training engine chooses at the parameters ``initial``."""
    rollout = with_routes_of(engines, replay_of, initial, rows.rollout, jax.random.key(key))
    scores, _ = score_old(engines, old, rollout, RoutingReplay.R3)
    return dataclasses.replace(rows, rollout=rollout, old=scores)


def mean_gradients(
    engines: Engines,
    old: dict,
    params: dict,
    prompts: Sequence[list[Prompt]],
    step: int,
    wanted: Mapping[str, Surrogate],
    watch: Callable[[Minibatch], None] = lambda rows: None,
    initial: dict | None = None,
) -> Float[np.ndarray, "objective parameters"]:
    """The gradients at ``params`` over fresh samples of mu_old.

    Args:
      engines: their objective gives the advantages; one mini-batch a rollout batch.
      old: the weights that sample, theta_old.
      params: those at which the gradients are taken, theta.
      prompts: of each mini-batch.
      step: keys of the first one's draws; the others follow.
      watch: is given each mini-batch.
      initial: the weights that RL began with, where their routes are wanted.
    """
    config, total = engines.config, np.zeros(())
    for number, asked in enumerate(prompts, start=step):
        rows = produce(engines, old, None, asked, number).rows
        rows = minibatch(rows, np.arange(config.responses_per_step, dtype=np.int32), engines.mesh)
        watch(rows)
        replaying = {
            of: _replaying(engines, old, rows, of, initial, number)
            for of in {kind.replay_of for kind in wanted.values() if kind.replay is RoutingReplay.R3}
        }
        each = [
            gradient(
                engines.training,
                params,
                replaying[kind.replay_of] if kind.replay is RoutingReplay.R3 else rows,
                kind.objective,
                replay=kind.replay,
                logits_per_chunk=config.learner.logits_per_chunk,
            )
            for kind in wanted.values()
        ]
        total = total + np.asarray(jnp.stack(each), np.float64)
    return total / len(prompts)


def inner_products(
    engines: Engines,
    old: dict,
    params: dict,
    batches: int,
    step: int,
    wanted: Mapping[str, Surrogate] = GRADIENTS,
    initial: dict | None = None,
) -> Float[np.ndarray, "objective objective"]:
    """Of `mean_gradients`, between two halves of a sample of ``batches`` mini-batches each, symmetrised."""
    config = engines.config
    data = prompt_iterator(engines.task.split("train"), config.prompts_per_step, seed=config.seed + step)
    halves = [
        mean_gradients(
            engines,
            old,
            params,
            [next(data) for _ in range(batches)],
            step + half * batches,
            wanted,
            initial=initial,
        )
        for half in range(2)
    ]
    products = halves[0] @ halves[1].T
    return (products + products.T) / 2


def compared(products: Float[np.ndarray, "objective objective"]) -> tuple[np.ndarray, np.ndarray]:
    """Each gradient's cosine with the first one, and its distance from it relative to that one's length.

    NaN where the estimate of a squared length, which noise can make negative, is not positive.
    """
    squares = np.diag(products)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products[0] / np.sqrt(squares * squares[0])
        distances = np.sqrt(np.maximum(squares + squares[0] - 2 * products[0], 0.0) / squares[0])
    bad = (squares <= 0) | (squares[0] <= 0)
    return np.where(bad, np.nan, cosines), np.where(bad, np.nan, distances)


def projected(products: Float[np.ndarray, "objective objective"]) -> Float[np.ndarray, "objective"]:
    """Each gradient's projection on the first one, relative to that one's length: 1 if it holds all of it, 0 if none.

    It is known where the gradient's own length is lost in noise; NaN where that of the first one is.
    """
    square = products[0, 0]
    return products[0] / square if square > 0 else np.full(len(products), np.nan)


def states(config: RunConfig, run: Path, engines: Engines) -> dict[str, TrainState]:
    """A run's training state at its beginning and at its end. Raises UserError if there is no such run."""

    def fresh() -> RunState:
        return RunState(first_train_state(engines, initial_params(engines.training, 0)), None)

    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no run: `python -m experiments.on_policy --cells minirl` makes it")
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(engines.placed_like(fresh))
    started = cold_start(engines, run.parent / "cold_start", say=lambda line: None)
    if restored is None or started is None or restored[2]["gradient_steps"] < config.gradient_steps:
        raise UserError(f"{run} is not complete: `python -m experiments.on_policy --cells minirl` goes on with it")
    begin = engines.place(first_train_state(engines, started.params))
    return {"begin": begin, "end": engines.place(restored[1].train)}


def measure(
    config: RunConfig,
    run: Path,
    batches: int = 16,
    wanted: Mapping[str, Surrogate] = GRADIENTS,
    further: Sequence[int] = UPDATES,
) -> list[dict[str, Any]]:
    """The inner products of one on-policy run: at its beginning and end, after each number of ``further`` updates."""
    engines, found = build(config), []
    points = states(config, run, engines)
    for point, begun in points.items():
        old = begun.params
        for updates in further:
            step = 10**6 * (1 + updates)  # far from the run's own, so that prompts and draws are fresh
            state = jax.tree.map(jnp.copy, begun)  # an update takes its buffers
            if updates:
                several = build(dataclasses.replace(config, minibatches=updates))
                prompts = prompt_iterator(engines.task.split("train"), several.config.prompts_per_step, seed=step)
                state, _ = learn(several, state, produce(several, old, None, next(prompts), step).rows, step)
            products = inner_products(engines, old, state.params, batches, step, wanted, points["begin"].params)
            found.append({"point": point, "updates": updates, "names": list(wanted), "products": products.tolist()})
    return found


def table(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cosine with the gradient of Eq. 2, relative distance from it, projection on it: over the pairs that have the
    gradient, with 95% intervals. NaN where a pair's is not known."""
    rows = [{"cold_start": pair["cold_start"], **row} for pair in pairs for row in pair["measured"]]
    out = []
    for point, updates in dict.fromkeys((row["point"], row["updates"]) for row in rows):
        here = [row for row in rows if (row["point"], row["updates"]) == (point, updates)]
        for name in dict.fromkeys(name for row in here for name in row["names"] if name != REFERENCE):
            measured = [row for row in here if name in row["names"]]
            cold_starts = np.array([row["cold_start"] for row in measured])
            numbers = np.array([_beside_reference(row, name) for row in measured])  # [pair, quantity]
            line: dict[str, Any] = {"point": point, "updates": updates, "gradient": name, "pairs": len(measured)}
            for quantity, values in zip(("cosine", "distance", "projection"), numbers.T, strict=True):
                known = np.isfinite(values)
                if not known.all():
                    line |= {quantity: float("nan"), f"{quantity}_low": float("nan"), f"{quantity}_high": float("nan")}
                    continue
                found = statistics.estimate(values, cold_starts)
                line |= {quantity: found.mean, f"{quantity}_low": found.low, f"{quantity}_high": found.high}
            out.append(line)
    return out


def _beside_reference(row: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Cosine, distance and projection of one gradient of a measured row."""
    products = np.array(row["products"])
    own = row["names"].index(name)
    return tuple(float(of_each[own]) for of_each in (*compared(products), projected(products)))


def correlated(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The verdict on "nor linearly correlated with the true gradient" at the weights that sampled, at both points:
    reproduced where each cosine's 95% interval is below a half, refuted where each is above."""
    here = [row for row in rows if row["gradient"] == name and row["updates"] == 0]
    if not here or min(row["pairs"] for row in here) < ENOUGH:
        return NOT_YET
    if all(row["cosine_high"] < 0.5 for row in here):
        return REPRODUCED
    return REFUTED if all(row["cosine_low"] > 0.5 for row in here) else UNDECIDED


def run_of(config: RunConfig, runs: Path) -> Path:
    """Where the run of a config is among those of the studies: each may have run it under its own name."""
    key = key_of(config)
    return next(iter(sorted(runs.glob(f"*-{key}"))), runs / key)


def draw(out: Path) -> None:
    """Writes the table, from the committed measurements."""
    drawing.write_csv(out / "gradients.csv", table(read(FOLDER / FILE)))


def main(
    seeds: int = 10,
    first_pair: int = 0,
    draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False,
    runs: Path = Path("runs/studies"),
    batches: int = 16,
) -> None:
    """Measures the pairs that are not there yet, then writes the table.

    Args:
      seeds: pairs of the on-policy study, up to this one.
      first_pair: leave out the pairs before.
      draw_only: only write the table.
      runs: where the run directories are.
      batches: mini-batches of each half of the sample.
    """
    path, study = FOLDER / FILE, on_policy.STUDY
    cell = study.cell("minirl")
    if not draw_only:
        prepare(runs)
    there = {row["pair"] for row in read(path)}
    for pair in () if draw_only else range(first_pair, seeds):
        if pair in there:
            continue
        config = study.config(cell, pair)
        found = measure(config, run_of(config, runs), batches)
        add(path, {"pair": pair, "cold_start": config.cold_start.seed, "measured": found})
        print(f"pair {pair} measured")
    if read(path):
        draw(FOLDER)


if __name__ == "__main__":
    command(main)
