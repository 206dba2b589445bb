"""The same weights in other libraries, Hugging Face transformers and Tunix, as contenders of the benchmarks.

    pip install torch==2.13.0              # first, and on a machine without a GPU the CPU build of it
    pip install -e '.[bench]'

The extra holds transformers back to the last release that shares an environment with Tunix 0.1.7; its sampler does not
use what they disagree about. `pip install -U transformers` afterwards takes the newest, which is the fairer peer, and
what pip then says about `datasets` may be ignored.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.common import Contender, Missing
from rlstab_jax.models import ModelConfig
from rlstab_jax.models.by_layer import layers_of

HUGGING_FACE = {  # name -> (how experts are computed, the cache): the engines that `generate` is timed with
    "transformers, eager experts": ("eager", None),
    "transformers, grouped_mm": ("grouped_mm", None),
    "transformers, eager experts, static cache": ("eager", "static"),
    "transformers, grouped_mm, static cache": ("grouped_mm", "static"),
}
TUNIX = "Tunix sampler"
INSTALL = "see `experiments/benchmarks/peers.py`"


def contenders(
    config: ModelConfig,
    params: dict,
    prompts: np.ndarray,
    new_tokens: int,
    reference: np.ndarray,
    threads: int,
    group: int = 1,
) -> tuple[list[Contender | Missing], dict[str, float]]:
    """All peers on the same weights, prompts and lengths: temperature 1, full vocabulary, no stop token.

    Args:
      config: the model; all layers MoE.
      params: our parameters, float32.
      prompts: [prompts, prompt_length], full rows.
      new_tokens: drawn by each row.
      reference: our logits of the prompts, [prompts, prompt_length, vocab].
      threads: of torch.
      group: responses to each prompt.

    Returns:
      the contenders, and for each that is there the largest absolute difference of its logits from ours.
    """
    found: list[Contender | Missing] = []
    differences: dict[str, float] = {}
    for build, names in ((_transformers, list(HUGGING_FACE)), (_tunix, [TUNIX])):
        try:
            engines = build(config, params, prompts, new_tokens, threads, group)
        except ImportError as error:
            found += [Missing(name, f"{error}: {INSTALL}") for name in names]
            continue
        for name, (logits, run) in engines.items():
            differences[name] = float(np.abs(logits() - reference).max())
            if not differences[name] < 1e-3:
                raise AssertionError(f"{name}: its logits differ from ours by {differences[name]:.3g}, above 1e-3")
            found.append(Contender(name, run, prompts.shape[0] * group * new_tokens))
    return found, differences


Engine = tuple[Callable[[], np.ndarray], Callable[[], object]]  # logits of the prompts, and one run


def _layers(params: dict) -> list[dict]:
    """Our parameters by layer, as NumPy arrays."""
    return [jax.tree.map(np.asarray, layer["params"]) for layer in layers_of({"params": params})]


def hugging_face_state(params: dict) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the layout of `Qwen3MoeForCausalLM`: linear weights are [out, in]."""
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["gain"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for i, layer in enumerate(_layers(params)):
        attention, moe = layer["attention"], layer["moe"]
        gate_up = np.concatenate([moe["gate"], moe["up"]], axis=-1)
        state |= {
            f"model.layers.{i}.{name}": value
            for name, value in {
                **{f"self_attn.{p}_proj.weight": attention[p]["kernel"].T for p in "qkvo"},
                "self_attn.q_norm.weight": attention["q_norm"]["gain"],
                "self_attn.k_norm.weight": attention["k_norm"]["gain"],
                "input_layernorm.weight": layer["attention_norm"]["gain"],
                "post_attention_layernorm.weight": layer["mlp_norm"]["gain"],
                "mlp.gate.weight": moe["router"]["kernel"].T,
                "mlp.experts.gate_up_proj": gate_up.swapaxes(1, 2),
                "mlp.experts.down_proj": moe["down"].swapaxes(1, 2),
            }.items()
        }
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def hugging_face_model(config: ModelConfig, params: dict, experts: str) -> Any:
    """A `Qwen3MoeForCausalLM` with our weights, ready for inference. ``experts``: eager, grouped_mm or batched_mm."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if int(importlib.metadata.version("transformers").split(".")[0]) < 5:
        raise ImportError("transformers is older than 5, where experts are stacked")
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
            moe_intermediate_size=config.expert_dim,
            norm_topk_prob=config.renormalise_gates,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict({name: torch.tensor(v) for name, v in hugging_face_state(params).items()})
    model.set_experts_implementation(experts)
    return model.eval()


def _transformers(
    config: ModelConfig, params: dict, prompts: np.ndarray, new_tokens: int, threads: int, group: int
) -> dict[str, Engine]:
    import torch

    torch.set_num_threads(threads)
    ids = torch.tensor(prompts, dtype=torch.long)
    models = {experts: hugging_face_model(config, params, experts) for experts, _ in HUGGING_FACE.values()}

    def logits(experts: str) -> np.ndarray:
        with torch.inference_mode():
            return models[experts](ids).logits.numpy()

    def run(experts: str, cache: str | None) -> None:
        tokens = models[experts].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )
        assert tokens.shape == (prompts.shape[0] * group, prompts.shape[1] + new_tokens)

    return {name: (partial(logits, how[0]), partial(run, *how)) for name, how in HUGGING_FACE.items()}


class _Ids:
    """A tokeniser for Tunix's sampler whose texts are lists of token ids. Padding and stop lie past the vocabulary."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: list[int], **_: Any) -> list[int]:
        return text

    def decode(self, ids: list[int], **_: Any) -> list[int]:
        return ids

    def bos_id(self) -> int:
        return 0  # falsy: the sampler puts none before the prompt

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1


def tunix_model(config: ModelConfig, params: dict) -> Any:
    """Tunix's `Qwen3` with our weights."""
    from flax import nnx
    from tunix.models.qwen3.model import ModelConfig as Qwen3Config
    from tunix.models.qwen3.model import Qwen3

    if config.rope_theta != 1e6:
        raise AssertionError("Tunix's Qwen3 rotates by a theta of 1e6, whatever its config says")
    model = Qwen3(
        Qwen3Config(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.embed_dim,
            hidden_dim=config.expert_dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_theta),
            norm_eps=config.norm_eps,
            num_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
        ),
        rngs=nnx.Rngs(0),
    )
    _tunix_load(config, params, model)
    return model


def _tunix(
    config: ModelConfig, params: dict, prompts: np.ndarray, new_tokens: int, threads: int, group: int
) -> dict[str, Engine]:
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler

    model = tunix_model(config, params)
    batch, length = prompts.shape
    cache = CacheConfig(length + new_tokens, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, _Ids(config.vocab_size), cache)
    texts = np.repeat(prompts, group, axis=0).tolist()

    def logits() -> np.ndarray:
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        positions = jnp.broadcast_to(jnp.arange(length), prompts.shape)
        return np.asarray(nnx.jit(lambda m: m(jnp.asarray(prompts), positions, None, causal)[0])(model))

    def run() -> None:
        output = sampler(
            texts, max_generation_steps=new_tokens, max_prompt_length=length, temperature=1.0, top_p=1.0, seed=0
        )
        assert all(len(tokens) == new_tokens for tokens in output.tokens)

    return {TUNIX: (logits, run)}


def _tunix_load(config: ModelConfig, params: dict, model: Any) -> None:
    """Puts our parameters into Tunix's Qwen3: projections are split by head."""
    d, c = config.embed_dim, config.head_dim
    model.embedder.input_embedding.value = jnp.asarray(params["embedding"])
    model.final_norm.w.value = jnp.asarray(params["final_norm"]["gain"])
    model.lm_head.w.value = jnp.asarray(params["lm_head"]["kernel"])
    for theirs, ours in zip(model.layers, _layers(params), strict=True):
        attention, moe = ours["attention"], ours["moe"]
        theirs.input_layernorm.w.value = ours["attention_norm"]["gain"]
        theirs.post_attention_layernorm.w.value = ours["mlp_norm"]["gain"]
        theirs.attn.q_proj.w.value = attention["q"]["kernel"].reshape(d, config.num_heads, c)
        theirs.attn.k_proj.w.value = attention["k"]["kernel"].reshape(d, config.num_kv_heads, c)
        theirs.attn.v_proj.w.value = attention["v"]["kernel"].reshape(d, config.num_kv_heads, c)
        theirs.attn.o_proj.w.value = attention["o"]["kernel"].reshape(config.num_heads, c, d)
        theirs.attn.q_norm.w.value = attention["q_norm"]["gain"]
        theirs.attn.k_norm.w.value = attention["k_norm"]["gain"]
        theirs.mlp.router.kernel.value = moe["router"]["kernel"]
        for name in ("gate", "up", "down"):
            getattr(theirs.mlp, f"{name}_proj").value = moe[name]
