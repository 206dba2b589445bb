"""The global step. Read `global_step` first, then `produce` and `learn`, its halves: they are the method.

prompts -> inference engine (mu_old) -> rollout with log-probs and routes -> rewards -> training engine (pi_old)
-> advantages -> N updates (pi_theta).

What `queue` and `partial` say concerns asynchronous rollouts alone: by default a step learns from what it has made.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlstab_jax.learner import Minibatch, PolicyScores, TrainState, init_state, update
from rlstab_jax.objectives import Objective, advantages_of
from rlstab_jax.parallel.distributed import on_host
from rlstab_jax.parallel.sharding import Layout
from rlstab_jax.tasks import Prompt
from rlstab_jax.training.collect import (
    Batch,
    Responses,
    collect,
    judge,
    length_punishment,
    plain_answer,
    without_truncated,
)
from rlstab_jax.training.engines import EnginePair, Engines, row_sharding
from rlstab_jax.training.measure import decode_statistics, rollout_metrics, rollout_statistics, timed, update_metrics
from rlstab_jax.training.partial import Unfinished, begin, go_on, lag_statistics
from rlstab_jax.training.passes import (
    inference_weights,
    packed,
    rescore,
    routes_to_replay,
    sample_responses,
    score_live,
    score_old,
)
from rlstab_jax.training.queue import Experience, Queue, laid_out, start
from rlstab_jax.types import Poll, Rollout, RoutingReplay, Scores, join_rows, take_rows, undisturbed


@struct.dataclass
class RunState:
    """What a run carries from one global step to the next, and a checkpoint holds.

    Attributes:
      reference: the parameters that RL began with, for a KL regulariser or their routes, or None.
      queue: ``rollout.lag`` batches to learn from in the next steps, once the run has begun.
    """

    train: TrainState
    reference: dict | None
    queue: Queue = ()


Metrics = dict[str, float]


def first_train_state(engines: EnginePair, params: dict) -> TrainState:
    """What training begins with at ``params``."""
    learner, predictor = engines.config.learner, engines.replay is RoutingReplay.PR2
    return init_state(params, engines.numbers, learner.moments_dtype, predictor, learner.precision)


def global_step(
    engines: Engines,
    state: RunState,
    prompts: Iterator[list[Prompt]],
    step: int,
    poll: Poll = undisturbed,
) -> tuple[RunState, Metrics, list[dict[str, Any]]]:
    """One rollout batch and its N updates. Under ``rollout.lag`` it is not the batch that is made in this step.

    Args:
      engines: of the run.
      state: consumed.
      prompts: batches of N mini-batches of them, each for one step; groups without signal are replaced from further
        ones, where the config says so.
      step: number of this global step, from 1; keys of draws and the order of mini-batches depend on it.
      poll: called now and then until the first update, on all processes alike. What it raises ends the step, and
        ``state`` is as it was.

    Returns:
      The new state, the metrics of the step, and some responses with their rewards.
    """
    making = engines.making
    foretelling = state.train.predictor and state.train.predictor.weights
    params, reference, predictor = making.place((state.train.params, state.reference, foretelling))

    def make(queue: Queue, poll: Poll) -> Queue:
        if engines.config.rollout.partial:
            return another_round(engines, params, reference, prompts, step, queue, poll)
        made = produce(making, params, reference, next(prompts), step + len(queue), prompts, predictor, poll=poll)
        made.metrics["staleness/lag"] = float(len(queue))
        return (*queue, laid_out(engines, made))

    with timed("step") as step_time:
        queue = state.queue
        while len(queue) < engines.config.rollout.lag:  # as the run begins
            queue = make(queue, poll)
        # In a thread it is made beside this step's updates, else before them.
        beside = engines.overlaps and bool(queue)
        made = start(partial(make, queue, undisturbed if beside else poll), in_thread=engines.overlaps)
        experience = (queue or made())[0]
        assert isinstance(experience, Experience)
        train, metrics = learn(engines, state.train, experience.rows, step)
        queue = made()[1:]
    return RunState(train, state.reference, queue), experience.metrics | metrics | step_time, experience.samples


def produce(
    engines: Engines,
    params: dict,
    reference: dict | None,
    prompts: list[Prompt],
    step: int,
    further: Iterable[list[Prompt]] = (),
    predictor: dict | None = None,
    poll: Poll = undisturbed,
) -> Experience:
    """Both engines at the same weights ``params``: responses, rewards, pi_old and advantages for global step ``step``.

    Args:
      reference: the parameters that RL began with, for a KL regulariser or their routes, or None.
      prompts: N mini-batches of them.
      step: the global step that will learn from the batch; keys of draws depend on it.
      further: more batches of prompts, from which groups without signal are replaced, where the config says so.
      predictor: the weights of the routers' predictors, under PR2.
      poll: as of `global_step`.
    """
    config, drops = engines.config, engines.config.rollout.overlong == "drop"

    with timed("sample") as preparing_time:  # once, for all attempts and for `rescore`
        weights = inference_weights(engines, params, step)

    # y ~ mu_old, with the log-probs and routes of the inference engine, and R(x, y).
    def respond(asked: list[Prompt], attempt: int) -> Responses:
        with timed("sample") as sampling_time:
            sampled = sample_responses(engines, weights, asked, step, attempt, poll=poll)  # noqa: F821 (deleted below)
            rollout = jax.block_until_ready(sampled)
        poll()
        with timed("judge") as judging_time:
            texts, rewards = judge(engines.task, asked, rollout, config.rollout.stop)
        return Responses(asked, rollout, texts, rewards, sampling_time | judging_time, drops)

    batch = collect(respond, prompts, further, config.rollout.attempts)
    poll()
    batch.metrics["time/sample"] += preparing_time["time/sample"]
    rollout = batch.rollout
    if config.rollout.attempts > 1:  # rows of several rollouts lie where the compiler chose
        rollout = engines.settle(engines.place_rows(rollout))

    # pi_old, by the training engine at the same weights; under R3 it replays the sampler's routes, under PR2 those that
    # it foretells itself.
    with timed("score") as scoring_time:
        rescored = rescore(engines, weights, rollout) if config.rollout.log_probs == "rescore" else None
        del weights  # the passes that follow need the room
        sampled, rollout = rollout, routes_to_replay(engines, reference, rollout, step)
        old, statistics = score_old(engines, params, rollout, engines.replay, predictor)
        live = score_live(engines, params, rollout) if engines.replay.alters_old else old
        if rescored is not None:
            rollout = replace(rollout, log_probs=rescored)
            statistics = statistics | decode_statistics(sampled, rescored)
        chosen = replace(rollout, routes=sampled.routes)
        statistics = statistics | rollout_statistics(chosen, old, live, config.model.num_experts)
        batch.metrics.update(rollout_metrics(statistics))
    batch.metrics.update(scoring_time)
    poll()
    return conclude(engines, reference, replace(batch, rollout=rollout), old)


def another_round(
    engines: Engines,
    params: dict,
    reference: dict | None,
    prompts: Iterator[list[Prompt]],
    step: int,
    queue: Queue,
    poll: Poll = undisturbed,
) -> Queue:
    """Partial rollouts: one more round of each batch in the queue that is unfinished, and the first one of another."""
    making, lag = engines.making, engines.config.rollout.lag

    def go_on_with(one: Unfinished, of_step: int) -> Experience | Unfinished:
        poll()
        one, statistics = go_on(making, params, one, of_step, version=step - 1)
        if one.rounds < lag:
            return one
        with timed("judge") as judging_time:
            texts, rewards = judge(engines.task, one.prompts, one.rollout)
        drops = engines.config.rollout.overlong == "drop"
        responses = Responses(one.prompts, one.rollout, texts, rewards, one.seconds | judging_time, drops)
        batch = collect(lambda *_: responses, one.prompts, (), attempts=1)
        live = one.live if engines.replay.alters_old else one.old
        statistics |= rollout_statistics(one.rollout, one.old, live, engines.config.model.num_experts)
        statistics |= lag_statistics(one.rollout, of_step)
        batch.metrics.update(rollout_metrics(statistics))
        return laid_out(engines, conclude(making, reference, batch, one.old))

    older = [go_on_with(one, step + ahead) if isinstance(one, Unfinished) else one for ahead, one in enumerate(queue)]
    poll()
    return (*older, begin(making, params, next(prompts), step + len(queue), version=step - 1))


def conclude(engines: Engines, reference: dict | None, batch: Batch, old: PolicyScores) -> Experience:
    """What is left once responses are judged and scored: the reference's log-probs, advantages, what is logged."""
    config, metrics, rollout, rewards = engines.config, batch.metrics, batch.rollout, batch.rewards
    groups = np.repeat(np.arange(len(batch.prompts), dtype=np.int32), config.samples_per_prompt)
    if config.rollout.overlong == "penalise":
        punishment = length_punishment(rollout, config.rollout.overlong_margin)
        rewards, metrics["reward/overlong"] = rewards + punishment, float(punishment.mean())
    of_reference = None
    if reference is not None and config.objective.needs_reference:
        with timed("score") as scoring_time:
            # Every pass replays what the old one did, R3 or PR2: at equal weights the KL is 0.
            given, replay = rollout, RoutingReplay.LIVE
            if engines.replay.alters_old:
                given, replay = replace(rollout, routes=old.routes), RoutingReplay.R3
            of_reference = score_old(engines, reference, given, replay)[0].log_probs
            jax.block_until_ready(of_reference)
        metrics["time/score"] += scoring_time["time/score"]
    sampled = metrics["response/length"] * metrics["response/count"]
    metrics["throughput/sample_tokens_per_s"] = sampled / metrics["time/sample"]

    # A: once, over the whole batch, before it is split into mini-batches of whole groups.
    rewards_on_mesh = engines.place_rows(rewards)
    advantage = rollout_advantages(engines.objective, rollout, old, of_reference, rewards_on_mesh, groups)
    engines.settle(advantage)
    trained = without_truncated(rollout) if config.rollout.overlong == "drop" else rollout
    rows = Minibatch(trained, old, advantage, engines.place_rows(groups), of_reference)

    stride = max(1, len(batch.texts) // max(1, config.logged_samples))
    shown = list(range(0, len(batch.texts), stride))[: config.logged_samples]
    samples = [
        {"prompt": batch.prompts[groups[i]].text, "answer": plain_answer(batch.prompts[groups[i]].answer),
         "response": batch.texts[i], "reward": float(rewards[i])} for i in shown
    ]  # fmt: skip
    return Experience(rows, metrics, samples + batch.failed[: config.logged_samples])


def learn(engines: Engines, train: TrainState, rows: Minibatch, step: int) -> tuple[TrainState, Metrics]:
    """N updates of pi_theta on a whole batch, in an order that depends on ``step``. ``train`` is consumed."""
    config, updates = engines.config, []
    fed = on_host(rows.rollout.fed_mask) if config.learner.packing else None
    with timed("update") as metrics:
        for number, of_update in enumerate(
            minibatch_rows(config.seed, step, config.prompts_per_step, config.samples_per_prompt, config.minibatches)
        ):
            # Predictors learn what updates change: nothing yet, at the weights that scored the batch.
            teach = np.bool_(number > 0 or min(step - 1, config.rollout.lag) > 0) if train.predictor else None
            train, *measured = update(
                engines.training,
                train,
                engines.settle(minibatch(rows, engines.place(of_update), engines.mesh)),
                engines.objective,
                engines.numbers,
                replay=engines.replay,
                micro_batches=config.learner.micro_batches,
                logits_per_chunk=config.learner.logits_per_chunk,
                use_router_losses=bool(config.learner.load_balance or config.learner.router_z),
                packing=None if fed is None else packed(engines, fed[of_update], config.learner.micro_batches),
                freeze=config.learner.freeze,
                teach=teach,
            )
            if engines.mesh.size > 1:  # the compiler chooses where results lie, and that decides what it compiles
                train = engines.place(train)
            updates.append(tuple(engines.settle(measured)))
        of_updates = update_metrics(updates)
    metrics |= of_updates
    updated = int(np.sum(rows.rollout.response_mask))
    metrics["throughput/update_tokens_per_s"] = updated / metrics["time/update"]
    return train, metrics


@partial(jax.jit, static_argnames="mesh")
def minibatch(whole: Minibatch, rows: Int[Array, "rows"], mesh: Mesh) -> Minibatch:
    """Those rows of a batch, split over the devices as the batch is.

    On several devices they are taken in parts of one row for each: a part is on all devices at once while it moves,
    since compilers know no better way, which a whole mini-batch of long responses would not fit.
    """
    if mesh.size == 1:
        return take_rows(whole, rows)

    def over_devices(tree: Minibatch) -> Minibatch:
        return jax.lax.with_sharding_constraint(tree, jax.tree.map(partial(row_sharding, mesh), tree))

    of_each = rows.reshape(Layout(mesh).row_parts, -1).T
    parts = jax.lax.map(lambda part: over_devices(take_rows(whole, part)), of_each)

    return over_devices(join_rows(parts))


@jax.jit
def rollout_advantages(
    objective: Objective,
    rollout: Rollout,
    old: PolicyScores,
    reference: Float[Array, "batch R"] | None,
    rewards: Float[Array, "batch"],
    groups: Int[Array, "batch"],
) -> Float[Array, "batch"] | Float[Array, "batch R"]:
    """A of a whole rollout batch, with what the objective keeps in the reward."""
    scores = Scores(
        old.log_probs, old.log_probs, rollout.log_probs, rollout.response_mask, groups, reference, router_old=old.router
    )
    return advantages_of(objective, scores, rewards)


def minibatch_rows(seed: int, step: int, prompts: int, samples: int, minibatches: int) -> Int[np.ndarray, "N rows"]:
    """Rows of each mini-batch: whole groups, in an order that depends on (seed, step) alone."""
    order = np.random.default_rng((seed, step)).permutation(prompts).reshape(minibatches, -1)
    rows = order[..., None] * samples + np.arange(samples)
    return rows.reshape(minibatches, -1).astype(np.int32)
