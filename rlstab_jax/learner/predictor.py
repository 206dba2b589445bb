"""Predictive routing replay (PR2, arXiv 2606.00395): a linear predictor of each router foretells how updates change it.

The old pass routes by the top-k of rho_hat = softmax(z_old + h_old W): z are the router's logits, h is what it reads,
and W [d, E] its predictor, 0 at first, which is R2. Gate weights stay the router's own. The updates replay these
routes, so that pi_theta / pi_old is 1 at equal weights, as under R2 and R3. From the second update of a batch on W
learns by

    L = sum_layers mean_tokens KL(rho_theta || rho_hat),

with rho_theta the router at the weights that are updated, which gets no gradient from it. The first update is left out,
since nothing has changed there. W has Adam of its own, and a rate of its own.

The inference engine knows no predictor: mu routes live, as under R2.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.models.by_layer import layers_of
from rlstab_jax.models.layers import PREDICTOR, Routing
from rlstab_jax.stability.reduce import Statistics, mean_of
from rlstab_jax.types import masked


@struct.dataclass
class Predictor:
    """The predictors of all routers.

    Attributes:
      weights: W of each, float32: the model's collection `PREDICTOR`, stacked as its parameters are.
      moments: of Adam.
    """

    weights: dict
    moments: Any


@struct.dataclass
class Observed:
    """What the routers read and said in the old pass, at some fed tokens of each row; layers in depth order.

    Attributes:
      columns: of these tokens, evenly spread over the fed ones.
      valid: False where a row has fewer.
      inputs: h_old.
      log_probs: log softmax(z_old).
    """

    columns: Int[Array, "batch kept"]
    valid: Bool[Array, "batch kept"]
    inputs: Float[Array, "batch kept layer*d"]
    log_probs: Float[Array, "batch kept layer*expert"]


def init_predictor(params: dict) -> Predictor:
    """One that foretells that nothing changes, for a model's parameters."""
    weights = _zeros_for_routers(params)
    return Predictor(weights, optax.scale_by_adam().init(weights))


def _zeros_for_routers(params: dict) -> dict:
    weights: dict = {}
    for name, node in params.items():
        if name == "router":
            weights["predictor"] = jnp.zeros(node["kernel"].shape, jnp.float32)
        elif isinstance(node, dict) and (inner := _zeros_for_routers(node)):
            weights[name] = inner
    return weights


def evenly_spread(fed_mask: Bool[Array, "batch fed"], kept: int) -> tuple[Int[Array, "batch kept"], Array]:
    """Columns of ``kept`` tokens of each row's run of fed ones, or of all where there are fewer; and which are there.

    >>> columns, valid = evenly_spread(jnp.array([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool), 3)
    >>> columns.tolist(), valid.tolist()
    ([[1, 2, 3], [0, 1, 0]], [[True, True, True], [True, True, False]])
    """
    number, count = jnp.arange(kept), fed_mask.sum(1, keepdims=True)
    valid = number < count
    column = jnp.where(count <= kept, number, number * count // kept)
    return fed_mask.argmax(1)[:, None] + jnp.where(valid, column, 0), valid


def observe(routing: Routing, fed_mask: Bool[Array, "batch fed"], kept: int) -> Observed:
    """What is kept of an old pass: ``kept`` tokens of each row."""
    columns, valid = evenly_spread(fed_mask, min(kept, fed_mask.shape[1]))
    return Observed(columns, valid, _at(routing.inputs, columns), _at(routing.scores, columns))


def fed_alone(observed: Observed | None, fed_mask: Bool[Array, "batch fed"]) -> Observed | None:
    """What was observed of tokens that an update feeds: it may leave some out, such as responses that were cut off."""
    if observed is None:
        return None
    return replace(observed, valid=observed.valid & jnp.take_along_axis(fed_mask, observed.columns, axis=1))


def _at(x: Float[Array, "layer batch fed n"], columns: Int[Array, "batch kept"]) -> Float[Array, "batch kept layer*n"]:
    picked = jnp.take_along_axis(x, columns[None, :, :, None], axis=2)
    return jnp.moveaxis(picked, 0, 2).reshape(*columns.shape, -1)


def divergence(
    weights: dict, observed: Observed, scores: Float[Array, "layer batch fed expert"]
) -> tuple[Float[Array, ""], Statistics]:
    """KL(rho_theta || rho_hat), summed over layers and tokens, and what is logged of it. Differentiable in ``weights``.

    Args:
      weights: of the `Predictor`.
      observed: of the same rows as ``scores``.
      scores: log rho_theta of every fed token, as in `Routing`.
    """
    stacked = jnp.stack([layer[PREDICTOR]["moe"]["predictor"] for layer in layers_of({PREDICTOR: weights})])
    shape = (*observed.columns.shape, len(stacked), -1)
    old, inputs = observed.log_probs.reshape(shape), observed.inputs.reshape(shape).astype(jnp.float32)
    now = jax.lax.stop_gradient(_at(scores, observed.columns)).reshape(shape)
    change = jnp.einsum("bcld,lde->bcle", inputs, stacked, precision="highest")
    foretold = jax.nn.log_softmax(old + change, axis=-1)
    valid = jnp.broadcast_to(observed.valid[..., None], shape[:3])

    def kl(other: Array) -> Float[Array, "batch kept layer"]:
        return masked(jnp.sum(jnp.exp(now) * (now - other), axis=-1), valid)

    of_foretold = kl(foretold)
    statistics = {"predictor/kl": of_foretold, "predictor/kl_unpredicted": kl(old)}
    return of_foretold.sum(), {name: mean_of(jax.lax.stop_gradient(x), valid) for name, x in statistics.items()}


def learn(predictor: Predictor, gradient: dict, numbers: Any, teach: Bool[Array, ""] | bool) -> Predictor:
    """One step of Adam. Nothing changes unless ``teach``, nor by a gradient that is not finite.

    Args:
      gradient: of L, like the weights.
      numbers: `LearnerNumbers`.
    """
    adam = optax.scale_by_adam(b1=numbers.adam_b1, b2=numbers.adam_b2, eps=numbers.adam_eps)
    updates, moments = adam.update(gradient, predictor.moments)
    weights = jax.tree.map(lambda w, u: w - numbers.predictor_rate * u, predictor.weights, updates)
    counts = jnp.isfinite(optax.tree.norm(gradient)) & teach
    return jax.tree.map(lambda new, old: jnp.where(counts, new, old), Predictor(weights, moments), predictor)
