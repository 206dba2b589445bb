"""Partial rollouts: a batch is drawn in ``rollout.lag`` rounds, one a global step, each by the newest parameters.

All rounds but the last draw ``rollout.partial`` tokens of each response that has not stopped, and the last one the
rest. The batch of global step s has its first round in step s - lag and its last one in step s - 1 (all those before
step 1 are made by theta_0, see `training.queue`). A round feeds the whole prefix anew, so its keys and values are those
of the round's weights; as in AReaL (2505.24298) and Kimi k1.5 (2501.12599), whose unit is a response, not a round.

Of each token are kept the version of the parameters that drew it, and what belongs to that version:

- mu_old(y_t | y_<t): the inference engine's probability as it drew, at the version that drew y_t.
- pi_old(y_t | y_<t): the training engine's at the same version, given the whole prefix, whoever drew that. It is
  scored at the end of the round, while these parameters are the current ones. So the factors of the importance weight
  are the numerics of one version (pi_old / mu_old) and the parameters' way from that version on (pi_theta / pi_old).
- The route of a token that was fed: the one with which its successor was drawn. A prompt's are the first round's. The
  newer routes of a prefix that was fed anew are not kept, since the learner feeds each token once. All passes of the
  training engine replay these same routes: pi_old's of a later round replay those of the rounds before, under R2 too,
  where the round's own tokens route live and are recorded. So pi_theta / pi_old is 1 where theta is the token's
  version, and what the newer routes of the prefix changed is part of pi_old / mu_old.

Each round scores the whole batch, though it keeps its own tokens alone.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlstab_jax.inference import with_room
from rlstab_jax.learner import PolicyScores
from rlstab_jax.stability.reduce import Statistics, mean_of
from rlstab_jax.tasks import Prompt
from rlstab_jax.training.engines import Engines
from rlstab_jax.training.measure import timed
from rlstab_jax.training.passes import go_on_sampling, inference_weights, sample_responses, score_live, score_old
from rlstab_jax.types import Rollout, RoutingReplay


@struct.dataclass
class Unfinished:
    """Responses after some of their rounds.

    Attributes:
      rollout: with room for whole responses.
      old: pi_old of the tokens that there are.
      live: the same with live routing, under R3, if that is scored.
      prompts: of its groups.
      rounds: made so far.
      seconds: that they took, by the name of their metric.
    """

    rollout: Rollout
    old: PolicyScores
    live: PolicyScores | None
    prompts: list[Prompt] = struct.field(pytree_node=False)
    rounds: int = struct.field(pytree_node=False)
    seconds: dict[str, float] = struct.field(pytree_node=False)

    def note(self) -> dict[str, Any]:
        """What is no array, as JSON."""
        prompts = [(int(one.id), one.text, one.answer) for one in self.prompts]
        return {"prompts": prompts, "rounds": self.rounds, "seconds": self.seconds}

    def annotated(self, note: dict[str, Any]) -> "Unfinished":
        return replace(self, **note | {"prompts": [Prompt(*one) for one in note["prompts"]]})


def begin(engines: Engines, params: dict, prompts: list[Prompt], step: int, version: int) -> Unfinished:
    """The first round of the batch that global step ``step`` learns from, by parameters of ``version`` global steps."""
    config = engines.config.rollout
    with timed("sample") as seconds:
        rollout = sample_responses(
            engines, inference_weights(engines, params, step), prompts, step, length=config.partial
        )
        model, pad_id = engines.config.model, int(engines.sampling.pad_id)
        rollout = with_room(rollout, config.response_length, pad_id, model.vocab_size, model.num_experts)
        rollout = replace(rollout, version=jnp.where(rollout.response_mask, jnp.int32(version), 0))
        rollout = jax.block_until_ready(engines.place(rollout))
    with timed("score") as scoring_time:
        old, _ = score_old(engines, params, rollout, engines.replay)
        live = _live(engines, params, rollout)
        jax.block_until_ready((old, live))
    return Unfinished(rollout, old, live, prompts, 1, seconds | scoring_time)


def go_on(engines: Engines, params: dict, one: Unfinished, step: int, version: int) -> tuple[Unfinished, Statistics]:
    """One more round, by parameters of ``version`` global steps, and the statistics of `score`.

    The margin and the load of the routers are the round's, of the whole batch.
    """
    config, model = engines.config.rollout, engines.config.model
    past, begun = engines.place((one.rollout, one.old, one.live)), one.rounds * config.partial
    rollout, old, live = past
    last = one.rounds + 1 == config.lag
    length = config.response_length - begun if last else config.partial
    with timed("sample") as sampling_time:
        rollout = go_on_sampling(
            engines, inference_weights(engines, params, step), rollout, one.prompts, step, begun, length
        )
        assert rollout.version is not None
        drawn = rollout.response_mask.at[:, :begun].set(False)
        rollout = replace(rollout, version=jnp.where(drawn, jnp.int32(version), rollout.version))
        rollout = jax.block_until_ready(engines.place(rollout))
    with timed("score") as scoring_time:
        first = rollout.prompt_length + begun - 1  # it is fed to draw the round's first token
        given, replay = rollout, engines.replay
        if replay is RoutingReplay.R2:
            assert old.routes is not None
            given = replace(rollout, routes=old.routes.at[:, :, first:].set(model.num_experts))
            replay = RoutingReplay.R3
        new, statistics = score_old(engines, params, given, replay)
        old = _joined(old, new, begun, first)
        if live is not None:
            of_round = _live(engines, params, rollout)
            assert of_round is not None
            live = _joined(live, of_round, begun, first)
        jax.block_until_ready((old, live))
    statistics = statistics | {"policy/entropy": mean_of(old.entropy, rollout.response_mask)}
    seconds = sampling_time | scoring_time
    seconds = {name: one.seconds[name] + seconds[name] for name in seconds}
    return replace(one, rollout=rollout, old=old, live=live, rounds=one.rounds + 1, seconds=seconds), statistics


@jax.jit
def lag_statistics(rollout: Rollout, step: jax.Array | int) -> Statistics:
    """Global steps from the parameters that drew a token to those that global step ``step`` begins with."""
    assert rollout.version is not None
    return {"staleness/lag": mean_of(step - 1.0 - rollout.version, rollout.response_mask)}


def _live(engines: Engines, params: dict, rollout: Rollout) -> PolicyScores | None:
    scores = score_live(engines, params, rollout) if engines.replay.alters_old else None
    return None if scores is None else PolicyScores(scores.log_probs, scores.entropy, None, None, None)


@partial(jax.jit, static_argnames=("begun", "first"))
def _joined(past: PolicyScores, new: PolicyScores, begun: int, first: int) -> PolicyScores:
    """``new`` from response column ``begun`` on, and in routes from fed column ``first`` on."""

    def put(into: jax.Array, columns: jax.Array) -> jax.Array:
        if into.ndim == 4:
            return into.at[:, :, first:].set(columns[:, :, first:])
        return into.at[:, begun:].set(columns[:, begun:])

    return jax.tree.map(put, past, new)
