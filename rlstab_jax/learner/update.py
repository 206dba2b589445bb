"""One update of the target policy pi_theta: loss, gradient accumulation, optimiser step."""

import dataclasses
from functools import partial, reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.learner.loss_scale import scaled_gradient
from rlstab_jax.learner.optimizer import LearnerNumbers, TrainState, apply_gradient, without_frozen
from rlstab_jax.learner.packing import Packing, check_parts
from rlstab_jax.learner.predictor import Observed, divergence, fed_alone, learn
from rlstab_jax.learner.score import PolicyScores, policy_scores, replayed_routes
from rlstab_jax.models.layers import RouterSums, Routing
from rlstab_jax.models.precision import Precision
from rlstab_jax.models.remat import Remat
from rlstab_jax.models.sharding import laid_out
from rlstab_jax.models.transformer import Transformer
from rlstab_jax.objectives import Objective, coefficients, surrogate
from rlstab_jax.stability.gaps import first_order, staleness, trust_statistics, weight_statistics
from rlstab_jax.stability.reduce import Mean, Statistics, mean_of, merge, prefixed
from rlstab_jax.stability.routing import disagreement
from rlstab_jax.types import Rollout, Routes, RoutingReplay, Scores, UserError, split_rows


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The training engine: how pi is computed and updated."""

    learning_rate: float = 1.5e-3
    """Step size of Adam after the warm-up."""
    warmup_steps: int = 20
    """Updates over which the learning rate rises linearly from 0."""
    adam_b1: float = 0.9
    """Decay of Adam's first moment."""
    adam_b2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms are exempt."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; inf for never."""
    load_balance: float = 0.0
    """Coefficient of the routers' load-balance loss."""
    router_z: float = 0.0
    """Coefficient of the routers' z loss (mean squared logsumexp)."""
    micro_batches: int = 1
    """Parts that a mini-batch is computed in, with accumulated gradients: less memory, the same update. A cold
    start's batches are split likewise, into parts of no more rows."""
    score_micro_batches: int = 1
    """Parts that the old pass scores a global batch in."""
    logits_per_chunk: int = 2**20
    """Float32 logits that exist at once in the LM head, on all devices together; larger ones suit accelerators. Of a
    quantised head those of 128 rows a device at least."""
    packing: bool = False
    """Put several short sequences into one row: a program for each eighth of the rows, the smallest that holds all."""
    remat: Remat = "full"
    """What layers keep for the backward pass: none recomputes nothing; dots keeps matrix products; full keeps the input
    of each layer alone; offload as full, but in the host's memory."""
    unroll: int = 1
    """Layers (periods of them, where kinds alternate) written out in each step of the loop over layers: less copying,
    longer to compile."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """How Adam's moments are kept between updates; bfloat16 rounds them stochastically."""
    offload_optimizer: bool = False
    """Keep Adam's moments in the host's memory between updates."""
    precision: Precision = dataclasses.field(default_factory=Precision)
    """Number formats of the training engine. Where it quantises, master weights stay float32 and gradients go straight
    through; their products are in ``dtype``. In float16 the loss is scaled, such that gradients neither vanish nor
    overflow: by twice as much after 20 updates, and by half where a gradient overflows, which is then taken anew."""
    replay: Literal["live", "r2", "r3", "pr2"] = "r3"
    """Routing replay: none, the old pass's routes (R2), the inference engine's (R3), or those that the old pass
    foretells (PR2)."""
    predictor_rate: float = 3e-5
    """Step size of Adam for PR2's predictors of routes. The paper's is 1e-3 to 1e-2, for routers that read 2,048
    numbers; those of the studies read 64, and foretell better by 3e-5 than by 1e-4 or 1e-3."""
    predictor_tokens: int = 256
    """Tokens of each response and its prompt, evenly spread, that PR2's predictors learn from; they are kept with what
    each router read, layers x (model.embed_dim + model.num_experts) numbers a token; as many of every token of a part
    (score_micro_batches) while that is scored."""
    live_gap: bool = True
    """Where replay alters pi_old (R3, PR2): score each batch once more, with live routing, for discrepancy_live/*.
    Nothing else depends on it: without it a run is the same, less one scoring pass of each global step. It may change
    when a run goes on, but not with ``rollout.partial``."""
    replay_of: Literal["recorded", "permuted", "initial"] = "recorded"
    """What R3 replays: what the inference engine recorded, or a control in its place: the experts of another token of
    the row, or what the training engine chooses at the weights that RL began with."""
    freeze: tuple[str, ...] = ()
    """Parameters that RL does not update: those whose path holds one of these names, such as router."""

    def numbers(self) -> "LearnerNumbers":
        """The traced part: changing one of these recompiles nothing."""
        names = [field.name for field in dataclasses.fields(LearnerNumbers)]
        return LearnerNumbers(**{name: np.float32(getattr(self, name)) for name in names})


@struct.dataclass
class Minibatch:
    """Rows to update on. Rows are axis 0, but axis 1 in routes; whole groups only.

    Attributes:
      rollout: what mu sampled.
      old: pi_old's scores of it, with the routes that it used and its live choices.
      advantage: [batch] or [batch, R].
      groups: equal numbers for the responses of one prompt; any numbers, they are renumbered.
      reference: log-probs of the reference policy, or None.
    """

    rollout: Rollout
    old: PolicyScores
    advantage: Float[Array, "batch *R"]
    groups: Int[Array, "batch"]
    reference: Float[Array, "batch R"] | None = None


def router_losses(sums: RouterSums, load: Array, tokens: Array, numbers: LearnerNumbers, k: int) -> Array:
    """Load-balance and z losses of (part of) a mini-batch, summed over layers: a plain sum over its tokens.

    Load balance: E sum_e f_e P_e with f_e the share of assignments and P_e the mean probability over the *whole*
    mini-batch, whose ``load`` [layer, E] and ``tokens`` [layer] are given, so that accumulation is exact; 1 at uniform.
    """
    tokens = jnp.maximum(tokens, 1.0)
    share = jax.lax.stop_gradient(load / (tokens[:, None] * k))
    balance = load.shape[-1] * jnp.sum(share * sums.probability / tokens[:, None])
    return numbers.load_balance * balance + numbers.router_z * jnp.sum(sums.z / tokens)


def accumulate(
    loss: Any, params: Any, parts: Any, micro_batches: int, scale: Float[Array, ""] | None = None
) -> tuple[Array, Statistics, Any]:
    """Sums loss, statistics and gradients over micro-batches. ``loss(params, part) -> (scalar sum, statistics)``, of
    which the sum is multiplied by ``scale``."""

    def scaled(params: Any, part: Any) -> tuple[Array, Statistics]:
        value, statistics = loss(params, part)
        return (value if scale is None else value * scale), statistics

    value_and_grad = jax.value_and_grad(scaled, has_aux=True)
    if micro_batches == 1:
        (value, statistics), gradient = value_and_grad(params, parts)
        return value, statistics, gradient

    def add(total: dict, part: Any) -> tuple[dict, tuple]:
        of_part, gradient = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, gradient), of_part

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, (values, statistics) = jax.lax.scan(add, zeros, split_rows(parts, micro_batches))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], statistics) for i in range(micro_batches)]
    return values.sum(), reduce(merge, each), gradient


@partial(
    jax.jit,
    static_argnames=("model", "replay", "micro_batches", "logits_per_chunk", "use_router_losses", "freeze"),
    donate_argnames="state",
)
def update(
    model: Transformer,
    state: TrainState,
    minibatch: Minibatch,
    objective: Objective,
    numbers: LearnerNumbers,
    *,
    replay: RoutingReplay,
    micro_batches: int = 1,
    logits_per_chunk: int = 2**20,
    use_router_losses: bool = False,
    packing: Packing | None = None,
    freeze: tuple[str, ...] = (),
    teach: Bool[Array, ""] | bool | None = None,
) -> tuple[TrainState, Statistics, dict[str, Float[Array, ""]]]:
    """One gradient step on a mini-batch.

    Args:
      model: the architecture, with the training engine's precision and kernels.
      state: donated.
      minibatch: rows divide by ``micro_batches``.
      objective: its numbers are traced.
      numbers: of the learner; traced.
      replay: static; it decides which recorded routes are passed in (`replayed_routes`).
      use_router_losses: compile the router losses in.
      packing: a `plan` of the mini-batch's rows for these ``micro_batches``, or None to run the rows as they are.
      freeze: static; names of parameters that stay as they are, see `apply_gradient`.
      teach: under PR2, whether the predictors learn: not where ``state`` is what the old pass scored with.

    Returns:
      The new state, unreduced statistics (to merge over a step's updates), and the measures of this update alone.
    """
    check_parts(packing, micro_batches)
    if replay is RoutingReplay.PR2 and (state.predictor is None or minibatch.old.observed is None):
        raise UserError(
            "replay 'pr2' needs a state with predictors (init_state(..., predictor=True)) and an old pass that "
            "observed the routers (score(..., observed_tokens=n)); without them it would be R2, so ask for 'r2'"
        )
    minibatch = model.layout.constrain_rows(minibatch)
    rollout = minibatch.rollout
    # Group numbers in [0, rows), as objectives expect: the first row of each group.
    groups = jnp.argmax(minibatch.groups[:, None] == minibatch.groups[None, :], axis=1)
    routes = replayed_routes(replay, rollout, minibatch.old.routes)
    if minibatch.old.router is not None and replay is RoutingReplay.LIVE:
        # The routers' shift is measured at the experts that pi_old used, whatever pi_theta chooses.
        model, routes = model.clone(replay=False), minibatch.old.routes
    # Under replay the routes are fixed for the update, so the old pass's own ones are not needed twice.
    old = dataclasses.replace(minibatch.old, routes=None, observed=fed_alone(minibatch.old.observed, rollout.fed_mask))
    scores = Scores(
        target=old.log_probs,
        old=old.log_probs,
        rollout=rollout.log_probs,
        mask=rollout.response_mask,
        groups=groups,
        reference=minibatch.reference,
        router_old=old.router,
    )
    rollout = dataclasses.replace(rollout, routes=None)
    c = coefficients(objective, scores)
    scores = dataclasses.replace(scores, groups=None)  # a micro-batch may hold a part of a group
    part = _Part(rollout, routes, packing, scores, old.live, minibatch.advantage, c, old.observed)
    if use_router_losses:
        load, tokens = _whole_load(model, state.params, part, micro_batches, logits_per_chunk)

    def loss(trained: tuple[dict, dict | None], part: "_Part") -> tuple[Array, Statistics]:
        part, (params, predictor) = model.layout.constrain_rows(part), trained
        target, routing = _scores(model, params, part, logits_per_chunk)
        router = None if part.scores.router_old is None else target.router
        scores = dataclasses.replace(part.scores, target=target.log_probs, entropy=target.entropy, router_target=router)
        value, parts = surrogate(objective, scores, part.advantage, part.c)
        if use_router_losses and routing is not None:
            value += router_losses(routing.sums, load, tokens, numbers, model.config.experts_per_token)
        statistics = _statistics(model, jax.lax.stop_gradient(scores), parts, part, jax.lax.stop_gradient(routing))
        if predictor is not None and part.observed is not None and routing is not None:
            kl, of_predictor = divergence(predictor, part.observed, routing.scores)
            value += (kl - jax.lax.stop_gradient(kl)) / observed  # the loss of other parameters: its gradient alone
            statistics |= of_predictor
        return value, statistics

    observed = 1 if old.observed is None else jnp.maximum(old.observed.valid.sum(), 1)
    foretelling = state.predictor
    trained = state.params, None if foretelling is None else foretelling.weights

    def gradients(scale: Array | None) -> tuple[Array, Statistics, Any, Any]:
        value, statistics, (gradient, of_predictor) = accumulate(loss, trained, part, micro_batches, scale)
        return value, statistics, without_frozen(gradient, freeze), of_predictor

    value, statistics, gradient, of_predictor, loss_scale = scaled_gradient(state.loss_scale, gradients)
    state, measures = apply_gradient(state, gradient, numbers, freeze)
    state = dataclasses.replace(state, params=laid_out(state.params, model.layout), loss_scale=loss_scale)
    if foretelling is not None and teach is not None:
        state = dataclasses.replace(state, predictor=learn(foretelling, of_predictor, numbers, teach))
    if packing is not None:
        measures["learner/packed_rows"] = jnp.float32(packing.source.shape[0])
    if loss_scale is not None:
        measures["learner/loss_scale"] = loss_scale.scale
    return state, statistics, {"learner/loss": value, **measures}


@struct.dataclass
class _Part:
    """(A part of) a mini-batch as the loss sees it."""

    rollout: Rollout
    routes: Routes | None
    packing: Packing | None
    scores: Scores
    old_live: Routes | None
    advantage: Array
    c: Array
    observed: Observed | None


def _scores(model: Transformer, params: dict, part: _Part, chunk: int) -> tuple[PolicyScores, Routing | None]:
    return policy_scores(model, {"params": params}, part.rollout, part.routes, chunk, part.packing)


def _whole_load(model: Transformer, params: dict, part: _Part, micro_batches: int, chunk: int) -> tuple[Array, Array]:
    """Assignments per layer and expert, and tokens, over all micro-batches: a forward pass of its own."""

    def one(part: _Part) -> tuple[Array, Array]:
        _, routing = _scores(model, params, part, chunk)
        if routing is None:
            raise UserError("router losses need an MoE model: set learner.load_balance and learner.router_z to 0")
        return routing.sums.load, routing.sums.tokens

    sums = jax.lax.map(one, split_rows(part, micro_batches))
    return jax.tree.map(lambda leaf: leaf.sum(0), sums)


def _statistics(model: Transformer, scores: Scores, parts: Any, part: _Part, routing: Routing | None) -> Statistics:
    advantage = part.advantage[:, None] if part.advantage.ndim == 1 else part.advantage
    mask = scores.mask
    statistics = {
        **prefixed("staleness", staleness(scores.target, scores.old, mask)),
        **prefixed("weight", weight_statistics(parts.weight, parts.truncated, mask)),
        **prefixed("trust", trust_statistics(parts.gate, advantage, mask)),
        **prefixed("first_order", first_order(scores.target, scores.rollout, mask)),
        "learner/broken": mean_of(parts.broken, mask),
        "learner/rejected": mean_of(part.c == 0, mask),
    }
    if routing is not None and part.old_live is not None:
        fed = part.rollout.fed_mask
        statistics["routing/old_vs_target"] = disagreement(part.old_live, routing.live, fed, model.config.num_experts)
        if part.observed is not None and part.routes is not None:
            missed = disagreement(part.routes, routing.live, fed, model.config.num_experts)
            statistics["predictor/missed"] = Mean(missed.total.sum(), missed.weight.sum())
    return statistics
