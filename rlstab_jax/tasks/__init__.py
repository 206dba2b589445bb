"""Tasks: prompts, tokenisers and verifiers. Text in, reward out."""

from rlstab_jax.tasks.arithmetic import Arithmetic, ArithmeticConfig
from rlstab_jax.tasks.data import decode_responses, encode_prompts, prompt_iterator
from rlstab_jax.tasks.protocol import DemonstratedTask, Prompt, PromptSource, Split, Task, TaskConfig, Tokenizer
from rlstab_jax.tasks.tokenizer import CharTokenizer

__all__ = [
    "Arithmetic",
    "ArithmeticConfig",
    "CharTokenizer",
    "DemonstratedTask",
    "Prompt",
    "PromptSource",
    "Split",
    "Task",
    "TaskConfig",
    "Tokenizer",
    "decode_responses",
    "encode_prompts",
    "prompt_iterator",
]
