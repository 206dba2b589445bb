"""`config.json` of Hugging Face checkpoints, and `ModelConfig`: four architectures, in both directions.

What our model cannot represent (sliding windows, scaled RoPE, biases, clipped projections, quantised weights) is
refused by name, never ignored.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlstab_jax.models.config import ModelConfig, QKNorm
from rlstab_jax.types import UserError

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one architecture from another."""

    name: str
    """As in `architectures` of config.json."""
    model_type: str
    """As in config.json."""
    qk_norm: QKNorm
    """The norm of queries and keys."""
    moe: str = "mlp"
    """Name of a layer's MoE module; "" where all layers are dense."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's gate, up and down."""
    expert_width: str = "moe_intermediate_size"
    """The key of an expert's hidden width."""
    renormalise_gates: bool | None = None
    """Whether gates always sum to 1; None where `norm_topk_prob` says so."""
    mixed: bool = False
    """Whether layers can be dense among MoE ones."""
    norm_eps: float = 1e-6
    """Where the key is absent."""
    rope_theta: float = 10_000.0
    """Where the key is absent."""


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("Qwen3MoeForCausalLM", "qwen3_moe", "head", mixed=True),
        Architecture(
            "MixtralForCausalLM", "mixtral", "none", moe="block_sparse_moe", projections=("w1", "w3", "w2"),
            expert_width="intermediate_size", renormalise_gates=True, norm_eps=1e-5, rope_theta=1e6,
        ),
        Architecture("OlmoeForCausalLM", "olmoe", "projection", expert_width="intermediate_size", norm_eps=1e-5),
        Architecture("Qwen3ForCausalLM", "qwen3", "head", moe=""),
    )
}  # fmt: skip


def read_json(path: Path) -> Json:
    """The object in a JSON file. Raises UserError that names the file (and line) where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # malformed JSON, which names the line, or no UTF-8
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def architecture_of(config: Json, where: Path) -> Architecture:
    """The architecture that a config.json names. Raises UserError for any other and for quantised weights."""
    if config.get("quantization_config") is not None:
        method = _object(config, "quantization_config", where).get("quant_method", "unnamed")
        raise UserError(f"{where}: the checkpoint is quantised (quantization_config, {method}): give one that is not")
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UserError(f"{where}: architectures = {names} is not supported, only {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]


def read_model_config(config: Json, where: Path) -> ModelConfig:
    """The `ModelConfig` that a config.json describes.

    Args:
      config: its contents.
      where: its path, for messages.

    Raises:
      UserError: an unsupported architecture or feature, a size that is missing or impossible.
    """
    architecture = architecture_of(config, where)
    _refuse_unsupported(config, architecture, where)

    def number(*keys: str, default: float | None = None, kind: Callable[[Any], Any] = int) -> Any:
        """The number under the first of ``keys`` that is there."""
        key = next((key for key in keys if config.get(key) is not None), keys[0])
        value = config.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise UserError(f"{where}: {' or '.join(keys)} = {value!r}, expected a number")
        return kind(value)

    sizes: Json = {
        "vocab_size": number("vocab_size"),
        "num_layers": number("num_hidden_layers"),
        "embed_dim": number("hidden_size"),
        "num_heads": number("num_attention_heads"),
    }
    sizes["num_kv_heads"] = number("num_key_value_heads", default=sizes["num_heads"])
    head_dim = 128 if architecture.name == "Qwen3ForCausalLM" else sizes["embed_dim"] // max(1, sizes["num_heads"])
    sizes["head_dim"] = number("head_dim", default=head_dim)
    sizes["num_experts"] = 0
    if architecture.moe:
        sizes["num_experts"] = number("num_experts", "num_local_experts")
        sizes["experts_per_token"] = number("num_experts_per_tok")
        sizes["expert_dim"] = number(architecture.expert_width)
        normed = architecture.renormalise_gates
        sizes["renormalise_gates"] = bool(config.get("norm_topk_prob", False)) if normed is None else normed
        if sizes["num_experts"] < 1:
            raise UserError(f"{where}: num_experts = {sizes['num_experts']}, expected at least 1")
    if architecture.mixed:
        step = number("decoder_sparse_step", default=1)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise UserError(f"{where}: mlp_only_layers = {dense!r}, expected a list of layers")
        if step < 1:
            raise UserError(f"{where}: decoder_sparse_step = {step}, expected at least 1")
        layers = range(sizes["num_layers"])
        sizes["dense_layers"] = tuple(i for i in layers if i in dense or (i + 1) % step)
    if not architecture.moe or sizes.get("dense_layers"):
        sizes["mlp_dim"] = number("intermediate_size")
    model = ModelConfig(
        **sizes,
        qk_norm=architecture.qk_norm,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(config, architecture, where),
        norm_eps=number("rms_norm_eps", default=architecture.norm_eps, kind=float),
    )
    try:
        model.validate()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return model


def write_model_config(model: ModelConfig, dtype: str, base: Json | None = None) -> Json:
    """A config.json that describes ``model``: the inverse of `read_model_config`.

    Args:
      dtype: of the tensors that it goes with.
      base: the config.json that the model came with. Where it describes ``model``, it is returned as it is but for the
        dtype; what it says besides (lengths, special tokens) is kept in any case.

    Raises:
      UserError: no supported architecture computes this model.
    """
    architecture = architecture_for(model)
    base = dict(base or {})
    key = "dtype" if "dtype" in base else "torch_dtype"  # readers of any version know the older name
    if base and read_model_config(base, Path("config.json")) == model:
        return {**base, key: dtype}
    written: Json = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        key: dtype,
    }
    if not architecture.moe or architecture.mixed:
        written["intermediate_size"] = model.mlp_dim
    if architecture.moe:
        name = "num_local_experts" if architecture.model_type == "mixtral" else "num_experts"
        written[name] = model.num_experts
        written["num_experts_per_tok"] = model.experts_per_token
        written[architecture.expert_width] = model.expert_dim
    if architecture.moe and architecture.renormalise_gates is None:
        written["norm_topk_prob"] = model.renormalise_gates
    if architecture.mixed:
        written |= {"mlp_only_layers": list(model.dense_layers), "decoder_sparse_step": 1}
    stale = ("rope_parameters", "num_experts", "num_local_experts", "layer_types")
    return {name: value for name, value in base.items() if name not in stale} | written


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture that computes ``model``. Raises UserError where there is none."""
    if not model.num_experts:
        name = "Qwen3ForCausalLM" if model.qk_norm == "head" else None
    else:
        name = {
            "head": "Qwen3MoeForCausalLM",
            "projection": "OlmoeForCausalLM",
            "none": "MixtralForCausalLM",
        }[model.qk_norm]
    problem = None
    if name is None:
        problem = f"model.qk_norm = {model.qk_norm!r} in a dense model"
    elif name != "Qwen3MoeForCausalLM" and model.num_experts and model.dense_layers:
        problem = f"model.dense_layers with model.qk_norm = {model.qk_norm!r}"
    elif name == "MixtralForCausalLM" and not model.renormalise_gates:
        problem = "model.renormalise_gates = False with model.qk_norm = 'none'"
    elif name == "OlmoeForCausalLM" and model.head_dim * model.num_heads != model.embed_dim:
        problem = "model.head_dim x model.num_heads other than model.embed_dim with model.qk_norm = 'projection'"
    if problem or name is None:
        raise UserError(f"{problem}: none of {', '.join(ARCHITECTURES)} computes that, so it cannot be exported")
    return ARCHITECTURES[name]


def _object(config: Json, key: str, where: Path) -> Json:
    """The object under ``key``, empty where it is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: {key} = {value!r}, expected an object")
    return value or {}


def _refuse_unsupported(config: Json, architecture: Architecture, where: Path) -> None:
    used = config.get("use_sliding_window", "qwen3" not in architecture.model_type)
    kinds = set(config.get("layer_types") or []) - {"full_attention"}
    refused = {
        "attention_bias": bool(config.get("attention_bias")),
        "clip_qkv": config.get("clip_qkv") is not None,
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "sliding_window": bool(used) and config.get("sliding_window") is not None,
        "layer_types": bool(kinds),
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported by this model")


def _rope_theta(config: Json, architecture: Architecture, where: Path) -> float:
    """The base of the rotary frequencies, from either way of writing it. Raises UserError for scaled RoPE."""
    rope = _object(config, "rope_parameters", where)
    for key in ("rope_scaling", "rope_parameters"):
        value = _object(config, key, where)
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key} of the kind {kind!r} is not supported by this model, only plain RoPE")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported by this model, only RoPE of whole heads")
    theta = rope.get("rope_theta", config.get("rope_theta", architecture.rope_theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{where}: rope_theta = {theta!r}, expected a positive number")
    return float(theta)
