"""The MoE transformer: tokens -> hidden states, cache, routes."""

from rlstab_jax.models.config import Kernels, ModelConfig, resolve_kernels
from rlstab_jax.models.precision import Precision, fp8, quantised
from rlstab_jax.models.transformer import Transformer

__all__ = ["Kernels", "ModelConfig", "Precision", "Transformer", "fp8", "quantised", "resolve_kernels"]
