"""A config for plans: small, on 2 x 2 devices, its vocabulary and lengths stated, so that no task is built for it."""

import dataclasses
from typing import NoReturn

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import ModelConfig, Precision, fp8
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.tasks import ArithmeticConfig
from rlstab_jax.training.config import RolloutConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Absent(ArithmeticConfig):
    """A task whose data set is not at hand."""

    def build(self) -> NoReturn:
        raise AssertionError("a plan built the task")


def config() -> RunConfig:
    return RunConfig(
        gradient_steps=30,
        prompts_per_minibatch=4,
        samples_per_prompt=4,
        minibatches=2,
        task=Absent(),
        model=ModelConfig(
            vocab_size=128,
            num_layers=2,
            embed_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            num_experts=4,
            experts_per_token=2,
            expert_dim=64,
        ),
        rollout=RolloutConfig(precision=fp8(dtype="bfloat16"), prompt_length=16, response_length=48),
        learner=LearnerConfig(precision=Precision("bfloat16"), replay="r3"),
        mesh=MeshConfig(data=1, fsdp=2, expert=2),
    )
