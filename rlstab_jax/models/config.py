"""The model room's configuration: sizes, and which kernels compute them."""

import dataclasses
import importlib.metadata
import re
from typing import Any, Literal

from rlstab_jax.checks import HUGE, INT32_MAX, TINY, check_fields, check_ranges
from rlstab_jax.types import UserError

QKNorm = Literal["head", "projection", "none"]
_POSITIVE = (1, INT32_MAX, "at least 1")
RANGES = {
    **dict.fromkeys(("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim"), _POSITIVE),
    "num_experts": (0, 65_534, "0 (dense) or more, and at most 65534: routes are stored in 16 bits"),
    "rope_theta": (TINY, HUGE, "above 0"),
    "norm_eps": (0, 1, "from 0 to 1"),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which implementation computes attention and experts, over whole sequences (scoring, updates, prefill; but see
    `for_inference` for a prefill's experts) and in a decode step. ``auto`` is resolved once, at the start of a run."""

    attention: Literal["auto", "reference", "chunked", "cudnn", "splash"] = "auto"
    """reference anywhere; chunked too, with memory in proportion to the length; cudnn needs an NVIDIA GPU and
    bfloat16 or float16; splash needs TPUs."""
    experts: Literal["auto", "dense", "tiles", "grouped", "ragged_dot", "megablox", "tokamax"] = "auto"
    """dense is the slow reference; tiles is fast on CPU; grouped pads experts' shares to the largest, in one batched
    product, and is tiles, a slow loop on GPUs, where one has several times the mean; ragged_dot runs anywhere and is
    fast on TPU, but on NVIDIA GPUs it multiplies each of a token's k rows with every expert; megablox needs TPUs;
    tokamax needs an NVIDIA GPU, for the gradient a Hopper (H100, H200), bfloat16 and the package of that name. auto is
    tiles on CPUs, grouped on GPUs, ragged_dot on TPUs."""
    decode_attention: Literal["auto", "reference", "splash", "flash", "triton"] = "auto"
    """reference anywhere; splash and flash need TPUs, triton an NVIDIA GPU. flash and triton read int8 and fp8 caches
    as they are, which the others widen, and of a window what is filled."""
    decode_experts: Literal[
        "auto", "dense", "tiles", "grouped", "ragged_dot", "megablox", "narrow", "tokamax", "triton"
    ] = "auto"
    """grouped moves no weights; narrow needs TPUs, triton an NVIDIA GPU: where ``products`` are native and ``scales``
    by channel, they read fp8 weights as they are, which the others widen or copy; the rest are those of ``experts``."""
    expert_chunk: int = 0
    """Tokens that the experts of a layer compute at once, on a mesh those of all devices along ``expert``: bounds their
    memory, since each may have to take all of them. 0 = all."""

    def for_inference(self) -> "Kernels":
        """Those of an inference engine, which needs no gradients: its prefill uses the experts of its decode steps.

        But `tiles` stays in the place of `grouped`: of as many tokens as prompts have, it pads fewer.
        """
        if (self.experts, self.decode_experts) == ("tiles", "grouped"):
            return self
        experts: Any = self.decode_experts  # it may have no gradient, which `experts` must have
        return dataclasses.replace(self, experts=experts)


# Where a kernel exists that does not exist everywhere.
PLATFORM = dict.fromkeys(("cudnn", "tokamax", "triton"), "gpu")
PLATFORM |= dict.fromkeys(("splash", "flash", "megablox", "narrow"), "tpu")
_HARDWARE = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}


def has_tokamax() -> bool:
    """Whether a version of tokamax is installed that `experts.tokamax` can use."""
    try:
        installed = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return False
    # Older ones parse the command line as their own.
    return tuple(int(part) for part in re.findall(r"\d+", installed)[:3]) >= (0, 0, 17)


LONG = 4096  # tokens: of one row the scores of 32 heads are 2 GB in float32, and grow with the square


def resolve_kernels(kernels: Kernels, platform: str, length: int = 0) -> Kernels:
    """Replaces ``auto`` by what suits the hardware. Raises UserError where an explicit kernel does not exist there.

    ``auto`` is never a fused kernel of a library: their speed has not been measured.

    Args:
      kernels: the configured ones.
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` says.
      length: tokens of the longest sequence; from `LONG` on, attention is chunked.
    """
    best: dict[str, Any] = {
        "attention": "chunked" if length >= LONG else "reference",
        "experts": {"cpu": "tiles", "tpu": "ragged_dot"}.get(platform, "grouped"),
        "decode_attention": "reference",
        "decode_experts": "ragged_dot" if platform == "tpu" else "grouped",
    }
    if kernels.expert_chunk < 0:
        raise UserError(f"kernels.expert_chunk = {kernels.expert_chunk}: expected tokens, or 0 for all at once")
    for name, instead in best.items():
        kernel = getattr(kernels, name)
        needed = PLATFORM.get(kernel, platform)
        if needed != platform:
            raise UserError(
                f"kernels.{name} = {kernel!r} needs {_HARDWARE[needed]}, but this is {platform!r}: use 'auto' or "
                f"{instead!r}"
            )
        if kernel == "tokamax" and not has_tokamax():
            raise UserError(
                f"kernels.{name} = 'tokamax' needs the package tokamax, 0.0.17 or newer, and Python 3.12: "
                f"pip install 'rlstab_jax[tokamax]', or use 'auto' or {instead!r}"
            )
    return dataclasses.replace(kernels, **{name: k for name, k in best.items() if getattr(kernels, name) == "auto"})


def dense_remark(kernels: Kernels, platform: str, model: "ModelConfig") -> str | None:
    """One line where `ragged_dot` computes what it need not, and what to do about it.

    Args:
      kernels: as resolved.
      platform: as of `resolve_kernels`.
      model: whose experts they compute.
    """
    if platform != "gpu" or kernels.experts != "ragged_dot" or not model.num_moe_layers:
        return None
    return (
        f"kernels.experts = 'ragged_dot' does {model.num_experts} times the experts' work on NVIDIA GPUs, where a row "
        "meets all of them: 'auto' is 'grouped', which does not, nor, on H100 and H200 in bfloat16, does 'tokamax' "
        "(pip install 'rlstab_jax[tokamax]')"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer. The default is the quickstart's: about 140 thousand parameters."""

    vocab_size: int = 0
    """Number of tokens; 0 takes the tokeniser's."""
    num_layers: int = 2
    """Decoder layers."""
    embed_dim: int = 64
    """Width d of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads; divides num_heads."""
    head_dim: int = 16
    """Width of one head; even, for RoPE."""
    num_experts: int = 16
    """Experts of an MoE layer; 0 makes every layer dense."""
    experts_per_token: int = 2
    """k of the router's top-k."""
    expert_dim: int = 24
    """Hidden width of one expert."""
    mlp_dim: int = 128
    """Hidden width of a dense layer."""
    dense_layers: tuple[int, ...] = ()
    """Indices of layers that are dense among the MoE ones."""
    qk_norm: QKNorm = "head"
    """What RMSNorm normalises of queries and keys: each head (Qwen3), all heads together (OLMoE), nothing (Mixtral)."""
    renormalise_gates: bool = True
    """Whether the gates of the chosen experts are rescaled to sum to 1 (norm_topk_prob)."""
    tie_embeddings: bool = False
    """Whether the LM head is the transposed embedding."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""

    def validate(self) -> None:
        """Raises UserError on impossible sizes, naming the field."""
        check_fields(self, "model")
        check_ranges(self, RANGES, "model")
        positive = ["expert_dim", "experts_per_token"] if self.num_experts else []
        positive += ["mlp_dim"] if not all(self.kinds) else []
        check_ranges(self, dict.fromkeys(positive, _POSITIVE), "model")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}: "
                "choose a divisor"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim}: RoPE needs an even number")
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise UserError(
                f"model.experts_per_token = {self.experts_per_token} exceeds model.num_experts = {self.num_experts}: "
                "choose at most as many"
            )
        outside = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if outside:
            raise UserError(f"model.dense_layers holds {outside}: expected indices from 0 to {self.num_layers - 1}")

    @property
    def kinds(self) -> tuple[bool, ...]:
        """For each layer, whether it is an MoE layer."""
        return tuple(self.num_experts > 0 and i not in self.dense_layers for i in range(self.num_layers))

    @property
    def num_moe_layers(self) -> int:
        return sum(self.kinds)

    @property
    def segments(self) -> tuple[tuple[tuple[bool, ...], int], ...]:
        """The layers as (period, repetitions), one scan each. Greedy: the longest repeat from each layer on."""
        kinds, segments, start = self.kinds, [], 0
        while start < len(kinds):
            best = (kinds[start : start + 1], 1)
            for period in range(1, (len(kinds) - start) // 2 + 1):
                pattern, repeats = kinds[start : start + period], 1
                while kinds[start + repeats * period : start + (repeats + 1) * period] == pattern:
                    repeats += 1
                if repeats > 1 and repeats * period > len(best[0]) * best[1]:
                    best = (pattern, repeats)
            segments.append(best)
            start += len(best[0]) * best[1]
        return tuple(segments)
