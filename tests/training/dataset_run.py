"""A run of seconds on prompts of a file, with verifiers that anyone might write. Give it ``--task.train FILE``."""

import dataclasses

from rlstab_jax.tasks import DatasetConfig, ExactMatch, Prompt, Reward
from rlstab_jax.training.config import RolloutConfig, RunConfig
from tests.training import tiny_run


def digits(prompt: Prompt, response: str) -> float:
    return sum(character.isdigit() for character in response) / 4


def fragile(prompt: Prompt, response: str) -> float:
    if "9" in response:
        raise LookupError("a nine")
    return 1.0


def config() -> RunConfig:
    run = tiny_run.config()
    return dataclasses.replace(
        run,
        gradient_steps=4,
        checkpoint_every=2,
        logged_samples=2,
        model=dataclasses.replace(run.model, num_experts=0),
        learner=dataclasses.replace(run.learner, replay="live", remat="none"),
        rollout=RolloutConfig(precision=run.rollout.precision, attempts=2),
        evaluation=dataclasses.replace(run.evaluation, every=0),
        task=DatasetConfig(
            alphabet="0123456789+=",
            response_tokens=4,
            judge_truncated=True,
            answer_in="whole",
            heldout_share=0.2,
            max_verifier_failures=1.0,
            rewards=(
                Reward("exact", ExactMatch("whole")),
                Reward("digits", digits, 0.5),
                Reward("fragile", fragile, 0.0),
            ),
        ),
    )
