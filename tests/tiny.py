"""Tiny models, prompts and rollouts that the tests of both engines share, so that each program is compiled once."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlstab_jax.inference import Sampling, prepare, sample, sample_keys
from rlstab_jax.learner import LearnerConfig, Minibatch, PolicyScores, TrainState, init_state
from rlstab_jax.learner.update import LearnerNumbers
from rlstab_jax.models import Kernels, ModelConfig, Precision, Transformer, fp8
from rlstab_jax.models.remat import Remat
from rlstab_jax.objectives import Objective, advantages_of, minirl
from rlstab_jax.types import Rollout, Scores

# MoE and dense layers alternate: one segment, scanned twice over a period of two blocks.
MIXED = ModelConfig(
    vocab_size=17,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=2,
    expert_dim=16,
    mlp_dim=40,
    dense_layers=(1, 3),
    tie_embeddings=True,
)
TILES = Kernels("reference", "tiles", "reference", "grouped")
PROMPT, RESPONSE, SAMPLES = 6, 8, 2
STOP_IDS = np.array([1, 5], np.int32)
FLOAT32, FP8 = Precision(), fp8()


def model(
    config: ModelConfig = MIXED, precision: Precision = FLOAT32, remat: Remat = "none", **kernels: Any
) -> Transformer:
    return Transformer(config, precision, dataclasses.replace(TILES, **kernels), remat)


@cache
def parameters(config: ModelConfig = MIXED, seed: int = 0) -> dict:
    """Seeded parameters. Gains are random too: at 1, a norm that is left out or applied twice could go unseen.

    NumPy draws them, since compiling the model's own `init` takes ten seconds.
    """
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(model(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        normal = generator.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "gain":
            return jnp.asarray(1 + 0.1 * normal)
        fan_in = leaf.shape[-1] if path[-1].key == "embedding" else leaf.shape[-2]
        return jnp.asarray(normal * np.float32(fan_in**-0.5))

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def prompts(count: int = 4, length: int = PROMPT, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-aligned prompts of lengths 1, 6, 5, 4, ...; what lies left of them is token 0."""
    generator = np.random.default_rng(seed)
    lengths = 1 + 5 * np.arange(count) % length
    mask = np.arange(length) >= length - lengths[:, None]
    return np.where(mask, generator.integers(2, MIXED.vocab_size, (count, length)), 0).astype(np.int32), mask


def keys(count: int = 4, samples: int = SAMPLES, step: int = 0) -> jax.Array:
    return sample_keys(jax.random.key(7), step, range(100, 100 + count), samples)


def sampling(**changes: Any) -> Sampling:
    return Sampling(**({"temperature": np.float32(1.0), "stop_ids": STOP_IDS, "pad_id": np.int32(0)} | changes))


@cache
def rollout(precision: Precision = FP8, config: ModelConfig = MIXED, temperature: float = 1.0) -> Rollout:
    """Eight responses, two to a prompt, some stopped early and some truncated."""
    return sample(
        model(config, precision),
        prepare(parameters(config), precision),
        *prompts(),
        keys(),
        sampling(temperature=np.float32(temperature)),
        response_length=RESPONSE,
        samples_per_prompt=SAMPLES,
    )


def minibatch(rollout: Rollout, old: PolicyScores, objective: Objective) -> Minibatch:
    """The whole rollout as one mini-batch, with made-up rewards."""
    rows = rollout.tokens.shape[0]
    groups = jnp.arange(rows) // SAMPLES
    scores = Scores(old.log_probs, old.log_probs, rollout.log_probs, rollout.response_mask, groups)
    advantage = advantages_of(objective, scores, jnp.asarray(np.random.default_rng(3).random(rows), jnp.float32))
    return Minibatch(rollout, old, advantage, groups)


def numbers(**changes: Any) -> LearnerNumbers:
    return LearnerConfig(**({"warmup_steps": 0, "learning_rate": 1e-3} | changes)).numbers()


def state(config: ModelConfig = MIXED, of: LearnerNumbers | None = None) -> TrainState:
    """A fresh state: `update` takes its buffers."""
    return init_state(jax.tree.map(jnp.copy, parameters(config)), of or numbers())


def gradient_of_step(after: TrainState) -> dict:
    """The clipped gradient of the first update, read off Adam's first moment, which is (1 - b1) g."""
    moment = next(part.mu for part in after.opt_state if hasattr(part, "mu"))
    return jax.tree.map(lambda m: m / np.float32(1 - 0.9), moment)


MINIRL = minirl()
