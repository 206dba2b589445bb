"""The tiny run, smaller still, for two processes of 4 devices each; see test_two_processes.py."""

import dataclasses

from rlstab_jax.training.config import RunConfig
from tests.training import tiny_run


def config() -> RunConfig:
    """Mini-batches that divide over 8 devices. Programs are few and small: each process compiles them. Two hosts see
    slots and strings and must decide alike."""
    default = tiny_run.config()
    return dataclasses.replace(
        default,
        gradient_steps=8,
        prompts_per_minibatch=8,
        samples_per_prompt=2,
        checkpoint_every=2,
        model=dataclasses.replace(default.model, num_layers=1),
        learner=dataclasses.replace(default.learner, remat="none", replay="r2"),
        rollout=dataclasses.replace(default.rollout, slots=16, stop=("23", "+1")),
        evaluation=dataclasses.replace(default.evaluation, every=0),
    )
