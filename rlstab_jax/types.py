"""The arrays that travel between the rooms of the code. This file imports nothing else of the package.

Layout of a row: ``tokens[batch, prompt_length + response_length]``. Prompts are right-aligned, responses left-aligned,
and they meet at column ``prompt_length``. Response arrays are ``[batch, response_length]`` with a mask. One layout,
from the sampler to the loss.
"""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

# The experts chosen for each token that was *fed* to the model: ``fed = time - 1``, because the last token of a row
# never is. MoE layers in depth order. The value ``num_experts`` means "not recorded: route live". ``uint8`` up to 255
# experts, else ``uint16``.
Routes = UInt[Array, "layer batch fed expert_per_token"]


class UserError(ValueError):
    """A mistake that the user can mend. Its message names the file, field or shape, what was expected, what to do."""


def one_line(error: BaseException) -> str:
    """What code that is not ours has raised, as a part of a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


Poll = Callable[[], None]
"""Called by long work now and then, on all processes alike; what it raises ends the work."""


def undisturbed() -> None:
    """The `Poll` of work that is never given up."""


class RoutingReplay(enum.Enum):
    """Which recorded experts the training engine uses (gate weights are always live)."""

    LIVE = "live"  # none: each pass routes by its own scores
    R2 = "r2"  # e^pi_old: recorded by the training engine's `old` pass, replayed in the updates
    R3 = "r3"  # e^mu_old: recorded by the inference engine, replayed in the `old` pass and in the updates
    PR2 = "pr2"  # foretold in the `old` pass by a predictor of each router, replayed in the updates (arXiv 2606.00395)

    @property
    def alters_old(self) -> bool:
        """Whether the `old` pass does not use its own live choice either, so that pi_old is another policy."""
        return self in (RoutingReplay.R3, RoutingReplay.PR2)


@struct.dataclass
class MinimalLength:
    """Responses of at least ``tokens`` tokens before a stop token: none of ``stop_ids`` could be drawn earlier."""

    tokens: Int[Array, "batch"]
    stop_ids: Int[Array, "batch stops"]

    def barred(self, response_length: int, vocab_size: int) -> Int[Array, "batch response_length stops"]:
        """What could not be drawn at each position; places not in use hold the vocabulary's size.

        >>> MinimalLength(jnp.array([1]), jnp.array([[3, 5]])).barred(2, 9).tolist()
        [[[3, 5], [9, 9]]]
        """
        early = jnp.arange(response_length)[:, None] < self.tokens[:, None, None]
        return jnp.where(early, self.stop_ids[:, None], vocab_size)


@struct.dataclass
class Rollout:
    """Responses y ~ mu_old, with what the inference engine recorded while it sampled them.

    Attributes:
      tokens: prompt and response of each row.
      prompt_mask: True on real prompt tokens (right-aligned).
      response_mask: True up to and including the stop token, or the token that completes a stop string (left-aligned).
      log_probs: log mu_old of each sampled token under the very distribution it was drawn from, in nats; 0 outside the
        mask.
      truncated: True where the response met the length limit without a stop token or a stop string.
      routes: experts used by the inference engine, or None for a dense model or where recording was off.
      temperature: sampling temperature of each row; the training engine scores at the same one.
      support: the tokens that each draw was made from, in no order, where sampling was truncated (top-k, top-p, min-p);
        places not in use hold the vocabulary's size. The training engine renormalises over it, so that the importance
        ratio is taken at the true distribution on both sides. None: the whole vocabulary.
      minimum: where stop tokens were barred from the first draws. The training engine bars them too. None: nowhere.
      version: under partial rollouts, the global steps that the parameters which drew each token had taken; 0 outside
        the mask. None: they are the same for all tokens.
    """

    tokens: Int[Array, "batch time"]
    prompt_mask: Bool[Array, "batch prompt_length"]
    response_mask: Bool[Array, "batch response_length"]
    log_probs: Float[Array, "batch response_length"]
    truncated: Bool[Array, "batch"]
    routes: Routes | None
    temperature: Float[Array, "batch"]
    support: Int[Array, "batch response_length kept"] | None = None
    minimum: MinimalLength | None = None
    version: Int[Array, "batch response_length"] | None = None

    @property
    def prompt_length(self) -> int:
        return self.prompt_mask.shape[1]

    @property
    def response_length(self) -> int:
        return self.response_mask.shape[1]

    @property
    def valid(self) -> Bool[Array, "batch time"]:
        return jnp.concatenate([self.prompt_mask, self.response_mask], axis=1)

    @property
    def fed_mask(self) -> Bool[Array, "batch fed"]:
        """True on tokens that are fed to the model: every valid one that has a valid successor."""
        valid = self.valid
        return valid[:, :-1] & valid[:, 1:]


@struct.dataclass
class Scores:
    """What an objective sees of a mini-batch: arrays of log-probs, never a model. ``R`` is the response length.

    Log-probs are those of the sampled tokens, at the sampling temperature. The three policies are the paper's:
    ``rollout`` mu_old, ``old`` pi_old, ``target`` pi_theta. Only ``target``, ``entropy`` and ``router_target`` carry
    gradients, and only regularisers differentiate what they make of them (see `Objective`).

    Attributes:
      mask: True on response tokens up to and including the stop token, or the token that completes a stop string.
      groups: equal numbers in [0, batch) for the responses of one prompt; None where only a part of a mini-batch is
        seen, which may hold some of them alone.
      reference: log-probs of a frozen reference policy, for KL regularisers.
      entropy: entropy of pi_theta on each prefix, in nats, for an entropy regulariser: over the tokens that could be
        drawn.
      router_old, router_target: log router probabilities of the experts that pi_old used, [batch, R, layer * k], for
        RSPO. A run has them where its objective fails without.
    """

    target: Float[Array, "batch R"]
    old: Float[Array, "batch R"]
    rollout: Float[Array, "batch R"]
    mask: Bool[Array, "batch R"]
    groups: Int[Array, "batch"] | None
    reference: Float[Array, "batch R"] | None = None
    entropy: Float[Array, "batch R"] | None = None
    router_old: Float[Array, "batch R slot"] | None = None
    router_target: Float[Array, "batch R slot"] | None = None


LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: past every cap in use, and its square is still finite in float32


def route_dtype(num_experts: int) -> jnp.dtype:
    """The narrowest unsigned type that holds every expert and the sentinel ``num_experts``."""
    return jnp.dtype(jnp.uint8 if num_experts <= 255 else jnp.uint16)


def row_axis(leaf: jax.Array) -> int:
    """The axis along which rows of a batch lie: 1 in `Routes`, alone in having four dimensions, else 0."""
    return 1 if leaf.ndim == 4 else 0


def take_rows(tree: Any, rows: Int[Array, "n"]) -> Any:
    """Those rows of a tree of arrays that travel; scalars belong to all rows."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=row_axis(leaf)) if leaf.ndim else leaf, tree)


def split_rows(tree: Any, parts: int) -> Any:
    """Deals the rows out to ``parts`` equal parts along a new leading axis, for a scan; scalars are repeated.

    Part i has the rows i, i + parts, i + 2 parts and so on: where rows are split over devices, each device then keeps
    its share of every part, and nothing is sent.
    """

    def split(leaf: jax.Array) -> jax.Array:
        if not leaf.ndim:
            return jnp.broadcast_to(leaf, (parts,))
        axis = row_axis(leaf)
        shape = (*leaf.shape[:axis], leaf.shape[axis] // parts, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""

    def join(leaf: jax.Array) -> jax.Array:
        axis = row_axis(leaf[0])
        whole = jnp.moveaxis(leaf, 0, axis + 1)
        return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])

    return jax.tree.map(join, tree)


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """``values`` where ``mask``, else 0. Selects and never multiplies, so NaN under the mask stays out of values."""
    return jnp.where(mask, values, jnp.zeros((), values.dtype))
