"""Some minutes on a laptop: a small MoE model learns modular arithmetic by MiniRL, off-policy, from fp8 rollouts.

N = 4 updates per rollout batch, clipping, R3. The cold start is part of the run.
"""

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.training.config import RolloutConfig, RunConfig


def config() -> RunConfig:
    return RunConfig(
        gradient_steps=320,
        minibatches=4,
        model=ModelConfig(rope_theta=100.0),
        rollout=RolloutConfig(precision=fp8("float8_e4m3fn")),
        # So small a model recomputes nothing, and has no loop over its layers: a quarter less time for an update.
        learner=LearnerConfig(learning_rate=1.5e-3, replay="r3", remat="none", unroll=2),
        objective=ObjectiveConfig("minirl"),
    )
