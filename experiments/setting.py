"""The default regime of the paper's studies: what a laptop trains in about a minute, and the words for varying it.

Chains of arithmetic with answers of 7 to 17 tokens; an MoE transformer of 140 thousand parameters; rollouts in e4m3
everywhere, router included; 320 updates on 16 prompts x 8 responses, whatever N, so that equal gradient steps are equal
responses. Clipping by global norm is off, and so are router losses.
"""

import dataclasses
import math
from typing import Any

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.tasks import ArithmeticConfig
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig

HORIZON = 320
NEVER = 10**6
RATES = (7e-4, 1e-3, 1.5e-3, 2e-3)  # the grid, the same for each method
LEARNING_RATE = 7e-4  # the common one, chosen by tuning as PROTOCOL.md says
HIGHER_RATE = RATES[RATES.index(LEARNING_RATE) + 1]  # for the claims on collapse, where nothing collapses at that one
HIGHER = f"-lr{HIGHER_RATE:g}"  # ends the names of the cells at it
NO_CLIP = {"objective.eps_low": math.inf, "objective.eps_high": math.inf}


def base(**changes: Any) -> RunConfig:
    """MiniRL with clipping, N = 8, live routing. ``changes`` replace fields of the run itself."""
    config = RunConfig(
        gradient_steps=HORIZON,
        prompts_per_minibatch=16,
        samples_per_prompt=8,
        minibatches=8,
        checkpoint_every=NEVER,  # a minute is not worth saving; a run that is asked to stop saves itself
        keep_checkpoints=1,
        logged_samples=1,
        task=ArithmeticConfig(),
        model=ModelConfig(rope_theta=100.0),
        rollout=RolloutConfig(precision=fp8("float8_e4m3fn")),
        learner=LearnerConfig(
            learning_rate=LEARNING_RATE,
            warmup_steps=20,
            max_grad_norm=math.inf,
            replay="live",
            remat="none",  # so small a model recomputes nothing, and has no loop over its layers
            unroll=2,
        ),
        objective=ObjectiveConfig("minirl", cap=5.0),
        cold_start=ColdStartConfig(target_accuracy=0.23),
        evaluation=EvaluationConfig(every=16, prompts=256, samples=2),
    )
    return dataclasses.replace(config, **changes)


def clipping(on: bool) -> dict[str, Any]:
    """MiniRL's trust region as it is, or none."""
    return {} if on else dict(NO_CLIP)


def updates(number: int) -> dict[str, Any]:
    """N updates per rollout batch."""
    return {"minibatches": number}


def replay(mode: str) -> dict[str, Any]:
    """Routing replay: live (none), r2 or r3."""
    return {"learner.replay": mode}


def at_rate(rate: float) -> dict[str, Any]:
    """Another learning rate than the common one."""
    return {"learner.learning_rate": rate}
