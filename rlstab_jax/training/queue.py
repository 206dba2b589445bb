"""Batches between sampling and learning, under ``rollout.lag``.

Let theta_s be the parameters after global step s, and theta_0 those that the run begins from. Global step s learns from
the batch that theta_{s-1-lag} made: sampled by the inference engine at those weights, and scored at the very same
weights by the training engine, right after, so that pi_old and its routes (R2) are of the version that sampled. Where
s-1-lag < 0 it is theta_0: in step 1 it makes the batches of the steps 1 to lag + 1, and step s, from then on, that of
step s + lag. So each prompt is used once, in its order, and lag 0 waits for nothing. The last batches of a run are made
and not learnt from, so that a run that is made longer is the run that was that long from the start.

With ``rollout.devices``, a step makes its batch on devices of its own, in a thread, while the others learn: it takes as
long as the longer of the two. Nothing else changes: which parameters make and learn from what is settled by the lag.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import struct

from rlstab_jax.learner import Minibatch, PolicyScores
from rlstab_jax.learner.predictor import Observed
from rlstab_jax.objectives import advantages_of
from rlstab_jax.training.config import truncates
from rlstab_jax.training.engines import EnginePair, Engines
from rlstab_jax.training.partial import Unfinished
from rlstab_jax.types import Rollout, RoutingReplay, Scores, route_dtype


@struct.dataclass
class Experience:
    """A rollout batch, with all that learning from it takes and what is logged of it.

    Attributes:
      rows: rollout, pi_old's scores, advantages, groups and reference log-probs of the whole batch.
      metrics: of sampling, judging and scoring.
      samples: some responses with their rewards, for samples.jsonl.
    """

    rows: Minibatch
    metrics: dict[str, float] = struct.field(pytree_node=False)
    samples: list[dict[str, Any]] = struct.field(pytree_node=False)

    def note(self) -> dict[str, Any]:
        """What is no array, as JSON."""
        return {"metrics": self.metrics, "samples": self.samples}

    def annotated(self, note: dict[str, Any]) -> "Experience":
        return replace(self, **note)


Queue = tuple[Experience | Unfinished, ...]  # what comes first is learnt from first


def laid_out(engines: Engines, made: Experience) -> Experience:
    """Where the learner's devices want it: as it is restored from a checkpoint, if it is to wait."""
    return replace(made, rows=engines.place(made.rows)) if engines.config.rollout.lag else made


def start(make: Callable[[], Queue], *, in_thread: bool) -> Callable[[], Queue]:
    """Calls ``make`` at once, or in a thread of its own. What it returns waits for the result, or raises its error."""
    if not in_thread:
        made = make()
        return lambda: made
    pool = ThreadPoolExecutor(1, "rollout")
    result = pool.submit(make)
    pool.shutdown(wait=False)
    return result.result


def blank(engines: EnginePair) -> Queue:
    """A full queue of zeros: what a checkpoint's arrays are restored into."""
    config, model, rollout = engines.config, engines.config.model, engines.config.rollout
    if not rollout.lag:
        return ()
    batch, prompt_length, length = config.responses_per_step, rollout.prompt_length, rollout.response_length
    layers, k = model.num_moe_layers, model.experts_per_token
    of_tokens = jnp.zeros((batch, length), jnp.float32)
    routes = router = None
    if layers:
        routes = jnp.zeros((layers, batch, prompt_length + length - 1, k), route_dtype(model.num_experts))
        router = jnp.zeros((batch, length, layers * k), jnp.float32) if engines.needs_router else None
    support = None
    if truncates(rollout):
        support = jnp.zeros((batch, length, min(rollout.support, model.vocab_size)), jnp.int32)
    response_mask, groups = of_tokens > 0, jnp.zeros(batch, jnp.int32)
    reference = of_tokens if config.objective.needs_reference else None
    rewards = of_tokens[:, 0]
    rollout_rows = Rollout(
        tokens=jnp.zeros((batch, prompt_length + length), jnp.int32),
        prompt_mask=jnp.zeros((batch, prompt_length), bool),
        response_mask=response_mask,
        log_probs=of_tokens,
        truncated=rewards > 0,
        routes=routes,
        temperature=rewards,
        support=support,
        minimum=engines.sampling.per_row(batch).minimum,
        version=jnp.zeros((batch, length), jnp.int32) if rollout.partial else None,
    )
    scores = Scores(of_tokens, of_tokens, of_tokens, response_mask, groups, reference, router_old=router)
    observed = None
    if engines.replay is RoutingReplay.PR2:
        kept = min(config.learner.predictor_tokens, prompt_length + length - 1)
        columns, inputs = jnp.zeros((batch, kept), jnp.int32), jnp.zeros((batch, kept, layers * model.embed_dim))
        scores_of_routers = jnp.zeros((batch, kept, layers * model.num_experts))
        observed = Observed(columns, columns > 0, inputs.astype(config.learner.precision.dtype), scores_of_routers)
    rows = Minibatch(
        rollout=rollout_rows,
        old=PolicyScores(of_tokens, of_tokens, routes, routes, router, observed),
        advantage=advantages_of(engines.objective, scores, rewards),
        groups=groups,
        reference=reference,
    )
    finished = Experience(rows, {}, [])
    if not rollout.partial:
        return (finished,) * rollout.lag
    live = None
    if engines.replay.alters_old and config.learner.live_gap:
        live = PolicyScores(of_tokens, of_tokens, None, None, None)
    return (finished, *[Unfinished(rows.rollout, rows.old, live, [], 0, {})] * (rollout.lag - 1))


def notes(queue: Queue) -> list[dict[str, Any]]:
    """What a queue holds besides arrays, as JSON."""
    return [one.note() for one in queue]


def annotated(queue: Queue, saved: list[dict[str, Any]]) -> Queue:
    """The arrays of a restored queue with their `notes`."""
    return tuple(one.annotated(note) for one, note in zip(queue, saved, strict=True))
