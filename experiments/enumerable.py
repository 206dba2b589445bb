"""A tiny MoE policy whose sequences are enumerated, so that every expectation is an exact sum, in float64.

Sequences have at most `Setting.length` tokens, and token 0 stops. Two layers of routed experts feed the recurrence, so
that a flipped expert changes later tokens too. The objectives are the package's own compositions.
`experiments.first_order` is the study.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from rlstab_jax.objectives import Objective, coefficients, minirl, piece, sequence_is, surrogate, weights
from rlstab_jax.types import Scores

Params = dict[str, Array]
Routes = Bool[Array, "t layer y expert"]  # True on the experts of each token: sets, without an order
METHODS = ("weight", "no_weight", "length_normalised")
MODES = ("live", "r2", "r3")
STALE_UPDATES = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """The toy. Its 364 sequences of up to 5 tokens are enumerated."""

    vocab: int = 4
    length: int = 5
    width: int = 8
    experts: int = 4
    top_k: int = 2
    layers: int = 2
    seeds: int = 16
    learning_rate: float = 0.03


def enumerate_sequences(vocab: int, length: int) -> tuple[Int[np.ndarray, "y t"], Bool[np.ndarray, "y t"]]:
    """All sequences that end in token 0 or at ``length``, and the mask up to and including the stop token."""
    tokens = np.indices((vocab,) * length).reshape(length, -1).T
    stopped = np.cumsum(tokens == 0, axis=1)
    mask = stopped - (tokens == 0) == 0
    canonical = ((tokens == 0) | mask).all(1)  # after the stop token, only zeros: each sequence once
    return tokens[canonical], mask[canonical]


def init(key: Array, setting: Setting) -> Params:
    w, e, n = setting.width, setting.experts, setting.layers
    shapes = {"embed": (setting.vocab + 1, w), "recur": (w, w), "router": (n, w, e), "up": (n, e, w, w)}
    shapes |= {"down": (n, e, w, w), "head": (w, setting.vocab)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape) * (1.0 if name == "embed" else w**-0.5)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"bias": jnp.zeros(setting.vocab).at[0].set(-1.0)}  # stop seldom, so that lengths differ


def policy(
    params: Params, tokens: Int[Array, "y t"], top_k: int, routes: Routes | None = None, selector: Array | None = None
) -> tuple[Float[Array, "y t"], Routes]:
    """log pi(y_t | y_<t) of every token, and the experts used.

    Args:
      routes: experts to replay; gates come from the live scores of those experts.
      selector: a router that chooses the experts in place of ``params["router"]``, which still weighs them.
    """
    count, layers = tokens.shape[0], params["router"].shape[0]

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array | None]):
        z, previous = carry
        token, replayed = inputs
        z, used = jnp.tanh(params["embed"][previous] + z @ params["recur"]), []
        for layer in range(layers):
            scores = jax.nn.softmax(z @ params["router"][layer])
            selected = scores if selector is None else z @ selector[layer]
            chosen = selected >= lax.top_k(selected, top_k)[0][:, -1:] if replayed is None else replayed[layer]
            gate = jnp.where(chosen, scores, 0.0)
            hidden = jnp.tanh(jnp.einsum("yw,ewd->eyd", z, params["up"][layer]))
            z = z + jnp.einsum("ye,eyd,edw->yw", gate / gate.sum(1, keepdims=True), hidden, params["down"][layer])
            used.append(chosen)
        log_p = jax.nn.log_softmax(z @ params["head"] + params["bias"])
        return (z, token), (jnp.take_along_axis(log_p, token[:, None], 1)[:, 0], jnp.stack(used))

    start = (jnp.zeros((count, params["recur"].shape[0])), jnp.full(count, params["embed"].shape[0] - 1))
    log_probs, routes = lax.scan(step, start, (tokens.T, routes))[1]
    return log_probs.T, routes


def rounded(params: Params, step: Array) -> Params:
    """Weights on a uniform grid of ``step`` times the tensor's largest weight: the inference engine's precision."""
    grid = {name: jnp.where(step > 0, step, 1.0) * jnp.abs(w).max() for name, w in params.items()}
    return {name: jnp.where(step > 0, jnp.round(w / grid[name]) * grid[name], w) for name, w in params.items()}


# The objectives, as the package composes them: nothing is clipped or capped, so that the approximation alone remains.
TOKEN = minirl(eps_low=np.inf, eps_high=np.inf, cap=np.inf)
OBJECTIVES: dict[str, Objective] = {
    "sequence": sequence_is(),
    "weight": TOKEN,
    "no_weight": TOKEN.replace(weight=piece(weights.unweighted)),
    "length_normalised": minirl(eps_low=np.inf, eps_high=np.inf, cap=np.inf, length_normalise=True),
}


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """All sequences, and exact expectations over them. A row with an empty mask is no sequence."""

    tokens: Int[Array, "y t"]
    mask: Bool[Array, "y t"]
    top_k: int

    def up_to(self, length: Array) -> "Enumeration":
        """Sequences cut at ``length`` tokens. One of each continuation is kept: the one that stops next."""
        time = jnp.arange(self.tokens.shape[1])
        cut = self.mask & (time < length)
        whole = self.mask.sum(1) <= length
        stops_next = (self.mask.sum(1) == length + 1) & jnp.where(time == length, self.tokens == 0, True).all(1)
        return dataclasses.replace(self, mask=cut & (whole | stops_next)[:, None])

    def log_probs(self, params: Params, routes: Routes | None = None, selector: Array | None = None):
        log_probs, routes = policy(params, self.tokens, self.top_k, routes, selector)
        return jnp.where(self.mask, log_probs, 0.0), routes

    def probability(self, log_mu: Array) -> Float[Array, "y"]:
        return jnp.where(self.mask.any(1), jnp.exp(log_mu.sum(1)), 0.0)

    def gradients(
        self, objectives: Iterable[str], params: Params, routes: Routes | None, log_mu: Array, advantage: Array
    ) -> dict[str, Float[Array, "parameter"]]:
        """grad of E_{y ~ mu_old}[objective] for each objective, with pi_theta on ``routes`` (its own where None)."""
        log_pi, pull = jax.vjp(lambda params: self.log_probs(params, routes)[0], params)

        def at_tokens(objective: Objective) -> Array:
            """The gradient with respect to log pi_theta of each token, weighted with the sequence's probability."""
            scores = Scores(log_pi, log_pi, log_mu, self.mask, jnp.arange(self.mask.shape[0]))
            # `coefficients` counts each response as 1 of all: here it counts with its probability.
            c = coefficients(objective, scores) * self.mask.any(1).sum() * self.probability(log_mu)[:, None]
            return -jax.grad(lambda target: surrogate(objective, scores.replace(target=target), advantage, c)[0])(
                log_pi
            )

        names = list(objectives)
        pulled = jax.vmap(lambda tokens: ravel_pytree(pull(tokens)[0])[0])(
            jnp.stack([at_tokens(OBJECTIVES[name]) for name in names])
        )
        return dict(zip(names, pulled, strict=True))

    def gap(self, log_pi: Array, log_mu: Array) -> tuple[Array, Array]:
        """E_mu |pi/mu - 1| and E_mu (pi/mu - 1)^2 = chi^2(pi || mu), per token."""
        c = self.probability(log_mu)[:, None] * self.mask
        delta = jnp.expm1(log_pi - log_mu)
        return jnp.sum(c * jnp.abs(delta)) / c.sum(), jnp.sum(c * delta**2) / c.sum()

    def value_error(self, log_pi: Array, log_mu: Array, advantage: Array) -> Array:
        """|J_seq - J_token - E_mu[(1 - |y|) A]| / E_mu |A|, which the paper says is of second order."""
        p, delta = self.probability(log_mu), jnp.expm1(log_pi - log_mu) * self.mask
        remainder = jnp.expm1((log_pi - log_mu).sum(1)) - delta.sum(1)
        return jnp.abs(jnp.sum(p * advantage * remainder)) / jnp.sum(p * jnp.abs(advantage))

    def advantage(self, rewards: Array, log_mu: Array) -> Array:
        """R - E_mu R: MiniRL's, for an infinite group."""
        return rewards - jnp.sum(self.probability(log_mu) * rewards)


def relative(estimate: Array, truth: Array) -> dict[str, Array]:
    norm = jnp.linalg.norm
    return {
        "error": norm(estimate - truth) / norm(truth),
        "cosine": estimate @ truth / (norm(estimate) * norm(truth)),
    }


def problem(key: Array, setting: Setting, world: Enumeration) -> tuple[Params, Array, Array]:
    """Parameters, a random binary reward for each sequence, and a direction in which to perturb the router."""
    parts = jax.random.split(key, 3)
    params = init(parts[0], setting)
    rewards = jax.random.bernoulli(parts[1], 0.3, (world.mask.shape[0],)).astype(float)
    return params, rewards, jax.random.normal(parts[2], params["router"].shape)


def ascend(world: Enumeration, params: Params, steps: Array, rate: float, routes, log_mu: Array, advantage: Array):
    """``steps`` updates along the expected token-level gradient."""
    flat, unravel = ravel_pytree(params)

    def update(_, flat: Array) -> Array:
        return flat + rate * world.gradients(["weight"], unravel(flat), routes, log_mu, advantage)["weight"]

    return unravel(lax.fori_loop(0, steps, update, flat))


def one_gap(setting: Setting, every: Enumeration, key: Array, cases: Float[Array, "case 4"]) -> dict[str, Array]:
    """Errors for each case: (rounding step, learning rate, perturbation of the router), two of them zero, and a length.

    Experts are those of the unperturbed theta_old everywhere, but for mu_old under a perturbed router.
    """
    params, rewards, direction = problem(key, setting, every)
    _, routes = every.log_probs(params)

    def case(_, sizes: Array):
        step, rate, perturbation, length = sizes
        world = every.up_to(length)
        _, mu_routes = world.log_probs(params, selector=params["router"] + perturbation * direction)
        log_mu, _ = world.log_probs(rounded(params, step), mu_routes)
        advantage = world.advantage(rewards, log_mu)
        updates = jnp.where(rate > 0, STALE_UPDATES, 0)
        theta = ascend(world, params, updates, rate, routes, log_mu, advantage)
        log_pi, _ = world.log_probs(theta, routes)
        gradients = world.gradients(OBJECTIVES, theta, routes, log_mu, advantage)
        row = {"gap": world.gap(log_pi, log_mu)[0], "value": world.value_error(log_pi, log_mu, advantage)}
        for method in METHODS:
            errors = relative(gradients[method], gradients["sequence"])
            row |= {f"{method}_{name}": value for name, value in errors.items()}
        return None, row

    return lax.scan(case, None, cases)[1]


def replay(setting: Setting, world: Enumeration, key: Array, cases: Float[Array, "case 2"]) -> dict[str, Array]:
    """Total error, bias and approximation of each replay mode against the naturally routed sequence-level gradient:
    arrays [case, mode].

    ``cases`` are pairs (rounding step of mu_old, updates since the rollout). All modes are judged at the same theta.
    """
    params, rewards, _ = problem(key, setting, world)
    _, old_routes = world.log_probs(params)

    def case(_, pair: Array):
        log_mu, mu_routes = world.log_probs(rounded(params, pair[0]))
        advantage = world.advantage(rewards, log_mu)
        theta = ascend(world, params, pair[1].astype(int), setting.learning_rate, None, log_mu, advantage)
        _, live_routes = world.log_probs(theta)
        routes = jnp.stack([live_routes, old_routes, mu_routes])  # in the order of MODES
        gradients = jax.vmap(lambda routes: world.gradients(["sequence", "weight"], theta, routes, log_mu, advantage))(
            routes
        )
        sequence, token, truth = gradients["sequence"], gradients["weight"], gradients["sequence"][0]
        norm = partial(jnp.linalg.norm, axis=-1)
        flipped = (routes != live_routes).any(-1) & world.mask.T[:, None]
        gap, chi_square = jax.vmap(lambda routes: world.gap(world.log_probs(theta, routes)[0], log_mu))(routes)
        return None, {
            "total": norm(token - truth) / norm(truth),
            "bias": norm(sequence - truth) / norm(truth),
            "approximation": norm(token - sequence) / norm(truth),
            "flipped": flipped.sum((1, 2, 3)) / (world.mask.sum() * setting.layers),
            "gap": gap,
            "chi_square": chi_square,
        }

    return lax.scan(case, None, cases)[1]
