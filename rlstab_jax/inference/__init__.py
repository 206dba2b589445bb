"""The inference engine mu: its own precision, a jitted sampler, log-probs and routes of what was really sampled."""

from rlstab_jax.inference.quantize import prepare
from rlstab_jax.inference.sampler import Sampling, sample, sample_keys

__all__ = ["Sampling", "prepare", "sample", "sample_keys"]
