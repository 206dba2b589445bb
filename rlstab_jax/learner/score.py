"""The training engine's forward pass: log-probs of sampled tokens, entropy, and what the routers did."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rlstab_jax.learner.head import head_log_probs
from rlstab_jax.learner.packing import Packing, check_parts, packed_forward
from rlstab_jax.learner.predictor import Observed, observe
from rlstab_jax.models.layers import PREDICTOR, Routing
from rlstab_jax.models.sharding import laid_out
from rlstab_jax.models.transformer import Transformer, forward
from rlstab_jax.stability.reduce import Mean, Statistics, mean_of
from rlstab_jax.stability.routing import margin_statistics
from rlstab_jax.types import Rollout, Routes, RoutingReplay, UserError, join_rows, masked, split_rows


@struct.dataclass
class PolicyScores:
    """One policy's view of a rollout.

    Attributes:
      log_probs: log pi of each sampled token at the sampling temperature, nats; 0 outside the mask.
      entropy: of pi's distribution on each prefix, nats: over the rollout's support, if it has one, else over the
        vocabulary, without stop tokens where they were barred; 0 outside the mask.
      routes: experts in use, None for a dense model. ``live`` are the live choices, also under replay.
      router: log router probability of the experts in use (those watched, by a model that does not replay) at each
        response token's prefix, [batch, R, layer * k]; None for a dense model, and where it was not asked for.
      observed: what the routers' predictors learn from, under PR2.
    """

    log_probs: Float[Array, "batch R"]
    entropy: Float[Array, "batch R"]
    routes: Routes | None
    live: Routes | None
    router: Float[Array, "batch R slot"] | None
    observed: Observed | None = None


def replayed_routes(replay: RoutingReplay, rollout: Rollout, old: Routes | None) -> Routes | None:
    """The routes to replay in an update. ``old``: those that the `old` pass recorded; that pass itself gives None.

    Raises UserError where the replay asked for has no routes: training never goes on without them.
    """
    if replay is RoutingReplay.LIVE:
        return None
    routes = rollout.routes if replay is RoutingReplay.R3 else old
    if routes is None:
        raise UserError(
            f"replay {replay.value!r} needs recorded routes, but the "
            f"{'rollout' if replay is RoutingReplay.R3 else 'old pass'} has none: use an MoE model and a sampler that "
            "records routes, or replay = 'live'"
        )
    return routes


def policy_scores(
    model: Transformer,
    variables: dict,
    rollout: Rollout,
    routes: Routes | None,
    logits_per_chunk: int,
    packing: Packing | None = None,
) -> tuple[PolicyScores, Routing | None]:
    """Scores a rollout teacher-forced, with the given routes or live ones. Differentiable in ``variables``.

    With a ``packing`` of its rows the model runs on fewer ones, with the same results.

    Also returns the whole routing, for diagnostics and router losses; what nobody uses is never computed.
    """
    rollout, routes, packing = model.layout.constrain_rows((rollout, routes, packing))
    variables = variables | {"params": laid_out(variables["params"], model.layout)}
    if packing is None:
        output = forward(model, variables, rollout.tokens[:, :-1], rollout.fed_mask, routes)
    else:
        output = packed_forward(model, variables, rollout, routes, packing)
    first = rollout.prompt_length - 1  # the last prompt token predicts the first response token
    hidden = output.hidden[:, first:]
    batch, length, d = hidden.shape
    barred = None
    if rollout.minimum is not None and rollout.support is None:  # a support holds none of them
        barred = rollout.minimum.barred(length, model.config.vocab_size).reshape(batch * length, -1)
    with jax.named_scope("lm_head"):
        log_probs, entropy = head_log_probs(
            model,
            variables,
            hidden.reshape(batch * length, d),
            rollout.tokens[:, rollout.prompt_length :].reshape(-1),
            jnp.repeat(rollout.temperature, length),
            None if rollout.support is None else rollout.support.reshape(batch * length, -1),
            logits_per_chunk,
            barred,
        )
    mask = rollout.response_mask
    log_probs, entropy = (masked(x.reshape(batch, length), mask) for x in (log_probs, entropy))
    routing = output.routing
    if routing is None:
        return PolicyScores(log_probs, entropy, None, None, None), None
    router = jnp.moveaxis(routing.log_probs[:, :, first:], 0, 2).reshape(batch, length, -1)
    return PolicyScores(log_probs, entropy, routing.used, routing.live, router), routing


def score_statistics(
    rollout: Rollout,
    entropy: Float[Array, "batch R"],
    margin: Float[Array, "layer batch fed"] | None,
    load: Float[Array, "layer expert"] | None,
) -> Statistics:
    """Unreduced statistics of a scoring pass: entropy, and per MoE layer the routers' margin and the experts' load."""
    statistics: Statistics = {"policy/entropy": mean_of(entropy, rollout.response_mask)}
    if margin is not None and load is not None:
        statistics["routing/margin"] = margin_statistics(margin, rollout.fed_mask)
        statistics["routing/load"] = Mean(load, jnp.ones_like(load))
    return statistics


@partial(jax.jit, static_argnames=("model", "replay", "micro_batches", "logits_per_chunk", "router", "observed_tokens"))
def score(
    model: Transformer,
    variables: dict,
    rollout: Rollout,
    *,
    replay: RoutingReplay = RoutingReplay.LIVE,
    micro_batches: int = 1,
    logits_per_chunk: int = 2**20,
    packing: Packing | None = None,
    router: bool = True,
    observed_tokens: int = 0,
) -> tuple[PolicyScores, Statistics]:
    """The `old` pass: pi_old on a rollout. Under R3 it replays the rollout's routes; R2 records, so it routes live; so
    does PR2, but by what the predictors foretell.

    Args:
      model: the architecture, with the training engine's precision and kernels.
      variables: {"params": ...}, and under PR2 the predictors' weights as `PREDICTOR`.
      rollout: from the inference engine; its rows divide by ``micro_batches``.
      replay: static; it decides whether the rollout's routes are passed in.
      micro_batches: the rows are scored in that many parts, one after another.
      logits_per_chunk: how many float32 logits exist at once.
      packing: a `plan` of the rollout's rows for these ``micro_batches``, or None to run the rows as they are.
      router: static; whether the scores keep the routers' log probabilities, which are large and which few objectives
        read.
      observed_tokens: static; of how many tokens of each row the scores keep what the routers read and said.

    Returns:
      The scores, and the `score_statistics`.
    """
    check_parts(packing, micro_batches)
    if replay is RoutingReplay.PR2 and PREDICTOR not in variables:
        raise UserError(
            f"replay 'pr2' needs the predictors' weights as variables[{PREDICTOR!r}]; without them the old pass routes "
            "live, as under 'r2'"
        )
    if replay is RoutingReplay.R3:
        replayed_routes(replay, rollout, None)
    else:
        rollout = replace(rollout, routes=None)

    def one(parts: tuple[Rollout, Packing | None]) -> tuple[PolicyScores, Statistics]:
        part, packing = parts
        scores, routing = policy_scores(model, variables, part, part.routes, logits_per_chunk, packing)
        if not router:
            scores = replace(scores, router=None)
        if observed_tokens and routing is not None:
            scores = replace(scores, observed=observe(routing, part.fed_mask, observed_tokens))
        margin, load = (None, None) if routing is None else (routing.margin, routing.sums.load)
        return scores, score_statistics(part, scores.entropy, margin, load)

    on_rows = model.layout.constrain_rows
    if micro_batches == 1:
        scores, statistics = one((rollout, packing))
        return on_rows(scores), statistics
    scores, statistics = jax.lax.map(one, split_rows((rollout, packing), micro_batches))
    return on_rows(join_rows(scores)), jax.tree.map(lambda leaf: leaf.sum(0), statistics)
