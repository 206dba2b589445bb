"""The paper's setting: Qwen3-30B-A3B, mini-batches of 64 prompts x 16 responses, 32,768 tokens, fp8 against bfloat16.

For `rlstab plan configs/qwen3_30b_a3b.py --topology v5p:4x4x4`, which needs neither checkpoint nor data: sizes,
vocabulary and lengths are stated. To train, import the checkpoint and fetch the data as for configs/qwen3.py. Where the
paper is silent (optimiser, learning rate, split of its 32,768 tokens), the numbers are ours.
"""

from rlstab_jax.learner import LearnerConfig
from rlstab_jax.models import Kernels, ModelConfig, Precision, fp8
from rlstab_jax.objectives import ObjectiveConfig
from rlstab_jax.parallel.mesh import MeshConfig
from rlstab_jax.tasks import DatasetConfig, MathVerify, Reward
from rlstab_jax.training.config import ColdStartConfig, EvaluationConfig, RolloutConfig, RunConfig

MODEL = "imports/qwen3"  # what `rlstab import-hf` wrote; its tokeniser lies there, too
TRAIN, HELDOUT = "data/dapo/data/dapo-math-17k.parquet", "data/aime/data/aime-2024.parquet"
PROMPT, RESPONSE = 1_024, 31_744  # tokens; together 32,768
N = 4  # updates for each rollout batch: the paper's are 1, 2, 4 and 8


def config() -> RunConfig:
    return RunConfig(
        initial=MODEL,
        model=ModelConfig(
            vocab_size=151_936,
            num_layers=48,
            embed_dim=2_048,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            num_experts=128,
            experts_per_token=8,
            expert_dim=768,
            rope_theta=1e6,
        ),
        task=DatasetConfig(
            train=(TRAIN,),
            heldout=(HELDOUT,),
            layout="dapo",
            tokenizer=MODEL,
            chat=True,
            stop=("<|im_end|>",),
            max_prompt_tokens=PROMPT,
            response_tokens=RESPONSE,
            rewards=(Reward("math", MathVerify()),),
        ),
        gradient_steps=1_200,
        prompts_per_minibatch=64,
        samples_per_prompt=16,
        minibatches=N,
        rollout=RolloutConfig(
            precision=fp8(dtype="bfloat16", products="native"),
            prompt_length=PROMPT,
            response_length=RESPONSE,
            waves=N,
        ),
        learner=LearnerConfig(
            learning_rate=1e-6,
            replay="r3",
            precision=Precision("bfloat16"),
            micro_batches=16,
            score_micro_batches=16 * N,
            logits_per_chunk=2**34,
        ),
        objective=ObjectiveConfig("minirl"),
        cold_start=ColdStartConfig(max_steps=0),
        evaluation=EvaluationConfig(every=40, prompts=30),
        kernels=Kernels("splash", "megablox", decode_attention="flash", decode_experts="narrow", expert_chunk=16_384),
        mesh=MeshConfig(data=1, fsdp=16, expert=4),
    )
