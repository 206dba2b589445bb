"""One update of the same weights on the same batch in other libraries, as contenders of the benchmark `update`.

Each computes the loss - sum coefficient * sg[pi / mu] * log pi of the batch's targets, its gradient, clips it by its
global norm and takes a step of Adam.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.benchmarks import peers
from experiments.benchmarks.common import Contender, Missing
from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig

# name -> (how experts are computed, attention, whether torch compiles the forward and backward pass)
HUGGING_FACE = {
    "transformers, eager experts": ("eager", "sdpa", False),
    "transformers, grouped_mm": ("grouped_mm", "sdpa", False),
    "transformers, grouped_mm, eager attention": ("grouped_mm", "eager", False),
    "transformers, grouped_mm, torch.compile": ("grouped_mm", "sdpa", True),
}
TUNIX = "Tunix model, optax"
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Batch:
    """What every engine learns from; NumPy arrays."""

    tokens: Int[np.ndarray, "rows fed+1"]
    """Each but the last is fed, each but the first is a target."""
    coefficient: Float[np.ndarray, "rows fed"]
    """What a target's term is multiplied with: the normalisation times the advantage."""
    rollout: Float[np.ndarray, "rows fed"]
    """log mu of the targets."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the first update of each engine must find."""

    loss: float
    gradient: Float[np.ndarray, "d expert"]
    """That of the last layer's router, clipped."""

    def difference(self, loss: float, gradient: np.ndarray) -> float:
        """The larger of both relative differences."""
        scale = np.abs(self.gradient).max()
        return float(max(abs(loss / self.loss - 1), np.abs(gradient - self.gradient).max() / scale))


# Runs one update to its end and returns the loss; and reads the gradient of the last layer's router that was applied.
Engine = tuple[Callable[[], float], Callable[[], np.ndarray]]


def contenders(
    config: ModelConfig, learner: LearnerConfig, params: dict, batch: Batch, reference: Reference, threads: int
) -> tuple[list[Contender | Missing], dict[str, float]]:
    """All peers. Each runs its first update here, and must agree with ``reference``.

    Args:
      config: the model; all layers MoE, the head untied.
      learner: Adam's numbers and the largest gradient norm; no warm-up, no weight decay.
      params: our parameters, float32.
      batch, reference: what to learn from, and what that must give.
      threads: of torch.

    Returns:
      the contenders, and for each that is there how far its loss and gradient lie from ours, relative.
    """
    found: list[Contender | Missing] = []
    differences: dict[str, float] = {}
    for name in (*HUGGING_FACE, TUNIX):
        try:
            if name == TUNIX:
                run, gradient = _tunix(config, learner, params, batch)
            else:
                run, gradient = _transformers(config, learner, params, batch, threads, *HUGGING_FACE[name])
        except ImportError as error:
            found.append(Missing(name, f"{error}: {peers.INSTALL}"))
            continue
        differences[name] = reference.difference(run(), gradient())
        if not differences[name] < TOLERANCE:
            raise AssertionError(f"{name}: loss or gradient differ by {differences[name]:.3g}, above {TOLERANCE}")
        found.append(Contender(name, run, batch.coefficient.size))
    return found, differences


def _transformers(
    config: ModelConfig,
    learner: LearnerConfig,
    params: dict,
    batch: Batch,
    threads: int,
    experts: str,
    attention: str,
    compiled: bool,
) -> Engine:
    import torch

    torch.set_num_threads(threads)
    model = peers.hugging_face_model(config, params, experts).train()
    model.set_attn_implementation(attention)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=learner.learning_rate,
        betas=(learner.adam_b1, learner.adam_b2),
        eps=learner.adam_eps,
        weight_decay=0.0,
        fused=True,
    )
    ids = torch.tensor(batch.tokens, dtype=torch.long)
    coefficient, rollout = torch.tensor(batch.coefficient), torch.tensor(batch.rollout)

    def loss_of(ids: Any) -> Any:
        logits = model(ids[:, :-1], use_cache=False).logits
        negative = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        log_probs = -negative.view(coefficient.shape)
        return -(coefficient * torch.exp(log_probs.detach() - rollout) * log_probs).sum()

    function = torch.compile(loss_of) if compiled else loss_of

    def run() -> float:
        adam.zero_grad(set_to_none=True)
        loss = function(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), learner.max_grad_norm)
        adam.step()
        return loss.item()

    return run, lambda: model.model.layers[-1].mlp.gate.weight.grad.numpy().T


def _tunix(config: ModelConfig, learner: LearnerConfig, params: dict, batch: Batch) -> Engine:
    import optax
    from flax import nnx

    graph, weights = nnx.split(peers.tunix_model(config, params))
    optimizer = optax.chain(
        optax.clip_by_global_norm(learner.max_grad_norm),
        optax.adam(learner.learning_rate, learner.adam_b1, learner.adam_b2, learner.adam_eps),
    )
    rows, time = batch.coefficient.shape
    tokens = jnp.asarray(batch.tokens)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (rows, time, time))
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    coefficient, rollout = jnp.asarray(batch.coefficient), jnp.asarray(batch.rollout)

    def loss_of(weights: Any) -> jax.Array:
        logits = nnx.merge(graph, weights)(tokens[:, :-1], positions, None, causal)[0]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(coefficient * jnp.exp(jax.lax.stop_gradient(log_probs) - rollout) * log_probs)

    def step(weights: Any, moments: Any) -> tuple:
        loss, gradient = jax.value_and_grad(loss_of)(weights)
        change, moments = optimizer.update(gradient, moments, weights)
        return loss, optax.apply_updates(weights, change), moments

    jitted = jax.jit(step, donate_argnums=(0, 1))
    state = [weights, jax.jit(optimizer.init)(weights)]

    def run() -> float:
        loss, *state[:] = jitted(*state)
        jax.block_until_ready(state)
        return float(loss)

    def gradient() -> np.ndarray:
        (moments,) = (part.mu for part in jax.tree.leaves(state[1], is_leaf=_has_moments) if _has_moments(part))
        first = nnx.merge(graph, moments).layers[-1].mlp.router.kernel.value
        return np.asarray(first) / (1 - learner.adam_b1)

    return run, gradient


def _has_moments(node: Any) -> bool:
    return hasattr(node, "mu")
