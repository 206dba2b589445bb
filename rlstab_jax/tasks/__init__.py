"""Tasks: prompts, tokenisers and verifiers. Text in, reward out."""

from rlstab_jax.tasks.arithmetic import Arithmetic, ArithmeticConfig
from rlstab_jax.tasks.data import decode_responses, decode_text, encode_prompts, prompt_iterator
from rlstab_jax.tasks.dataset import Dataset, DatasetConfig
from rlstab_jax.tasks.protocol import (
    AnsweredTask,
    BatchTask,
    DemonstratedTask,
    DescribedTask,
    Failure,
    Prompt,
    PromptSource,
    Rewards,
    Split,
    Task,
    TaskConfig,
    Tokenizer,
    build_task,
    check_judge,
    reward_of,
    rewards_of,
)
from rlstab_jax.tasks.records import Fields
from rlstab_jax.tasks.tokenizer import CharTokenizer
from rlstab_jax.tasks.verify import BatchVerifier, ExactMatch, MathVerify, Numeric, Reward, Verdict, Verifier

__all__ = [
    "AnsweredTask",
    "Arithmetic",
    "ArithmeticConfig",
    "BatchTask",
    "BatchVerifier",
    "CharTokenizer",
    "Dataset",
    "DatasetConfig",
    "DemonstratedTask",
    "DescribedTask",
    "ExactMatch",
    "Failure",
    "Fields",
    "MathVerify",
    "Numeric",
    "Prompt",
    "PromptSource",
    "Reward",
    "Rewards",
    "Split",
    "Task",
    "TaskConfig",
    "Tokenizer",
    "Verdict",
    "Verifier",
    "build_task",
    "check_judge",
    "decode_responses",
    "decode_text",
    "encode_prompts",
    "prompt_iterator",
    "reward_of",
    "rewards_of",
]
