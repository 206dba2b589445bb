"""Qwen3-30B-A3B-Base on DAPO-Math-17k, held out: AIME 2024. The README says where both come from, and what it needs.

The numbers are a beginning, not a result: nobody has run it yet.
"""

from pathlib import Path

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import Precision, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.tasks import DatasetConfig, MathVerify, Reward
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig
from rlstab_jax.training.pretrained import model_config

MODEL = "imports/qwen3"  # what `rlstab import-hf` wrote; its tokeniser lies there, too
TRAIN, HELDOUT = "data/dapo/data/dapo-math-17k.parquet", "data/aime/data/aime-2024.parquet"


def config() -> RunConfig:
    return RunConfig(
        initial=MODEL,
        model=model_config(Path(MODEL)),
        task=DatasetConfig(
            train=(TRAIN,),
            heldout=(HELDOUT,),
            layout="dapo",
            tokenizer=MODEL,
            chat=True,
            stop=("<|im_end|>",),  # ends a turn of the chat template; a base model's files do not say so
            max_prompt_tokens=512,
            response_tokens=4096,
            rewards=(Reward("math", MathVerify()),),  # a function of your own: Reward("mine", function, weight=0.1)
        ),
        gradient_steps=400,
        prompts_per_minibatch=16,
        rollout=RolloutConfig(precision=fp8(dtype="bfloat16"), attempts=2),
        learner=LearnerConfig(
            learning_rate=1e-6,
            replay="r3",
            precision=Precision("bfloat16"),
            micro_batches=8,  # of 16 rows, so that each of 16 chips has one
            score_micro_batches=32,
        ),
        objective=ObjectiveConfig("minirl"),
        cold_start=ColdStartConfig(max_steps=0),
        evaluation=EvaluationConfig(every=40, prompts=30),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
