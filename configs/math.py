"""A model from Hugging Face learns to solve the problems of a file, judged by math-verify. Copy it, and set the names.

As it stands it is laptop-sized; the README has the commands that make its model and data, and what a real one needs.
"""

from pathlib import Path

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.tasks import DatasetConfig, Fields, MathVerify, Reward
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig
from rlstab_jax.training.pretrained import model_config

MODEL = "word_problems/imported"  # what `rlstab import-hf` wrote; its tokeniser lies there, too
TRAIN, HELDOUT = "word_problems/train.jsonl", "word_problems/heldout.jsonl"


def config() -> RunConfig:
    return RunConfig(
        initial=MODEL,
        model=model_config(Path(MODEL)),
        task=DatasetConfig(
            train=(TRAIN,),
            heldout=(HELDOUT,),
            fields=Fields(demonstration="solution"),
            tokenizer=MODEL,
            chat=True,
            stop=("<|im_end|>",),  # ends a turn of the chat template; a base model's files do not say so
            response_tokens=16,
            rewards=(Reward("math", MathVerify()),),
        ),
        gradient_steps=160,
        rollout=RolloutConfig(precision=fp8("float8_e4m3fn")),
        learner=LearnerConfig(learning_rate=1e-3, replay="r3"),
        objective=ObjectiveConfig("minirl"),
        cold_start=ColdStartConfig(target_accuracy=0.3, learning_rate=3e-3),  # max_steps=0 for a model that can answer
        evaluation=EvaluationConfig(every=40),
    )
