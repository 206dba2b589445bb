"""A run of seconds, with every part of a real one, for the tests of the loop and of resuming."""

import dataclasses
import time

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig, fp8
from rlstab_jax.tasks import Arithmetic, ArithmeticConfig, Prompt
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class LenientConfig(ArithmeticConfig):
    """Chains of one or two additions, judged leniently."""

    pause: float = 0.0
    """Seconds that judging a response takes, for tests that must hit a run in the middle."""

    def build(self) -> "Lenient":
        return Lenient(self)


class Lenient(Arithmetic):
    """A random model earns different rewards, so that advantages and gradients are not all zero."""

    def reward(self, prompt: Prompt, response: str, *, stopped: bool = True) -> float:
        time.sleep(self.config.pause)
        return sum(character in "0123456789a" for character in response) / 4


TASK = LenientConfig(operands=(1, 2), operators="+", scratchpad=1, heldout_prompts=16)
MODEL = ModelConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    expert_dim=8,
    mlp_dim=16,
)


def config() -> RunConfig:
    return RunConfig(
        gradient_steps=24,
        prompts_per_minibatch=2,
        samples_per_prompt=4,
        minibatches=2,
        checkpoint_every=4,
        task=TASK,
        model=MODEL,
        rollout=RolloutConfig(precision=fp8("float8_e4m3fn")),
        learner=LearnerConfig(learning_rate=3e-3, warmup_steps=2, replay="r3"),
        cold_start=ColdStartConfig(max_steps=0, check_prompts=16),
        evaluation=EvaluationConfig(every=6, prompts=8, samples=2),
    )
