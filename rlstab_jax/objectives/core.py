"""What an objective is: a composition of pure functions of arrays, and the surrogate loss that they define.

    loss = - sum c * sg[truncate(weight) * gate * advantage] * log pi_theta  +  sum_j beta_j * sum c * regulariser_j

Each piece is a plain function; ``piece(function, number=...)`` binds its numbers as a pytree, so that they are traced:
changing a coefficient recompiles nothing, changing a function compiles once.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from rlstab_jax.types import Scores, masked


def piece(function: Callable, **bound: float | Callable) -> Partial:
    """Binds the numbers of one piece of an objective, and the functions that it is built on.

    Under jit, functions are static and compared by identity (so pass functions of a module, not fresh lambdas), and
    numbers are traced.
    """

    def bind(value: float | Callable) -> float | Partial:
        return Partial(value) if callable(value) and not isinstance(value, Partial) else value

    return Partial(function, **{name: bind(value) for name, value in bound.items()})


def all_tokens(scores: Scores) -> Bool[Array, "batch R"]:
    """``select`` that rejects nothing."""
    return scores.mask


def no_trust_region(scores: Scores, advantage: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """``trust`` that gates nothing: 1 everywhere."""
    return jnp.ones_like(scores.target)


def no_truncation(scores: Scores, weight: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """``truncate`` that leaves every weight alone."""
    return weight


def plain_reward(scores: Scores, rewards: Float[Array, "batch"]) -> Float[Array, "batch"]:
    """``reward`` that adds nothing to what the verifier said."""
    return rewards


@struct.dataclass
class Regulariser:
    """One differentiable penalty: ``coefficient * sum c * term(scores)``."""

    term: Partial  # (scores) -> [batch, R]
    coefficient: float


@struct.dataclass
class Objective:
    """The pieces of an objective. All see arrays only; none sees a model.

    All but the regularisers are under stop-gradient: the gradient of a token is -c weight gate A grad log pi_theta. So
    a soft gate is the derivative of what is meant, not the function itself.

    ``weight``, ``truncate``, ``trust`` and the regularisers see micro-batches, which may hold a part of a group:
    ``scores.groups`` is None there. What depends on a whole group belongs into ``advantage``, ``normalise`` or
    ``reward``.

    Attributes:
      advantage: ``(rewards[batch], groups[batch]) -> [batch] or [batch, R]``, over the whole rollout batch, before it
        is split.
      weight: ``(scores) -> [batch, R]``, the stop-gradient importance weight of each token, before truncation; for one
        of a whole sequence ``[batch, 1]`` will do, as for what follows.
      normalise: ``(mask, groups) -> c[batch, R]``, over the whole mini-batch, before micro-batching; 0 outside the
        mask.
      truncate: ``(scores, weight[batch, R]) -> weight[batch, R]``, a cap or a band on the weight; never changes ``c``.
      trust: ``(scores, advantage[batch, R]) -> gate[batch, R]`` in [0, 1]; never changes ``c``.
      select: ``(scores) -> mask[batch, R]``, rejection that also changes ``c``. It runs before the micro-batches are
        scored, so it sees ``target == old`` and may depend on old, rollout, reference and mask only.
      regularisers: penalties added to the loss.
      reward: ``(scores, rewards[batch]) -> rewards[batch]``, a penalty that belongs to the reward, such as a KL; it
        sees ``target == old``. `advantages_of` applies it.
    """

    advantage: Partial
    weight: Partial
    normalise: Partial
    truncate: Partial = Partial(no_truncation)
    trust: Partial = Partial(no_trust_region)
    select: Partial = Partial(all_tokens)
    regularisers: tuple[Regulariser, ...] = ()
    reward: Partial = Partial(plain_reward)


@struct.dataclass
class SurrogateParts:
    """What the surrogate was made of, for the diagnostics: each [batch, R]."""

    weight: Float[Array, "batch R"]  # after truncation
    truncated: Bool[Array, "batch R"]
    gate: Float[Array, "batch R"]
    broken: Bool[Array, "batch R"]  # in the mask, but with a NaN or infinite log-prob or advantage: counts as exactly 0


def advantages_of(
    objective: Objective, scores: Scores, rewards: Float[Array, "batch"]
) -> Float[Array, "batch"] | Float[Array, "batch R"]:
    """The advantages of a whole rollout batch, with the penalties that the objective keeps in the reward.

    ``scores.target`` is ignored: it is replaced by ``scores.old``.
    """
    return objective.advantage(objective.reward(replace(scores, target=scores.old), rewards), scores.groups)


def coefficients(objective: Objective, scores: Scores) -> Float[Array, "batch R"]:
    """``c`` of a whole mini-batch, from ``select`` and ``normalise``. Call it before splitting into micro-batches.

    ``scores.target`` is ignored: it is replaced by ``scores.old``. A token whose log-prob is NaN or infinite stays in
    the denominators.
    """
    clean, _ = _without_broken(replace(scores, target=scores.old))
    selected = objective.select(clean) & scores.mask
    return masked(objective.normalise(selected, scores.groups), selected)


def surrogate(
    objective: Objective,
    scores: Scores,
    advantage: Float[Array, "batch R"] | Float[Array, "batch"],
    c: Float[Array, "batch R"],
) -> tuple[Float[Array, ""], SurrogateParts]:
    """The loss of (part of) a mini-batch: a plain sum, so that sums over micro-batches and shards are exact.

    A token of which a log-prob or the advantage is NaN or infinite adds exactly 0 to the loss and to its gradient with
    respect to the log-probs, its ratios count as 1 in those of its sequence, and ``parts.broken`` shows it. A model
    whose own numbers are NaN has a gradient of NaN all the same, and the update is skipped.

    Args:
      objective: the composition.
      scores: log-probs of these rows; differentiable in ``target`` and ``entropy``.
      advantage: of these rows.
      c: their coefficients, from `coefficients` over the whole mini-batch.

    Returns:
      The loss to minimise, and its parts.
    """
    if advantage.ndim == 1:
        advantage = advantage[:, None]
    advantage = jnp.broadcast_to(advantage, scores.target.shape)
    scores, finite = _without_broken(scores)
    used = finite & jnp.isfinite(advantage) & (c != 0)
    frozen = jax.lax.stop_gradient(scores)
    whole = partial(jnp.broadcast_to, shape=scores.target.shape)  # a sequence's weight may be [batch, 1]
    raw = whole(objective.weight(frozen))
    weight = whole(objective.truncate(frozen, raw))
    parts = SurrogateParts(
        weight=weight,
        truncated=weight != raw,
        gate=whole(objective.trust(frozen, advantage)),
        broken=scores.mask & ~(finite & jnp.isfinite(advantage)),
    )
    factor = masked(c * parts.weight * parts.gate * advantage, used)
    loss = -jnp.sum(factor * scores.target)
    for regulariser in objective.regularisers:
        loss += regulariser.coefficient * jnp.sum(masked(c * regulariser.term(scores), used))
    return loss, jax.lax.stop_gradient(parts)


def _without_broken(scores: Scores) -> tuple[Scores, Bool[Array, "batch R"]]:
    """Scores with 0 wherever a token is outside the mask or has a log-prob that is no finite number, and who is left.

    The pieces then never meet a NaN, in values or in gradients: masking their results would be too late for the latter.
    """
    names = (field.name for field in fields(scores) if field.name not in ("mask", "groups"))
    given = {name: getattr(scores, name) for name in names if getattr(scores, name) is not None}
    finite = scores.mask
    for values in given.values():
        finite &= jnp.isfinite(values).reshape(*finite.shape, -1).all(-1)
    clean = {name: jnp.where(jnp.expand_dims(finite, range(2, v.ndim)), v, 0.0) for name, v in given.items()}
    return replace(scores, **clean), finite
