"""config.json as published for real models, in both directions, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from rlstab_jax.models import ModelConfig
from rlstab_jax.models.hf_config import read_json, read_model_config, write_model_config
from rlstab_jax.types import UserError

WHERE = Path("there/config.json")

# Sizes as published, in the older way of writing rope_theta and torch_dtype.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 32768, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
    "hidden_size": 2048, "intermediate_size": 1024, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "rope_scaling": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 50304,
}  # fmt: skip
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_size": 1024, "intermediate_size": 3072, "layer_types": ["full_attention"] * 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "sliding_window": None,
    "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

SIZES = {
    "qwen3_moe": ModelConfig(
        vocab_size=151936, num_layers=48, embed_dim=2048, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128,
        experts_per_token=8, expert_dim=768, rope_theta=1e6,
    ),
    "mixtral": ModelConfig(
        vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, num_experts=8,
        experts_per_token=2, expert_dim=14336, rope_theta=1e6, norm_eps=1e-5, qk_norm="none",
    ),
    "olmoe": ModelConfig(
        vocab_size=50304, num_layers=16, embed_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, num_experts=64,
        experts_per_token=8, expert_dim=1024, norm_eps=1e-5, qk_norm="projection", renormalise_gates=False,
    ),
    "qwen3": ModelConfig(
        vocab_size=151936, num_layers=28, embed_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, num_experts=0,
        mlp_dim=3072, rope_theta=1e6, tie_embeddings=True,
    ),
}  # fmt: skip
REAL = [QWEN3_30B_A3B, MIXTRAL_8X7B, OLMOE_1B_7B, QWEN3_0_6B]


@pytest.mark.parametrize("config", REAL, ids=lambda config: config["model_type"])
def test_published_sizes_both_ways(config: dict) -> None:
    model = read_model_config(config, WHERE)
    assert model == SIZES[config["model_type"]]
    dtype = "dtype" if "dtype" in config else "torch_dtype"
    assert write_model_config(model, "float32", config) == {**config, dtype: "float32"}
    alone = write_model_config(model, "bfloat16")
    assert read_model_config(alone, WHERE) == model
    assert (alone["architectures"], alone["torch_dtype"]) == (config["architectures"], "bfloat16")


def test_dense_layers() -> None:
    """Layer i is MoE where (i + 1) is a multiple of decoder_sparse_step and mlp_only_layers does not name it."""
    config = QWEN3_30B_A3B | {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = read_model_config(config, WHERE)
    assert model.dense_layers == (0, 2, 3, 4, 6)
    assert model.mlp_dim == 6144
    assert model.kinds == (False, True, False, False, False, True, False)
    written = write_model_config(model, "float32")
    assert (written["mlp_only_layers"], written["decoder_sparse_step"]) == ([0, 2, 3, 4, 6], 1)
    assert read_model_config(written, WHERE) == model


def test_absent_keys_mean_what_transformers_takes() -> None:
    def of(config: dict, *keys: str) -> ModelConfig:
        return read_model_config({key: value for key, value in config.items() if key not in keys}, WHERE)

    assert of(MIXTRAL_8X7B, "rope_theta", "rms_norm_eps") == SIZES["mixtral"]
    assert of(OLMOE_1B_7B, "rope_theta", "rms_norm_eps", "norm_topk_prob", "num_key_value_heads") == SIZES["olmoe"]
    assert of(QWEN3_0_6B, "head_dim").head_dim == 128
    assert of(QWEN3_30B_A3B, "head_dim").head_dim == 64
    assert not of(QWEN3_30B_A3B, "norm_topk_prob").renormalise_gates
    renamed = QWEN3_30B_A3B | {"num_local_experts": 128}  # as transformers 5 saves it
    assert of(renamed, "num_experts") == SIZES["qwen3_moe"]


def test_a_config_of_other_sizes_keeps_what_it_says_besides() -> None:
    other = ModelConfig(vocab_size=11, num_layers=2, num_experts=4, dense_layers=(0,))
    written = write_model_config(other, "float32", QWEN3_30B_A3B)
    assert read_model_config(written, WHERE) == other
    assert written["max_position_embeddings"] == 32768


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            QWEN3_0_6B,
            {"architectures": ["LlamaForCausalLM"]},
            r"architectures = \['LlamaForCausalLM'\] is not supported",
        ),
        (QWEN3_0_6B, {"architectures": None}, r"architectures = \[\] is not supported, only Qwen3Moe"),
        (QWEN3_30B_A3B, {"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantised .*fp8"),
        (QWEN3_30B_A3B, {"use_sliding_window": True}, "sliding_window = 4096 is not supported"),
        (MIXTRAL_8X7B, {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        (QWEN3_0_6B, {"layer_types": ["sliding_attention"]}, "layer_types = .* is not supported"),
        (QWEN3_30B_A3B, {"attention_bias": True}, "attention_bias = True is not supported"),
        (OLMOE_1B_7B, {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        (MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (QWEN3_30B_A3B, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of the kind 'yarn'"),
        (QWEN3_0_6B, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of the kind 'linear'"),
        (QWEN3_0_6B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN3_0_6B, {"rope_scaling": "yarn"}, "rope_scaling = 'yarn', expected an object"),
        (QWEN3_30B_A3B, {"mlp_only_layers": 3}, "mlp_only_layers = 3, expected a list of layers"),
        (QWEN3_0_6B, {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta = '1e6', expected a positive number"),
        (QWEN3_0_6B, {"hidden_size": None}, "hidden_size = None, expected a number"),
        (QWEN3_30B_A3B, {"num_experts": "8"}, "num_experts or num_local_experts = '8', expected a number"),
        (QWEN3_30B_A3B, {"num_experts": 0}, "num_experts = 0, expected at least 1"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 200}, "experts_per_token = 200 exceeds model.num_experts = 128"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0, expected at least 1"),
    ],
)
def test_what_is_refused(config: dict, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"there/config.json: .*{message}"):
        read_model_config(config | changes, WHERE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(vocab_size=9, num_experts=0, qk_norm="none"), "qk_norm = 'none' in a dense model"),
        (ModelConfig(vocab_size=9, dense_layers=(1,), qk_norm="none"), "dense_layers with model.qk_norm = 'none'"),
        (ModelConfig(vocab_size=9, renormalise_gates=False, qk_norm="none"), "renormalise_gates = False"),
        (ModelConfig(vocab_size=9, head_dim=8, qk_norm="projection"), "head_dim x model.num_heads"),
    ],
)
def test_models_that_no_architecture_computes(model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*none of .* computes that"):
        write_model_config(model, "float32")


def test_files_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(UserError, match=r"config\.json is no JSON: .*line 2 column 6"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        read_json(tmp_path / "config.json")
