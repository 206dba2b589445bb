"""The training engine pi: score log-probs, update."""

from rlstab_jax.learner.optimizer import TrainState, init_state, state_shardings
from rlstab_jax.learner.packing import Packing, plan
from rlstab_jax.learner.score import PolicyScores, score
from rlstab_jax.learner.update import LearnerConfig, Minibatch, update

__all__ = [
    "LearnerConfig",
    "Minibatch",
    "Packing",
    "PolicyScores",
    "TrainState",
    "init_state",
    "plan",
    "score",
    "state_shardings",
    "update",
]
